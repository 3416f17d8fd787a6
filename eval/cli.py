"""`lora-eval`: reads the command line and calls `eval.run`."""

import sys

import tyro

from eval.config import Evaluation
from lora_jax.errors import InputError


def main() -> None:
    """Measures; what cannot be used is told in one line, with status 2."""
    try:
        config = tyro.cli(Evaluation, prog="lora-eval", config=(tyro.conf.FlagCreatePairsOff,))
        from lora_jax import runtime, wheels

        wheels.accept(config.accept)
        runtime.prepare()
        from eval.run import run

        run(config)
    except (InputError, OSError) as error:
        sys.exit(_failed(f"error: {error}"))


def _failed(message: str) -> int:
    """The exit status, once the message is on standard error."""
    print(message, file=sys.stderr)
    return 2
