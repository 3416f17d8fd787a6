"""What a batch costs whose rows run under adapters of their own.

python -m scripts.benchmark_per_example
"""

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Settings:
    """Times SmolLM2's forward pass and one projection with an adapter a row, and prints tables."""

    rows: int = 8
    length: tuple[int, ...] = (128, 1)  # tokens a row: a prompt's, and the one that is written next
    adapters: int = 8
    rank: int = 8  # of LoRA on q, k, v and o
    rounds: int = 9


def main() -> None:
    """Prints the tables."""
    settings = tyro.cli(Settings, prog="python -m scripts.benchmark_per_example")
    from scripts import per_example_cost

    per_example_cost.mixed_forward(**vars(settings))
    per_example_cost.mixed_projection(**vars(settings))


if __name__ == "__main__":
    main()
