"""Which methods suit given modules and why, in words, from what is measured of them.

The rules are data: a condition on the facts, and what to say where it holds. Methods stand in
backticks, by the names that expressions and `compose.merging.methods` have for them.
"""

from collections.abc import Callable

from compose.facts import Facts
from compose.findings import Findings
from compose.merging.methods import SUMS, VECTOR

SHARED = 0.5  # a cosine of two a's from which on their initialisation counts as shared
GAP = 0.1  # a factor-space result further off than this is another function
ALIKE, ORTHOGONAL, OPPOSED = 0.5, 0.1, -0.1  # cosines of what modules add
OVERLAP, APART = 0.5, 0.1  # overlaps of subspaces
UNEQUAL = 3.0  # times that the largest module is larger than the smallest
CHANCE = (0.4, 0.6)  # shares of opposite signs that unrelated modules have
MANY = 8  # modules beyond which one sum is asked for much


Rule = tuple[Callable[[Findings], bool], str]

RULES: list[Rule] = [
    (lambda s: bool(s.facts.misfit), "They cannot be composed as they are: {s.facts.misfit}."),
    (
        lambda s: s.count == 1 and not s.facts.misfit,
        "One module alone: every method gives it back at weight 1. Negate, scale or recompress it.",
    ),
    (
        lambda s: s.lora and s.least_factor >= SHARED,
        "They share their initialisation: two a's have a cosine of {s.least_factor:.2f} or more.",
    ),
    (
        lambda s: s.lora and s.least_factor < SHARED,
        "They do not share their initialisation: two a's have a cosine of {s.least_factor:.2f}. In "
        "factor space each a meets the others' b: there `mean` is off by {s.facts.mean_gap:.0%} "
        "and a plain sum by {s.facts.sum_gap:.0%} of the exact result. Stay in delta space.",
    ),
    (
        lambda s: s.lora and s.least_factor < SHARED and s.seeded,
        "Yet their records say one --init-seed: unequal ranks draw apart, and long training moves "
        "an a far.",
    ),
    (
        lambda s: s.lora and s.least_factor >= SHARED and s.facts.mean_gap <= GAP,
        "`mean` is nearly the same in both spaces, {s.facts.mean_gap:.0%} apart, and in factor "
        "space it keeps the rank: PEM's and LoRAHub's averages suit.",
    ),
    (
        lambda s: s.lora and s.least_factor >= SHARED and s.facts.mean_gap > GAP,
        "Even so `mean` in factor space is off by {s.facts.mean_gap:.0%}: take it in delta space.",
    ),
    (
        lambda s: s.lora and s.least_factor >= SHARED and s.facts.sum_gap > GAP,
        "A plain sum in factor space is off by {s.facts.sum_gap:.0%} of the exact one, in cross "
        "terms; add and subtract in delta space. gks in factor space takes the shared first draw "
        "away with the knowledge: run gks(x, untrained(x)) beside it.",
    ),
    (
        lambda s: s.fit and s.cosine_size < ORTHOGONAL,
        "What they add is nearly orthogonal (mean |cosine| {s.cosine_size:.2f}): a weighted sum "
        "(`linear`, `cat`) keeps what each does, and there is little for methods against "
        "interference to gain.",
    ),
    (
        lambda s: s.fit and s.cosine_size < ORTHOGONAL and CHANCE[0] < s.facts.conflict < CHANCE[1],
        "Their signs differ at {s.facts.conflict:.0%} of the entries, which is chance: `ties` and "
        "its like would elect signs by lot, and what changes the result is their trimming.",
    ),
    (
        lambda s: s.fit and s.least_cosine >= ALIKE,
        "All say much the same (cosines from {s.least_cosine:.2f}): average them, with weights "
        "that add up to 1, or take `svc`, which scales a sum down where modules agree.",
    ),
    (
        lambda s: s.fit and s.least_cosine >= ALIKE and s.count == 2,
        "Between two as alike as that, `slerp` keeps the length that an average loses.",
    ),
    (
        lambda s: s.fit and s.least_cosine < OPPOSED,
        "{s.opposed} work against each other (cosine {s.least_cosine:.2f}): a sum cancels part of "
        "both. `ties` decides by sign; arrow keeps both and chooses by token.",
    ),
    (
        lambda s: s.lora and s.overlap >= OVERLAP,
        "They read the same input directions (overlap {s.overlap:.2f}): `core_space` and "
        "`compress_then_merge` have a small space to share; `wudi` wants damping.",
    ),
    (
        lambda s: s.lora and s.overlap < APART,
        "They read different input directions (overlap {s.overlap:.2f}): `wudi` finds a result "
        "that does on each one's inputs what it did alone.",
    ),
    (
        lambda s: s.lora and s.facts.prototypes >= ALIKE,
        "Their strongest input directions are alike (mean |cosine| {s.facts.prototypes:.2f}): "
        "arrow tells them apart poorly; route by gates or activations.",
    ),
    (
        lambda s: s.lora and s.facts.prototypes < ALIKE,
        "Their strongest input directions differ (mean |cosine| {s.facts.prototypes:.2f}), by "
        "which arrow chooses: it can route over them.",
    ),
    (
        lambda s: s.fit and s.times >= UNEQUAL,
        "{s.largest} is {s.times:.1f} times as large as {s.smallest}, which hardly counts beside "
        "it in a sum, nor where `ties` elects signs. Give weights, or rescaled(x, y).",
    ),
    (
        lambda s: s.lora and len(set(s.facts.ranks)) > 1,
        "Their ranks differ; nothing here needs them equal (PEFT's `linear`, `ties` and arrow do).",
    ),
    (
        lambda s: s.lora and len({scale for scales in s.facts.scales for scale in scales}) > 1,
        "Their scales differ: each is folded into its b before factors meet; deltas do not notice.",
    ),
    (
        lambda s: s.fit and len({frozenset(paths) for paths in s.facts.targets}) > 1,
        "They do not all change the same projections: a missing one counts as zero, and an average "
        "divides by all of them there too.",
    ),
    (
        lambda s: s.lora and s.total_rank > s.facts.width > 0,
        "Their ranks add up to {s.total_rank}, more than the smallest size of a projection, "
        "{s.facts.width}: `tsv` keeps only some of each, and a sum is best recompressed.",
    ),
    (
        lambda s: s.fit and s.count > 2,
        "`slerp` lies between two modules and is out.",
    ),
    (
        lambda s: s.fit and s.count > MANY,
        "{s.count} modules are many for one sum: route over them, or lora-compose cluster them.",
    ),
    (
        lambda s: not s.facts.misfit and s.holds("IA3"),
        f"IA3 has no rank and no factors: both spaces are one, and only "
        f"{', '.join(f'`{name}`' for name in (*SUMS, *sorted(VECTOR.keys() - {*SUMS})))} merge it.",
    ),
    (
        lambda s: s.fit and s.holds("Saved"),
        f"Weights kept whole go with them: of merges only "
        f"{', '.join(f'`{name}`' for name in SUMS)} take those.",
    ),
]


def explained(facts: Facts) -> list[str]:
    """A sentence for every rule that holds, in their order."""
    found = Findings(facts)
    return [sentence.format(s=found) for condition, sentence in RULES if condition(found)]
