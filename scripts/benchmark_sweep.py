"""What a sweep costs: all its compositions in one program, or one after the other.

python -m scripts.benchmark_sweep
"""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Settings:
    """Scores the demo's questions under `a - x b` for every x, both ways, and prints the table."""

    compositions: tuple[int, ...] = (8, 32)  # values of x
    questions: int = 24
    rank: int = 4
    base: str = "smollm2-135m"
    figure: Path | None = None  # an image of the times, .png or .svg


def main() -> None:
    """Prints the table, and draws the figure if one is asked for."""
    settings = tyro.cli(Settings, prog="python -m scripts.benchmark_sweep")
    from scripts import sweep_cost

    sweep_cost.report(settings)


if __name__ == "__main__":
    main()
