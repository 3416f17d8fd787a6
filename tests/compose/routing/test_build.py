from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose import arithmetic
from compose.arrow import route_library
from compose.library import Library, Routing, join
from compose.routing.build import factors, route
from compose.routing.directions import shared_prototypes
from compose.routing.given import oracle, with_weights
from compose.routing.settings import ACTIVATIONS, GATES, SPECTR, UNIFORM
from lora_jax.errors import InputError
from lora_jax.project import project
from lora_jax.routing import mixture, routed

QKV = [f"self_attn.{name}_proj" for name in "qkv"]
Q, K, LAST = QKV[0], QKV[1], "self_attn.o_proj"
X = jax.random.normal(jax.random.key(3), (6, 32))
LAYER = 1


def deltas(members, path):
    """Each module's delta (M, I, O) at one layer, in float64."""
    a, b = (
        [np.asarray(getattr(m[path], leaf)[LAYER], np.float64) for m in members] for leaf in "ab"
    )
    return np.stack([m[path].scale * x @ y for m, x, y in zip(members, a, b, strict=True)])


def at_layer(module):
    return jax.tree.map(lambda leaf: leaf[LAYER], module)


def added(adapter, path, x=X):
    """What a module adds at one layer."""
    module = at_layer(adapter[path])
    zero = jnp.zeros((x.shape[-1], module.b.shape[-1]))
    return project(x, zero, module=module)


def best(scores, k):
    """Which of (T, M) are the k largest of each token."""
    return scores >= np.sort(scores)[:, -k, None]


def softmax(logits, chosen):
    weights = np.where(chosen, np.exp(logits - logits.max()), 0)
    return weights / weights.sum(-1, keepdims=True)


def test_shared_prototypes_are_of_the_deltas_side_by_side(library, members):
    routed = route_library(library, prototypes="shared")
    wide = np.concatenate([deltas(members, path) for path in QKV], axis=-1)
    for path in QKV:
        found = np.asarray(routed[path].prototypes[LAYER])
        for row, delta in zip(found, wide, strict=True):
            assert abs(row @ np.linalg.svd(delta)[0][:, 0]) == pytest.approx(1, abs=1e-5)
        own = route_library(library)[path].prototypes[LAYER]
        assert (np.abs(np.sum(found * own, axis=-1)) < 0.99).any()
    own = route_library(library)[LAST].prototypes
    np.testing.assert_array_equal(routed[LAST].prototypes, own)


def test_where_a_is_tied_sharing_is_what_mttl_does(members):
    tied = [{p: m[Q].replace(b=m[p].b, scale=m[p].scale) for p in QKV} for m in members]
    routed = route_library(Library(tuple("vwxyz"), tuple(tied)), prototypes="shared")
    for row, m in zip(routed[K].prototypes[LAYER], tied, strict=True):
        b = np.concatenate([np.asarray(m[p].b[LAYER], np.float64) for p in QKV], axis=-1)
        want = np.linalg.svd(np.asarray(m[Q].a[LAYER], np.float64) @ b)[0][:, 0]
        assert abs(row @ want) == pytest.approx(1, abs=1e-5)


def test_queries_of_another_sequence_share_nothing_with_its_keys():
    block = "decoder.layer.1.EncDecAttention"
    key = jax.random.key(0)
    table = {
        f"{block}.{name}": (jax.random.normal(jax.random.fold_in(key, n), (4, 2)), jnp.ones((2, 3)))
        for n, name in enumerate("qkv")
    }
    q, k, v = shared_prototypes(table).values()
    assert (k == v).all() and not np.allclose(q, k)


@pytest.mark.parametrize("inputs", ["raw", "unit"])
def test_turned_factors_score_and_add_what_prototypes_beside_them_do(library, members, inputs):
    turned = at_layer(route_library(library, inputs=inputs, top_k=2)[Q])
    assert turned.leading
    np.testing.assert_array_equal(turned.a[..., 0], turned.prototypes)
    apart = replace(turned, leading=False)
    np.testing.assert_allclose(mixture(X, turned), mixture(X, apart), atol=1e-6)
    np.testing.assert_allclose(routed(X, turned), routed(X, apart), atol=1e-6)
    np.testing.assert_allclose(turned.a @ turned.b, deltas(members, Q), atol=1e-6)
    products = [e for e in jax.make_jaxpr(routed)(X, turned).eqns if "dot" in str(e.primitive)]
    assert [e.outvars[0].aval.shape[-1] for e in products] == [turned.a[..., 0, :].size, 32]


@pytest.mark.parametrize(
    "settings", [{"mixing": "factors"}, {"inputs": "centred"}, {"prototypes": "shared"}]
)
def test_factors_that_may_not_turn_are_the_modules_own(library, settings):
    given = factors(library.adapters)[Q]
    held = route_library(library, **settings)[Q]
    assert not held.leading
    np.testing.assert_array_equal(held.a, given[0])
    np.testing.assert_array_equal(held.b, given[1])


@pytest.mark.parametrize(
    ("inputs", "made"),
    [
        ("raw", lambda x: x),
        ("unit", lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)),
        ("centred", lambda x: x - x.mean(-1, keepdims=True)),
        ("standard", lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)),
    ],
)
def test_arrow_of_tokens_made_alike(library, members, inputs, made):
    routed = route_library(library, inputs=inputs, top_k=2, temperature=0.3)
    x = X + 0.5
    top = np.stack([np.linalg.svd(delta)[0][:, 0] for delta in deltas(members, Q)])
    logits = np.abs(made(np.asarray(x, np.float64)) @ top.T)
    want = softmax(logits / 0.3, best(logits, 2))
    np.testing.assert_allclose(mixture(x, at_layer(routed[Q])), want, atol=1e-4)


def test_the_root_of_the_width_is_each_projections_own(library):
    routed = route_library(library, temperature="sqrt(d)")
    assert {module.temperature for module in routed.values()} == {np.sqrt(32)}


@pytest.mark.parametrize("router", ["spectr", "spectr-code"])
@pytest.mark.parametrize("mixing", ["factors", "outputs"])
def test_spectr_scores_the_whole_spectrum_or_its_directions(library, members, router, mixing):
    routed = route(library, replace(SPECTR, router=router, mixing=mixing, top_k=2))
    x, whole = np.asarray(X, np.float64), deltas(members, Q)
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in whole]
    ranks = [m[Q].a.shape[-1] for m in members]
    if router == "spectr":
        scores = np.stack([np.linalg.norm(x @ delta, axis=-1) for delta in whole], axis=-1)
    else:
        kept = [
            np.linalg.norm(x @ u[:, :r], axis=-1) for (u, _, _), r in zip(parts, ranks, strict=True)
        ]
        scores = np.stack(kept, axis=-1)
    weights = best(scores, 2) / 2
    np.testing.assert_allclose(mixture(X, at_layer(routed[Q])), weights, atol=1e-6)
    if mixing == "outputs":
        want = np.einsum("TM,TI,MIO->TO", weights, x, whole)
    else:
        want = _mixed_factors(x, weights, parts, ranks)
    np.testing.assert_allclose(added(routed, Q), want, rtol=1e-3, atol=1e-3)


def _mixed_factors(x, weights, parts, ranks):
    """x·(Σ w u)·(Σ w s vᵀ), each vector of u with its largest entry positive."""
    a, b = np.zeros((5, 32, 4)), np.zeros((5, 4, parts[0][2].shape[-1]))
    for e, ((u, s, vt), rank) in enumerate(zip(parts, ranks, strict=True)):
        u, s, vt = u[:, :rank], s[:rank], vt[:rank]
        sign = np.sign(u[np.abs(u).argmax(0), np.arange(rank)])
        a[e, :, :rank], b[e, :rank] = u * sign, s[:, None] * vt * sign[:, None]
    mixed = [np.einsum("TM,M...->T...", weights, leaf) for leaf in (a, b)]
    return np.einsum("TI,TIR,TRO->TO", x, *mixed)


def test_a_spectral_form_changes_no_delta_and_has_no_ranks_of_noise(library, members):
    routed = at_layer(route(library, SPECTR)[Q])
    found = np.einsum("MIR,MRO->MIO", routed.a, routed.b)
    np.testing.assert_allclose(found, deltas(members, Q), atol=1e-4)
    filled = (np.asarray(routed.spectrum) > 0).sum(-1)
    assert filled.tolist() == [m[Q].a.shape[-1] for m in members]
    assert not np.asarray(routed.a)[1, :, 2:].any()


def test_gates_route_as_phatgoose_does(library):
    routed = route(library, GATES)
    x = np.asarray(X, np.float64)
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    v = np.stack([np.asarray(held[Q][LAYER], np.float64) for held in library.vectors["gates"]])
    v = (v - v.mean(-1, keepdims=True)) / v.std(-1, keepdims=True)
    logits = x @ v.T / np.sqrt(32)
    want = softmax(logits, best(logits, 2))
    np.testing.assert_allclose(mixture(X, at_layer(routed[Q])), want, atol=1e-4)


def test_mean_activations_route_by_their_plain_product(library):
    routed = route(library, replace(ACTIVATIONS, top_k=5))
    rows = np.stack([held[Q][LAYER] for held in library.vectors["activations"]])
    want = softmax(np.asarray(X) @ rows.T / np.sqrt(32), True)
    np.testing.assert_allclose(mixture(X, at_layer(routed[Q])), want, atol=1e-5)


@pytest.mark.parametrize("router", ["gates", "activations"])
def test_a_module_without_its_vector_is_named(library, members, router):
    lacking = join([library, Library(("late",), (members[0],))])
    with pytest.raises(
        InputError, match=f"{router} needs a vector .* late has none at self_attn.q"
    ):
        route(lacking, Routing(router=router))
    with pytest.raises(InputError, match=r"v has none at .*; w has none at"):
        route(library.replace(vectors={}), Routing(router=router))


@pytest.mark.parametrize(("mixing", "space"), [("outputs", "delta"), ("factors", "factor")])
def test_uniform_routing_is_the_mean(library, members, mixing, space):
    routed = route(library, replace(UNIFORM, mixing=mixing))
    mean = arithmetic.average(members, space=space)
    np.testing.assert_allclose(added(routed, Q), added(mean, Q), rtol=1e-3, atol=1e-4)


def test_an_oracle_names_the_module_of_all_or_of_each_row(library, members):
    np.testing.assert_allclose(
        added(oracle(library, "x"), Q), added(members[2], Q), rtol=1e-4, atol=1e-4
    )
    rows = jnp.stack([X, X + 1, X - 1])
    found = added(oracle(library, ["z", "v", "z"]), Q, rows)
    for y, x, number in zip(found, rows, (4, 0, 4), strict=True):
        np.testing.assert_allclose(y, added(members[number], Q, x), rtol=1e-4, atol=1e-3)
    with pytest.raises(InputError, match="no module nobody; there are v, w, x, y, z"):
        oracle(library, ["v", "nobody"])


def test_weights_that_do_not_fit_are_refused(library):
    with pytest.raises(
        InputError, match=r"weights must be \(M,\) or \(B, M\), M being 5; got \(4,\)"
    ):
        with_weights(library, jnp.ones(4))
    with pytest.raises(InputError, match=r"top_k must lie between 1 and .* 5 modules; got 6"):
        with_weights(library, jnp.ones(5), top_k=6)
    with pytest.raises(InputError, match="unknown mixing 'sums'"):
        with_weights(library, jnp.ones(5), mixing="sums")


def test_an_embedding_is_not_routed(members):
    with_embedding = {**members[0], "embed": members[0][Q]}
    with pytest.raises(InputError, match="the embedding cannot be routed; leave embed_tokens out"):
        route(Library(("v",), (with_embedding,)), Routing(top_k=1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"router": "arow"}, "unknown router 'arow'; choose arrow or spectr"),
        ({"inputs": "whole"}, "unknown inputs 'whole'; choose raw or unit or centred or standard"),
        ({"temperature": "hot"}, r"temperature must be a number or sqrt\(d\); got 'hot'"),
        (
            {"temperature": -1.0, "top_k": 9},
            "temperature must be above 0; got -1; top_k .* 5 modules; got 9",
        ),
        ({"router": "gates", "prototypes": "shared"}, "shared by arrow alone; gates takes own"),
        ({"router": "spectr", "inputs": "unit"}, "spectr takes raw inputs; got 'unit'"),
        ({"weighting": "sigmoid"}, "unknown weighting 'sigmoid'; choose softmax or uniform"),
    ],
)
def test_settings_that_make_no_sense_are_named(library, settings, words):
    with pytest.raises(InputError, match=words):
        route(library, Routing(**settings))
