"""The facts about modules in single numbers, over all pairs, as rules and sentences want them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from compose.facts import Facts


@dataclass(frozen=True)
class Findings:
    """The facts about modules, over their pairs."""

    facts: Facts

    @property
    def count(self) -> int:
        """How many modules there are."""
        return len(self.facts.names)

    @property
    def fit(self) -> bool:
        """Whether there are several modules, and they can be added."""
        return self.count > 1 and not self.facts.misfit

    @property
    def lora(self) -> bool:
        """The same, and some are LoRA."""
        return self.fit and self.facts.factors is not None

    def _pairs(self, matrix: np.ndarray | None) -> np.ndarray:
        """The values above the diagonal; none are 0."""
        values = np.zeros(0) if matrix is None else matrix[np.triu_indices(self.count, 1)]
        return values if values.size else np.zeros(1)

    @cached_property
    def least_factor(self) -> float:
        """The least cosine between two modules' a's."""
        return float(self._pairs(self.facts.factors).min())

    @cached_property
    def cosines(self) -> np.ndarray:
        """The cosines between what two modules add, pair by pair."""
        return self._pairs(self.facts.cosines)

    @property
    def cosine_size(self) -> float:
        """The mean size of those."""
        return float(np.abs(self.cosines).mean())

    @property
    def least_cosine(self) -> float:
        """The least of them."""
        return float(self.cosines.min())

    @property
    def opposed(self) -> str:
        """The two modules of the least cosine."""
        rows, columns = np.triu_indices(self.count, 1)
        pair = int(self.cosines.argmin())
        return f"{self.facts.names[rows[pair]]} and {self.facts.names[columns[pair]]}"

    @cached_property
    def overlap(self) -> float:
        """The mean overlap of the directions that two modules read."""
        return float(self._pairs(self.facts.inputs).mean())

    @property
    def times(self) -> float:
        """How many times the largest module is as large as the smallest; infinite over nothing."""
        sizes = self.facts.norms or (1.0,)
        return max(sizes) / min(sizes) if min(sizes) else np.inf

    @property
    def smallest(self) -> str:
        """The name of the smallest module."""
        return self.facts.names[int(np.argmin(self.facts.norms or (0.0,)))]

    @property
    def largest(self) -> str:
        """The name of the largest module."""
        return self.facts.names[int(np.argmax(self.facts.norms or (0.0,)))]

    @property
    def total_rank(self) -> int:
        """The ranks of the exact sum."""
        return sum(max(ranks, default=0) for ranks in self.facts.ranks)

    @property
    def seeded(self) -> bool:
        """Whether all modules say one seed of their initialisation."""
        return None not in self.facts.seeds and len(set(self.facts.seeds)) == 1

    def holds(self, kind: str) -> bool:
        """Whether some module has a part of that kind."""
        return any(kind in kinds for kinds in self.facts.kinds)
