"""What routing costs by the size of the library: all experts computed, or the chosen alone.

python -m scripts.benchmark_routing
"""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Settings:
    """Times the ways to route one projection by the size of the library, and prints a table each.

    A way's memory is what its program holds beside its arguments and its result.
    """

    experts: tuple[int, ...] = (10, 32, 100, 256, 1000)  # in a library
    sizes: tuple[tuple[int, int], ...] = ((576, 576), (3072, 9216))  # in and out of the projection
    tokens: int = 512
    rank: int = 4
    top_k: int = 3
    ragged: int = 10  # most experts for which sorting the tokens and ragged_dot is timed too
    rounds: int = 9  # the median counts
    figure: Path | None = None  # an image of the times, .png or .svg


def main() -> None:
    """Prints the tables, and draws the figure if one is asked for."""
    settings = tyro.cli(Settings, prog="python -m scripts.benchmark_routing")
    from scripts import routing_cost

    routing_cost.report(settings)


if __name__ == "__main__":
    main()
