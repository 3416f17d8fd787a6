"""Every rule speaks on one side of its threshold and is silent on the other."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from compose.explain import RULES, explained
from compose.facts import Facts, measured
from compose.findings import Findings
from compose.functions import FUNCTIONS
from compose.merging.methods import METHODS
from lora_jax.modules import init_lora


def square(value, count=2):
    """A matrix of one value beside a diagonal of ones."""
    return np.where(np.eye(count) > 0, 1.0, value)


PLAIN = Facts(
    ("x", "y"),
    (("LoRA",),) * 2,
    ((4,),) * 2,
    ((2.0,),) * 2,
    (("q", "v"),) * 2,
    (None, None),
    width=32,
    norms=(1.0, 1.0),
    cosines=square(0.3),
    factors=square(0.9),
    inputs=square(0.3),
    outputs=square(0.3),
    sum_gap=0.05,
    mean_gap=0.05,
    conflict=0.3,
)
THREE = replace(
    PLAIN,
    names=("x", "y", "z"),
    **{name: getattr(PLAIN, name)[:1] * 3 for name in ("kinds", "ranks", "scales", "targets")},
    norms=(1.0,) * 3,
    **{name: square(0.3, 3) for name in ("cosines", "inputs", "outputs")},
    factors=square(0.9, 3),
)
ORTHOGONAL = replace(PLAIN, cosines=square(0.05))
UNSHARED = replace(PLAIN, factors=square(0.1))


def many(count):
    one = {n: getattr(PLAIN, n)[:1] * count for n in ("kinds", "ranks", "scales", "targets")}
    tall = {n: square(0.3, count) for n in ("cosines", "inputs", "outputs", "factors")}
    names = tuple(f"m{n}" for n in range(count))
    return replace(PLAIN, names=names, norms=(1.0,) * count, width=999, **one, **tall)


# A phrase of the sentence, facts under which it is said, and facts just beyond.
SIDES = [
    ("cannot be composed as they are: q: no", replace(PLAIN, misfit="q: no"), PLAIN),
    ("One module alone", many(1), PLAIN),
    (
        "They share their initialisation",
        replace(PLAIN, factors=square(0.5)),
        replace(PLAIN, factors=square(0.49)),
    ),
    (
        "They do not share their initialisation: two a's have a cosine of 0.49",
        replace(PLAIN, factors=square(0.49)),
        replace(PLAIN, factors=square(0.5)),
    ),
    ("one --init-seed", replace(UNSHARED, seeds=(3, 3)), replace(UNSHARED, seeds=(3, 4))),
    ("one --init-seed", replace(UNSHARED, seeds=(3, 3)), replace(UNSHARED, seeds=(3, None))),
    ("one --init-seed", replace(UNSHARED, seeds=(3, 3)), replace(PLAIN, seeds=(3, 3))),
    ("nearly the same in both spaces, 10% apart", replace(PLAIN, mean_gap=0.1), UNSHARED),
    ("nearly the same in both", replace(PLAIN, mean_gap=0.1), replace(PLAIN, mean_gap=0.11)),
    ("is off by 11%: take it", replace(PLAIN, mean_gap=0.11), replace(PLAIN, mean_gap=0.1)),
    ("off by 11% of the exact one", replace(PLAIN, sum_gap=0.11), replace(PLAIN, sum_gap=0.1)),
    (
        "nearly orthogonal (mean |cosine| 0.09)",
        replace(PLAIN, cosines=square(-0.09)),
        replace(PLAIN, cosines=square(0.1)),
    ),
    (
        "differ at 41% of the entries",
        replace(ORTHOGONAL, conflict=0.41),
        replace(ORTHOGONAL, conflict=0.4),
    ),
    ("elect signs by lot", replace(ORTHOGONAL, conflict=0.59), replace(ORTHOGONAL, conflict=0.6)),
    ("elect signs by lot", replace(ORTHOGONAL, conflict=0.5), replace(PLAIN, conflict=0.5)),
    (
        "much the same (cosines from 0.50)",
        replace(PLAIN, cosines=square(0.5)),
        replace(PLAIN, cosines=square(0.49)),
    ),
    (
        "`slerp` keeps the length",
        replace(PLAIN, cosines=square(0.5)),
        replace(THREE, cosines=square(0.5, 3)),
    ),
    (
        "x and y work against each other (cosine -0.11)",
        replace(PLAIN, cosines=square(-0.11)),
        replace(PLAIN, cosines=square(-0.1)),
    ),
    (
        "They read the same input directions (overlap 0.50)",
        replace(PLAIN, inputs=square(0.5)),
        replace(PLAIN, inputs=square(0.49)),
    ),
    (
        "They read different input directions (overlap 0.09)",
        replace(PLAIN, inputs=square(0.09)),
        replace(PLAIN, inputs=square(0.1)),
    ),
    (
        "strongest input directions are alike (mean |cosine| 0.50)",
        replace(PLAIN, prototypes=0.5),
        replace(PLAIN, prototypes=0.49),
    ),
    (
        "strongest input directions differ (mean |cosine| 0.49)",
        replace(PLAIN, prototypes=0.49),
        replace(PLAIN, prototypes=0.5),
    ),
    ("y is 3.0 times", replace(PLAIN, norms=(1.0, 3.0)), replace(PLAIN, norms=(1.0, 2.99))),
    ("x is inf times", replace(PLAIN, norms=(1.0, 0.0)), PLAIN),
    ("Their ranks differ", replace(PLAIN, ranks=((4,), (8,))), PLAIN),
    ("Their scales differ", replace(PLAIN, scales=((2.0,), (1.0,))), PLAIN),
    (
        "the same projections",
        replace(PLAIN, targets=(("q", "v"), ("q",))),
        replace(PLAIN, targets=(("q", "v"), ("v", "q"))),
    ),
    ("add up to 8", replace(PLAIN, width=7), replace(PLAIN, width=8)),
    ("`slerp` lies between", THREE, PLAIN),
    ("9 modules are many", many(9), many(8)),
    ("IA3 has no rank", replace(PLAIN, kinds=(("IA3",),) * 2), PLAIN),
    ("Weights kept whole", replace(PLAIN, kinds=(("LoRA", "Saved"), ("LoRA",))), PLAIN),
]


@pytest.mark.parametrize(("phrase", "said", "silent"), SIDES, ids=[phrase for phrase, *_ in SIDES])
def test_a_rule_speaks_on_one_side_of_its_threshold(phrase, said, silent):
    assert sum(phrase in sentence for sentence in explained(said)) == 1
    general = re.sub(r"-?[\d.]+%?|\binf\b", "#", phrase)
    told = [re.sub(r"-?[\d.]+%?|\binf\b", "#", sentence) for sentence in explained(silent)]
    assert not any(general in sentence for sentence in told)


def test_every_rule_is_tried_on_both_sides():
    for condition, sentence in RULES:
        said = [condition(Findings(facts)) for _, facts, _ in SIDES]
        silent = [condition(Findings(facts)) for _, _, facts in SIDES]
        assert any(said), sentence
        assert not all(silent), sentence


def test_sentences_name_methods_that_there_are():
    named = {name for _, sentence in RULES for name in re.findall(r"`(\w+)`", sentence)}
    assert named - {"mean"} <= {*METHODS} and "mean" in FUNCTIONS
    for word in ("gks", "untrained", "rescaled", "arrow", "gates", "activations"):
        assert word in FUNCTIONS and any(word in sentence for _, sentence in RULES)


def test_modules_that_do_not_fit_are_given_no_advice(lora, ia3):
    facts = measured({"x": lora(0), "y": ia3(0)})
    assert len(explained(facts)) == 1 and "cannot combine" in explained(facts)[0]


def test_what_it_says_of_modules_trained_from_one_seed_and_from_two(lora):
    shapes = {path: (2, m.a.shape[-2], m.b.shape[-1]) for path, m in lora(0).items()}

    def trained(init, noise):
        made = init_lora(jax.random.key(init), shapes, targets=list(shapes), rank=2, alpha=4.0)
        other = lora(noise, rank=2)
        return {p: m.replace(a=m.a + 0.02 * other[p].a, b=other[p].b) for p, m in made.items()}

    one = explained(measured({"x": trained(0, 1), "y": trained(0, 2)}, {"x": 0, "y": 0}))
    two = explained(measured({"x": trained(0, 1), "y": trained(1, 2)}, {"x": 0, "y": 1}))
    assert one[0].startswith("They share") and two[0].startswith("They do not share")
    assert "nearly the same in both spaces" in one[1] and "run gks(x, untrained(x))" in one[2]
