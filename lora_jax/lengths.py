"""The few fixed sizes that data are padded to, so that nothing recompiles as data changes."""

from collections.abc import Sequence

import numpy as np


def bucket(size: int, *, steps: int = 4, apart: int = 1) -> int:
    """The smallest bucket that holds `size`: 0 to 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...

    Between one power of two and the next lie `steps` even steps (a power of two), but of `apart` at
    least: two steps, 8 apart, give 8, 16, 24, 32, 48, 64, 96, ...
    """
    step = max(apart, (1 << max(size - 1, 0).bit_length()) // (2 * steps))
    return -(-size // step) * step


def fixed_length(size: int) -> int:
    """The coarse bucket that holds `size`, for lengths that are few."""
    return bucket(int(size), steps=2, apart=8)


def choose_lengths(
    sizes: Sequence[int] | np.ndarray, limit: int = 4, worth: float = 0.1
) -> tuple[int, ...]:
    """At most `limit` buckets that hold rows of `sizes` tokens with little padding, in order.

    Each costs a compilation, so one is added only while it saves the share `worth` of all the
    tokens that would be processed; as they are few, they are taken from coarse buckets.
    """
    exact = np.asarray([fixed_length(size) for size in sizes])
    chosen = [int(exact.max())]
    candidates = sorted(set(exact.tolist()) - set(chosen))
    while candidates and len(chosen) < limit:
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
