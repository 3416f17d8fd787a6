"""What is measured of modules, against dense NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from compose.diagnose import alignment
from compose.facts import measured
from compose.library import Library
from compose.similarity import similarity
from lora_jax.errors import InputError
from lora_jax.modules import Experts, LoRA, Saved

Q, UP = "self_attn.q_proj", "mlp.up_proj"


def test_what_modules_are_is_told(lora, ia3):
    facts = measured(
        {"x": lora(0), "y": lora(1, rank=2, scale=0.5, paths=(Q,)), "z": ia3(0, on="input")},
        {"x": 3, "z": None},
    )
    assert facts.kinds == (("LoRA",), ("LoRA",), ("IA3",))
    assert facts.ranks == ((3,), (2,), ()) and facts.scales == ((2.0,), (0.5,), ())
    assert facts.targets == ((Q, UP), (Q,), (UP,)) and facts.width == 5
    assert facts.seeds == (3, None, None)
    assert UP in facts.misfit and facts.cosines is None and facts.norms == ()


def test_norms_cosines_and_overlaps_are_the_librarys(lora, dense):
    x, y = lora(0), lora(1, rank=2)
    facts = measured({"x": x, "y": y})
    sizes = [np.sqrt(sum((d**2).sum() for d in dense(m).values())) for m in (x, y)]
    np.testing.assert_allclose(facts.norms, sizes, rtol=1e-5)
    library = Library(("x", "y"), (x, y))
    np.testing.assert_array_equal(facts.cosines, similarity(library).overall)
    np.testing.assert_array_equal(facts.inputs, similarity(library, "input").overall)
    assert facts.prototypes == alignment(library) > 0
    np.testing.assert_array_equal(facts.outputs, similarity(library, "output").overall)


def test_cosines_of_factors_are_of_projections_that_both_change(lora):
    x, y, alone = lora(0), lora(1, rank=2), lora(2, paths=(UP,))
    facts = measured({"x": x, "y": y, "alone": alone, "none": {}})
    size = np.linalg.norm

    def wanted(one, other, paths):
        flat = [
            np.concatenate([np.ravel(np.pad(m[p].a, [(0, 0)] * 2 + [(0, 3 - m[p].a.shape[-1])]))
                            for p in paths]) for m in (one, other)
        ]  # fmt: skip
        return flat[0] @ flat[1] / size(flat[0]) / size(flat[1])

    np.testing.assert_allclose(facts.factors[0, 1], wanted(x, y, (Q, UP)), rtol=1e-5)
    np.testing.assert_allclose(facts.factors[1, 2], wanted(y, alone, (UP,)), rtol=1e-5)
    np.testing.assert_allclose(np.diag(facts.factors), [1, 1, 1, 0], atol=1e-6)


def test_gaps_are_those_between_dense_results(lora):
    x, y = lora(0, scale=1.0), lora(1, scale=1.0)
    facts = measured({"x": x, "y": y})
    for name, weight in (("sum_gap", 1.0), ("mean_gap", 0.5)):
        exact = [weight * (x[p].a @ x[p].b + y[p].a @ y[p].b) for p in x]
        factor = [weight**2 * (x[p].a + y[p].a) @ (x[p].b + y[p].b) for p in x]
        off = sum(((f - e) ** 2).sum() for f, e in zip(factor, exact, strict=True))
        whole = sum((e**2).sum() for e in exact)
        assert getattr(facts, name) == pytest.approx(float(jnp.sqrt(off / whole)), rel=1e-4)


def test_conflict_counts_opposite_signs_where_both_change_something(lora, ia3, dense):
    x, y = lora(0), lora(1, scale=-1.0, paths=(Q,))
    signs = np.sign(dense(x)[Q]) * np.sign(dense(y)[Q])
    assert measured({"x": x, "y": y}).conflict == pytest.approx((signs < 0).mean())
    flipped = {p: m.replace(b=-m.b) for p, m in x.items()}
    assert measured({"x": x, "flipped": flipped}).conflict == 1
    assert measured({"x": x, "same": x}).conflict == 0
    half = {UP: ia3(0)[UP].replace(offset=ia3(0)[UP].offset.at[1].multiply(-1))}
    assert measured({"x": ia3(0), "half": half}).conflict == pytest.approx(0.5)


def test_whole_weights_are_left_out_and_one_module_is_enough(lora):
    head = Saved(jnp.ones((4, 3)))
    facts = measured({"x": {**lora(0), "head": head}, "y": lora(1)})
    assert facts.kinds[0] == ("LoRA", "Saved") and not facts.misfit and facts.conflict > 0
    assert measured({"x": lora(0)}).cosines.shape == (1, 1)


def test_what_cannot_be_added_is_told(lora):
    x = lora(0)
    biased = {Q: x[Q].replace(bias=jnp.ones((2, 6)))}
    assert "biased: self_attn.q_proj" in measured({"x": x, "biased": biased}).misfit
    routed = {Q: Experts(jnp.ones((2, 3, 7, 2)), jnp.ones((2, 3, 2, 6)), jnp.ones((2, 3, 7)))}
    assert "holds Experts" in measured({"x": x, "r": routed}).misfit
    other = {Q: LoRA(jnp.ones((2, 9, 2)), jnp.ones((2, 2, 6)))}
    assert "cannot combine" in measured({"x": x, "other": other}).misfit
    with pytest.raises(InputError, match="no module"):
        measured({})
