import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import selected
from lora_jax.modules import Experts
from lora_jax.routing import routed

FORMS = {
    "arrow": {},
    "unit": {"inputs": "unit", "score": "signed", "temperature": 0.3},
    "even": {"weighting": "uniform"},
    "spectrum": {"prototypes": None, "spectrum": True},
    "for all": {"prototypes": None, "shares": ()},
    "by example": {"prototypes": None, "shares": (3,)},
}


def make(form="arrow", count=9, top_k=3, size=(7, 5), rank=2, mixing="outputs", seed=0):
    """Random experts of one form, whose best are far enough apart."""
    keys = jax.random.split(jax.random.key(seed), 5)
    told = dict(FORMS[form])
    if "spectrum" in told:
        told["spectrum"] = jax.random.uniform(keys[3], (count, rank))
    if "shares" in told:
        drawn = jax.random.uniform(keys[4], (*told["shares"], count))
        told["shares"] = jnp.where(drawn >= jnp.sort(drawn)[..., -top_k, None], drawn, 0)
    a = jax.random.normal(keys[0], (count, size[0], rank))
    b = jax.random.normal(keys[1], (count, rank, size[1]))
    prototypes = jax.random.normal(keys[2], (count, size[0]))
    return Experts(a, b, prototypes, top_k, mixing=mixing).replace(**told)


def tokens(*shape, seed=9):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def both(monkeypatch):
    """A function to what another gives with all experts computed, and with the chosen alone."""

    def run(function, *arguments):
        found = []
        for choice in (False, True):
            monkeypatch.setattr(selected, "worthwhile", lambda *_, choice=choice: choice)
            found.append(jax.jit(lambda *args: function(*args))(*arguments))
        return found

    return run


@pytest.mark.parametrize("mixing", ["outputs", "factors"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [1, 1 << 20], ids=["in blocks", "at once"])
def test_the_chosen_alone_give_what_all_give(both, monkeypatch, form, mixing, block):
    monkeypatch.setattr(selected, "_BLOCK", {"cpu": 300 * block, "default": 1 << 20})
    experts, x = make(form, mixing=mixing), tokens(3, 5, 7)
    dense, sparse = both(routed, x, experts)
    np.testing.assert_allclose(sparse, dense, rtol=1e-5, atol=1e-5)
    assert np.abs(dense).max() > 0.1


@settings(max_examples=8, deadline=None)
@given(
    count=st.integers(2, 12),
    share=st.floats(0, 1),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    length=st.integers(1, 11),
    mixing=st.sampled_from(["outputs", "factors"]),
    seed=st.integers(0, 99),
)
def test_whatever_the_sizes(count, share, sizes, length, mixing, seed):
    top_k = 1 + round(share * (count - 1))
    experts = make("arrow", count, top_k, sizes[:2], sizes[2], mixing, seed)
    x = tokens(length, sizes[0], seed=seed)
    scores = np.sort(np.abs(x @ experts.prototypes.T))
    if top_k < count and (np.diff(scores, axis=-1) < 1e-4).any():
        return  # too close to tell apart in both
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for choice in (False, True):
            patch.setattr(selected, "worthwhile", lambda *_, choice=choice: choice)
            found.append(jax.jit(lambda *args: routed(*args))(x, experts))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["arrow", "spectrum"])
def test_under_jit_vmap_and_a_scan_over_layers(both, form):
    made = [make(form, size=(7, 7), seed=seed) for seed in range(3)]
    layers, x = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made), tokens(4, 7)

    def walked(x, layers):
        return jax.lax.scan(lambda x, e: (x + 0.1 * routed(x, e), None), x, layers)[0]

    def by_library(x, layers):
        return jax.vmap(routed, (None, 0))(x, layers)

    def by_row(x, layers):
        return jax.vmap(routed, (0, None))(x, jax.tree.map(lambda leaf: leaf[0], layers))

    for function in (walked, by_library, by_row):
        dense, sparse = both(function, x, layers)
        np.testing.assert_allclose(sparse, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["arrow", "spectrum"])
def test_gradients_of_tokens_and_experts_are_the_same(both, form):
    experts, x = make(form), tokens(3, 5, 7)

    def loss(x, experts):
        return jnp.sum(jnp.sin(routed(x, experts)))

    dense, sparse = both(jax.grad(loss, (0, 1)), x, experts)
    jax.tree.map(lambda s, d: np.testing.assert_allclose(s, d, rtol=1e-4, atol=1e-4), sparse, dense)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(sparse))


def test_what_is_not_chosen_gets_no_gradient_for_its_share(both):
    experts, x = make("by example"), tokens(3, 5, 7)

    def loss(shares):
        return jnp.sum(jnp.sin(routed(x, experts.replace(shares=shares))))

    dense, sparse = both(jax.grad(loss), experts.shares)
    np.testing.assert_allclose(sparse, np.where(experts.shares > 0, dense, 0), atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_in_bfloat16(both, form):
    experts, x = make(form), tokens(3, 5, 7).astype(jnp.bfloat16)
    dense, sparse = both(routed, x, experts)
    assert dense.dtype == sparse.dtype == jnp.bfloat16
    gap = np.abs(np.asarray(sparse - dense, np.float32)).max()
    assert gap < 0.03 * np.abs(np.asarray(dense, np.float32)).max()


def test_of_ties_for_the_last_place_the_first_take_part(both):
    experts, x = make(top_k=2), jnp.zeros((1, 7)).at[0, 0].set(1.0)
    experts = experts.replace(
        prototypes=jnp.zeros((9, 7)).at[:, 0].set(jnp.array([3.0] + [1.0] * 8))
    )
    dense, sparse = both(routed, x, experts)
    assert not np.allclose(dense, sparse, atol=1e-2)
    weights = jax.nn.softmax(jnp.array([3.0, 1.0]))
    want = sum(w * x @ experts.a[e] @ experts.b[e] for e, w in enumerate(weights))
    np.testing.assert_allclose(sparse, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("count", "top_k", "shape", "alone"),
    [
        (10, 3, (512,), False),
        (32, 3, (8, 128), False),
        (256, 3, (512,), True),
        (1000, 3, (8, 128), True),
        (1000, 1000, (512,), False),
        (1000, 64, (512,), False),
        (100, 3, (1,), True),  # a step of generation reads no more than it must
        (10, 3, (1,), True),
    ],
)
def test_the_choice_is_made_by_sizes_alone(count, top_k, shape, alone):
    experts = jax.eval_shape(lambda: make(count=count, top_k=top_k))
    assert selected.worthwhile((*shape, 7), experts) == alone


def test_gates_and_mixtures_of_all_are_computed_whole():
    assert not selected.worthwhile((1, 7), make(top_k=1).replace(weighting="sigmoid"))
    assert not selected.worthwhile((1, 7), make("for all", top_k=9))
    assert selected.worthwhile((512, 7), make("for all", top_k=1))


def test_no_factors_are_copied_for_experts_that_were_not_chosen(monkeypatch):
    monkeypatch.setattr(selected, "worthwhile", lambda *_: True)
    experts, x = make(count=50, top_k=2, rank=3), tokens(4, 7)
    jaxpr = str(jax.make_jaxpr(lambda x: routed(x, experts))(x))
    assert "f32[4,150]" not in jaxpr and "f32[4,50]" in jaxpr
