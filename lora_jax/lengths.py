"""The few fixed lengths that rows are padded to, so that nothing recompiles as data changes."""

from collections.abc import Sequence

import numpy as np

GRID = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)


def round_up(size: int) -> int:
    """The smallest length of the grid that holds `size`; beyond the grid, whole thousands."""
    return next((length for length in GRID if length >= size), -(-size // 1024) * 1024)


def choose_lengths(sizes: Sequence[int], most: int = 4, worth: float = 0.1) -> tuple[int, ...]:
    """At most `most` grid lengths that hold rows of `sizes` with little padding, in order.

    Each length costs a compilation, so one is added only while it saves the share `worth` of all
    the tokens that would be processed.
    """
    exact = np.asarray([round_up(size) for size in sizes])
    chosen = [int(exact.max())]
    candidates = sorted(set(exact.tolist()) - set(chosen))
    while candidates and len(chosen) < most:
        costs = [_padded(exact, [*chosen, length]) for length in candidates]
        if min(costs) > (1 - worth) * _padded(exact, chosen):
            break
        chosen.append(candidates.pop(int(np.argmin(costs))))
    return tuple(sorted(chosen))


def assign(sizes: Sequence[int] | np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """The smallest of the sorted `lengths` that holds each size."""
    return np.asarray(lengths)[np.searchsorted(lengths, sizes)]


def _padded(exact: np.ndarray, lengths: list[int]) -> int:
    return int(assign(exact, sorted(lengths)).sum())
