"""`lora-compose`: an expression over adapters and libraries to a new one."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg

from lora_jax.errors import InputError


@dataclass(frozen=True)
class Command:
    """Compose adapters: lora-compose "chat - 0.4*toxic" chat=A toxic=B --out C.

    Numbers, names, + - * / and brackets; mean(a, b, ...), negate(a, strength),
    analogy(task, target, source, weight), detox(instructed, toxic, strength),
    gks(task, general, strength), library(a, b, ...), arrow(a, b, ..., top_k=3, temperature=1,
    mixing=outputs). A library counts as its members.
    """

    expression: Annotated[tyro.conf.Positional[str], arg(metavar="EXPRESSION")]
    """What to compose."""

    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], arg(metavar="NAME=FOLDER ...")]
    """For every name in the expression: an adapter's folder or a library's, or hf://USER/REPO."""

    out: Path
    """The folder to write."""

    space: Literal["delta", "factor"] = "delta"
    """Add what the modules do, exactly; or add their tensors one by one, as the papers do."""

    rank: int | None = None
    """Recompress the result to this rank (delta space only)."""

    base: str | None = None
    """The base model, for its shapes; by default the one that the inputs name."""

    merged: bool = False
    """Write the whole base model with the result merged into it, as transformers loads it."""

    overwrite: bool = False
    """Replace the output folder if it exists."""


def main() -> None:
    """The command: composes, prints a summary, and leaves with status 2 on bad input."""
    command = tyro.cli(
        Command,
        prog="lora-compose",
        args=[_shielded(a) for a in sys.argv[1:]],
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        from compose.command import run

        run(command)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _shielded(argument: str) -> str:
    """An argument behind a space if it would pass for a short flag: "-a + b" is an expression."""
    is_flag = not argument.startswith("-") or argument.startswith("--") or argument == "-h"
    return argument if is_flag else f" {argument}"
