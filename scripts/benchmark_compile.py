"""What compiling costs, two layers deep and thirty-two, for every family.

python -m scripts.benchmark_compile
"""

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Settings:
    """Times the compilation of a forward pass and of a training step, and prints both tables."""

    rounds: int = 3  # the fastest counts


def main() -> None:
    """Prints both tables."""
    settings = tyro.cli(Settings, prog="python -m scripts.benchmark_compile")
    from scripts import compile_cost

    compile_cost.compiling(settings.rounds)


if __name__ == "__main__":
    main()
