"""What Arrow's routing costs, in a whole forward pass and at one projection.

python -m scripts.benchmark_arrow
"""

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Settings:
    """Times Arrow's routing, for SmolLM2 and for one projection, and prints both tables."""

    forward: tuple[int, ...] = (10, 100)  # experts a library, for the whole forward pass
    projection: tuple[int, ...] = (10, 32, 100)  # experts a library, for the one projection
    rounds: int = 81  # of the forward passes, each against the plain one beside it


def main() -> None:
    """Prints both tables."""
    settings = tyro.cli(Settings, prog="python -m scripts.benchmark_arrow")
    from scripts import arrow_cost

    arrow_cost.routed_forward(settings.forward, settings.rounds)
    arrow_cost.routed_projection(settings.projection)


if __name__ == "__main__":
    main()
