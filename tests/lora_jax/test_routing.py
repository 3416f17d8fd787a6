import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import selected
from lora_jax.modules import Experts
from lora_jax.routing import mixture, route, routed, routed_all

COUNT, IN, OUT, RANK = 12, 16, 10, 3
KEYS = jax.random.split(jax.random.key(1), 4)
X = jax.random.normal(KEYS[0], (2, 7, IN))


def library(top_k=3, temperature=1.0, mixing="outputs", count=COUNT):
    prototypes = jax.random.normal(KEYS[3], (count, IN))
    return Experts(
        jax.random.normal(KEYS[1], (count, IN, RANK)),
        jax.random.normal(KEYS[2], (count, RANK, OUT)),
        prototypes / jnp.linalg.norm(prototypes, axis=-1, keepdims=True),
        top_k,
        temperature,
        mixing,
    )


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 9, 12])
def test_weights_sum_to_one_over_exactly_the_best_aligned(top_k):
    prototypes = library().prototypes
    weights = route(X, prototypes, top_k)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    alignment = np.abs(X @ prototypes.T)
    best = alignment >= np.sort(alignment)[..., -top_k, None]
    assert ((weights > 0) == best).all()


def test_weights_are_the_softmax_of_the_alignment_at_the_temperature():
    prototypes = library().prototypes
    logits = np.abs(X @ prototypes.T) / 0.4
    np.testing.assert_allclose(
        route(X, prototypes, COUNT, 0.4), jax.nn.softmax(logits), rtol=1e-4, atol=1e-7
    )


def test_a_prototypes_sign_does_not_matter():
    prototypes = library().prototypes
    signs = jnp.where(jnp.arange(COUNT) % 2, 1, -1)[:, None]
    assert (route(X, prototypes, 3) == route(X, prototypes * signs, 3)).all()


@pytest.mark.parametrize("count", [4, 12])
def test_a_tie_before_the_last_place_leaves_out_the_rest(count):
    # Two experts point the same way, as a module and its negation do: they fill both places.
    prototypes = jnp.eye(IN)[:count].at[1].set(-jnp.eye(IN)[0])
    x = jnp.arange(IN, 0, -1.0)
    weights = route(x, prototypes, 2)
    np.testing.assert_allclose(weights[:2], 0.5, rtol=1e-6)
    assert not weights[2:].any()


@pytest.mark.parametrize("top_k", [2, 9])
def test_a_token_of_zeros_is_mixed_evenly_and_finitely(top_k):
    weights = route(jnp.zeros(IN), library().prototypes, top_k)
    np.testing.assert_allclose(weights, 1 / COUNT, rtol=1e-6)


def naive(x, experts):
    """Every expert's output, or every token's own factors, in full."""
    weights = route(x, experts.prototypes, experts.top_k, experts.temperature)
    if experts.mixing == "outputs":
        outputs = jnp.einsum("BTI,MIR,MRO->BTMO", x, experts.a, experts.b)
        return jnp.einsum("BTM,BTMO->BTO", weights, outputs)
    a = jnp.einsum("BTM,MIR->BTIR", weights, experts.a)
    b = jnp.einsum("BTM,MRO->BTRO", weights, experts.b)
    return jnp.einsum("BTI,BTIR,BTRO->BTO", x, a, b)


@pytest.mark.parametrize("mixing", ["outputs", "factors"])
@pytest.mark.parametrize("top_k", [1, 3, 12])
def test_thin_products_equal_the_naive_mixture(mixing, top_k):
    experts = library(top_k, 0.7, mixing)
    np.testing.assert_allclose(routed(X, experts), naive(X, experts), rtol=1e-4, atol=1e-4)


def test_the_two_mixings_differ_and_agree_where_one_expert_takes_all():
    outputs, factors = library(3), library(3, mixing="factors")
    assert not np.allclose(routed(X, outputs), routed(X, factors), atol=0.1)
    outputs, factors = library(1), library(1, mixing="factors")
    np.testing.assert_allclose(routed(X, outputs), routed(X, factors), rtol=1e-5)


def test_the_array_of_every_experts_output_never_exists():
    experts = library()
    jaxpr = jax.make_jaxpr(lambda x: routed(x, experts))(X)
    sizes = [v.aval.size for e in jaxpr.jaxpr.eqns for v in e.outvars]
    assert max(sizes) < X.size // IN * COUNT * OUT


def test_gradients_through_the_router_are_finite_and_reach_the_prototypes():
    def loss(prototypes):
        return jnp.sum(routed(X, library().replace(prototypes=prototypes)) ** 2)

    gradient = jax.jit(jax.grad(loss))(library().prototypes)
    assert jnp.isfinite(gradient).all() and gradient.any()


def test_bfloat16_tokens_route_in_float32():
    experts = library()
    assert route(X.astype(jnp.bfloat16), experts.prototypes, 3).dtype == jnp.float32
    assert routed(X.astype(jnp.bfloat16), experts).dtype == jnp.bfloat16


def reference(x, experts):
    """Every form of routing, token by token, in float64."""
    x = np.asarray(x, np.float64)
    a, b = np.asarray(experts.a, np.float64), np.asarray(experts.b, np.float64)
    if experts.spectrum is not None:
        inner = np.einsum("I,MIR->MR", x, a) * np.asarray(experts.spectrum, np.float64)
        scores = np.sqrt((inner**2).sum(-1))
    else:
        scale = {"raw": 1.0, "unit": np.linalg.norm(x), "standard": x.std()}[experts.inputs]
        scores = np.asarray(experts.prototypes, np.float64) @ x / scale
        scores = np.abs(scores) if experts.score == "absolute" else scores
    if experts.weighting == "sigmoid":
        weights = 1 / (1 + np.exp(-scores))
    else:
        best = np.argsort(-scores)[: experts.top_k]
        weights = np.zeros(len(scores))
        heat = 0 * scores if experts.weighting == "uniform" else scores / experts.temperature
        weights[best] = np.exp(heat[best]) / np.exp(heat[best]).sum()
    if experts.mixing == "outputs":
        return weights, np.einsum("M,I,MIR,MRO->O", weights, x, a, b)
    return weights, x @ np.einsum("M,MIR->IR", weights, a) @ np.einsum("M,MRO->RO", weights, b)


FORMS = {
    "raw": {},
    "unit": {"inputs": "unit", "temperature": 0.2},
    "standard": {"inputs": "standard", "score": "signed", "temperature": 4.0},
    "even": {"weighting": "uniform"},
    "gates": {"weighting": "sigmoid", "score": "signed", "top_k": 1},
    "spectrum": {"prototypes": None, "spectrum": jnp.abs(library().b[..., 0])},
    "even spectrum": {
        "prototypes": None,
        "spectrum": jnp.abs(library().b[..., 0]),
        "weighting": "uniform",
    },
}


@pytest.mark.parametrize("mixing", ["outputs", "factors"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_what_its_formula_says(form, mixing):
    experts = library(mixing=mixing).replace(**FORMS[form])
    found, weights = routed(X, experts), mixture(X, experts)
    want = [[reference(x, experts) for x in row] for row in X]
    np.testing.assert_allclose(weights, [[w for w, _ in row] for row in want], atol=1e-5)
    np.testing.assert_allclose(found, [[y for _, y in row] for row in want], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixing", ["outputs", "factors"])
@pytest.mark.parametrize("lead", [(), (2,)], ids=["for all", "by example"])
def test_given_weights_mix_as_they_are(lead, mixing):
    shares = jax.random.uniform(KEYS[0], (*lead, COUNT))
    experts = library(mixing=mixing).replace(prototypes=None, shares=shares, top_k=COUNT)
    rows = np.broadcast_to(shares, (2, COUNT)) if not lead else shares
    np.testing.assert_allclose(mixture(X, experts), np.repeat(rows[:, None], 7, 1), rtol=1e-6)
    for row, x, y in zip(rows, X, routed(X, experts), strict=True):
        if mixing == "outputs":
            want = np.einsum("M,TI,MIR,MRO->TO", row, x, experts.a, experts.b)
        else:
            a, b = (np.einsum("M,M...->...", row, leaf) for leaf in (experts.a, experts.b))
            want = x @ a @ b
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-3)


def test_a_spectrum_has_finite_gradients_where_a_module_is_nothing():
    experts = library(mixing="outputs").replace(**FORMS["spectrum"])
    experts = experts.replace(a=experts.a.at[0].set(0), b=experts.b.at[0].set(0), top_k=COUNT)
    found = jax.grad(lambda x: jnp.sum(routed(x, experts) ** 2))(X)
    assert jnp.isfinite(found).all() and found.any()


def test_sums_of_bfloat16_tokens_make_no_ties():
    # In bfloat16 itself, 256 and 256.5 are one number.
    prototypes = jnp.eye(4)[:3] + jnp.eye(4)[3] * jnp.array([[0.0], [1.0], [0.0]])
    x = jnp.array([256.0, 256.0, 0.0, 0.5], jnp.bfloat16)
    assert (route(x, prototypes, 1) == jnp.array([0, 1, 0])).all()


@pytest.mark.parametrize("choice", [False, True])
def test_libraries_of_one_input_add_together_what_each_adds_alone(choice, monkeypatch):
    plain = library(2)
    spectral = plain.replace(prototypes=None, spectrum=jnp.ones((COUNT, RANK)), top_k=3)
    given = plain.replace(prototypes=None, shares=jnp.arange(1.0, COUNT + 1))
    leading = library(count=30).replace(mixing="factors", leading=True)
    leading = leading.replace(prototypes=leading.a[..., 0])
    many = [plain, leading, given, spectral, library(1, count=4)]
    monkeypatch.setattr(selected, "worthwhile", lambda *_: choice)
    for together, experts in zip(routed_all(X, many), many, strict=True):
        np.testing.assert_allclose(together, routed(X, experts), rtol=1e-4, atol=1e-4)


def test_libraries_of_one_input_meet_it_in_one_product():
    many = [library(), library(2), library(count=40)]
    products = [
        e.invars[1].aval.shape
        for e in jax.make_jaxpr(lambda x: routed_all(x, many))(X).eqns
        if e.primitive.name == "dot_general" and e.invars[0].aval.shape[-1] == IN
    ]
    wide = sum(e.a.shape[0] * (RANK + 1) for e in many)
    assert products == [(IN, wide + -wide % 64)]
