"""`lora-compose`: an expression over adapters and libraries to a new one."""

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg

from compose.commands.arguments import ARGUMENTS
from lora_jax.errors import InputError


@dataclass(frozen=True)
class Command:
    """Compose adapters: lora-compose "chat - 0.4*toxic" chat=A toxic=B --out C.

    Or a recipe, a file of named steps and outputs: lora-compose recipe.yaml.

    Numbers, names, + - * / and brackets; mean(a, b, ...), negate(a, strength),
    analogy(task, target, source, weight), detox(instructed, toxic, strength),
    gks(task, general, strength), library(a, b, ...), member(lib, name=a),
    arrow(a, b, ..., top_k=3, temperature=1,
    mixing=outputs), spectr(a, b, ...), uniform(a, b, ...) and more (docs/routing.md);
    svd(a, b, ..., weights=[1, 0.5], rank=16), ties(a, b, ..., density=0.2) and more
    (docs/merging.md). A library counts as its members.

    Four first words measure instead, each with its own --help: lora-compose explain, similar,
    cluster, diagnose (docs/libraries.md).
    """

    expression: Annotated[tyro.conf.Positional[str], arg(metavar="EXPRESSION")]
    """What to compose; or a recipe's file, which ends in .yaml or .yml."""

    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], arg(metavar="NAME=FOLDER ...")]
    """For every name in the expression: an adapter's folder or a library's, or hf://USER/REPO.
    With a recipe: other folders for its inputs."""

    out: Path | None = None
    """The folder to write; a recipe names its own."""

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

    dry_run: bool = False
    """Check a recipe and tell what its steps will make; write nothing."""


def main() -> None:
    """The command: composes, prints a summary, and leaves with status 2 on bad input."""
    words = sys.argv[1:]
    named = words[0] if words and words[0] in ARGUMENTS else ""
    command = tyro.cli(
        ARGUMENTS.get(named, Command),
        prog=f"lora-compose {named}".strip(),
        args=[_shielded(a) for a in words[bool(named) :]],
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        import_module(f"compose.commands.{named}" if named else "compose.command").run(command)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _shielded(argument: str) -> str:
    """An argument behind a space if it would pass for a short flag: "-a + b" is an expression."""
    is_flag = not argument.startswith("-") or argument.startswith("--") or argument == "-h"
    return argument if is_flag else f" {argument}"
