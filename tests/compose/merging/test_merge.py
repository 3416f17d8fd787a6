"""Whole adapters merged: both spaces, ragged ranks, unequal scales, missing projections, layers."""

import re
from inspect import getdoc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose import arithmetic
from compose.merging import layers, members
from compose.merging.elementwise import ELEMENTWISE
from compose.merging.merge import merge
from compose.merging.methods import METHODS, SUMS, VECTOR, function_of, options_of
from lora_jax.errors import InputError
from lora_jax.modules import IA3, DoRA, LoRA, Saved

Q, UP = "self_attn.q_proj", "mlp.up_proj"


@pytest.fixture(scope="module")
def ragged(lora):
    """Three adapters of unequal ranks and scales, of which one leaves a projection alone."""
    return [lora(0, rank=1), lora(1, rank=2, scale=-0.5, paths=(UP,)), lora(2, rank=3, scale=1.0)]


def tensors(adapters, dense, path):
    """The adapters' dense deltas (M, N, I, O), zeros where there is none."""
    found = [dense(adapter).get(path) for adapter in adapters]
    like = next(x for x in found if x is not None)
    return jnp.asarray([np.zeros_like(like) if x is None else x for x in found], jnp.float32)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties"])
def test_deltas_are_merged_layer_by_layer_and_brought_to_a_rank(ragged, dense, far, method):
    weights, members = jnp.array([1.0, 0.5, 2.0]), tensors(ragged, dense, UP)
    whole, none_lost = merge(ragged, method, weights=weights, rank=9, density=0.5)
    short, errors = merge(ragged, method, weights=weights, rank=2, density=0.5)
    for layer in range(2):
        wanted = ELEMENTWISE[method](members[:, layer], weights, density=0.5)
        assert far(dense(whole)[UP][layer], wanted) < 1e-5
        s = np.linalg.svd(wanted, compute_uv=False)
        lost = np.linalg.norm(s[2:]) / np.linalg.norm(s)
        assert abs(far(dense(short)[UP][layer], wanted) - lost) < 1e-5
        np.testing.assert_allclose(errors[UP][layer], lost, atol=1e-5)
    assert short[UP].a.shape[-1] == 2 and none_lost[UP].max() < 1e-5


def test_the_usual_rank_is_the_sum_of_the_ranks(ragged):
    found, _ = merge(ragged, "ties", density=0.5)
    assert {path: m.a.shape[-1] for path, m in found.items()} == {Q: 4, UP: 5}


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_weighted_sums_are_exact_and_take_whole_weights(ragged, dense, far, method):
    weights = [1.0, -0.5, 2.0]
    head = [
        {**adapter, "score": Saved(jnp.full((4, 2), float(n)))} for n, adapter in enumerate(ragged)
    ]
    found, errors = merge(head, method, weights=weights)
    np.testing.assert_allclose(found.pop("score").value, 3.5)
    exact = arithmetic.delta_sum(ragged, weights)
    for path in (Q, UP):
        lost = far(dense(found)[path], dense(exact)[path])
        assert lost < 1e-6 if method != "svd" else found[path].a.shape[-1] == 3
        assert errors[path].shape == (2,)
    exact_at_five, _ = merge(ragged, "svd", weights=weights, rank=5)
    assert far(dense(exact_at_five)[UP], dense(exact)[UP]) < 1e-5


def test_factors_are_merged_with_the_roots_of_weights_and_scales(lora, dense, far):
    """As PEFT does: a's weights bear the sign; a lone module keeps its delta times its weight."""
    x, y = lora(0, rank=2, scale=2.0), lora(1, rank=2, scale=0.5)
    found, _ = merge([x, y], "linear", weights=[0.5, -3.0], space="factor")
    for path in (Q, UP):
        a = x[path].a - np.sqrt(1.5) * y[path].a
        b = x[path].b + np.sqrt(1.5) * y[path].b
        assert far(dense(found)[path], np.einsum("NIR,NRO->NIO", a, b)) < 1e-6
        assert found[path].scale == 1
    alone, _ = merge([x], "linear", weights=[-0.7], space="factor")
    assert far(dense(alone)[Q], -0.7 * dense(x)[Q]) < 1e-6


def test_means_of_factors_have_their_scales_in_them(lora, dense, far):
    """Equal modules under unequal scales: their mean is the module, whatever the weights."""
    x = lora(0, rank=2, scale=2.0)
    same = {path: m.replace(b=m.b * 4, a=m.a / 4) for path, m in x.items()}
    for method in ("ties_mergekit", "slerp"):
        found, _ = merge([x, x], method, weights=[0.3, 0.3], space="factor")
        grown = 1 if method == "ties_mergekit" else 0.3
        assert far(dense(found)[Q], grown * dense(x)[Q]) < 1e-5
    information = [jax.tree.map(jnp.ones_like, m) for m in (x, same)]
    found, _ = merge([x, same], "fisher", space="factor", fishers=information)
    wanted = LoRA((x[Q].a + same[Q].a) / 2, (x[Q].b + same[Q].b) / 2, 2.0)
    assert far(dense(found)[Q], dense({Q: wanted})[Q]) < 1e-6


def test_fisher_in_delta_space_takes_low_rank_information(ragged, dense, far):
    information = [
        {p: LoRA(jnp.abs(m.a[..., :1]), jnp.abs(m.b[..., :1, :])) for p, m in adapter.items()}
        for adapter in ragged
    ]
    found, _ = merge(ragged, "fisher", rank=9, fishers=information)
    xs, fs = (np.asarray(tensors(some, dense, UP)) for some in (ragged, information))
    assert far(dense(found)[UP], (fs * xs).sum(0) / fs.sum(0)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("space", ["delta", "factor"])
def test_one_module_at_weight_one_is_itself(lora, dense, far, method, space):
    one = lora(0, rank=2, scale=-0.5, paths=(UP,))
    more = {"fishers": [jax.tree.map(jnp.ones_like, one)]} if method == "fisher" else {}
    if space == "factor" and method not in (*ELEMENTWISE, "linear"):
        with pytest.raises(InputError, match=f"{method} works on deltas"):
            merge([one], method, space=space)
        return
    found, errors = merge([one], method, space=space, **more)
    assert far(dense(found)[UP], dense(one)[UP]) < 1e-5
    assert np.max(errors[UP]) < 1e-5


def test_slerp_of_factors_keeps_a_weights_size_and_sign(lora, dense, far):
    one = lora(0, rank=2, scale=-0.5, paths=(UP,))
    for weight in (0.5, -0.7):
        found, _ = merge([one], "slerp", weights=[weight], space="factor")
        assert far(dense(found)[UP], weight * dense(one)[UP]) < 1e-5


@pytest.mark.parametrize("method", [m for m in METHODS if m in (*SUMS, *VECTOR)])
def test_one_ia3_at_weight_one_is_itself(ia3, method):
    one = ia3(0)
    more = {"fishers": [jax.tree.map(jnp.ones_like, one)]} if method == "fisher" else {}
    found, _ = merge([one], method, **more)
    np.testing.assert_allclose(found[UP].offset, one[UP].offset, rtol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "della", "breadcrumbs_ties"])
def test_no_model_of_dense_deltas_is_held(method, monkeypatch):
    monkeypatch.setattr(members, "BLOCK", 2**14)
    wide = {UP: LoRA(jnp.ones((2, 300, 2)), jnp.ones((2, 2, 500)))}
    text = str(jax.make_jaxpr(lambda m: merge([m] * 3, method, density=0.5, rank=2))(wide))
    assert "300,500]" in text or "500,300]" in text  # one layer's
    for lead in ("2", "3", "2,3", "3,2"):
        assert f"[{lead},300,500]" not in text and f"[{lead},500,300]" not in text


def test_another_number_compiles_nothing_anew(lora, dense, far):
    one = {UP: lora(0, rank=2, paths=(UP,))[UP]}
    for method, option, values in (
        ("ties", "density", (0.29, 0.57)),
        ("breadcrumbs", "gamma", (0.1, 0.2)),
        ("slerp", "t", (0.2, 0.7)),
        ("della", "epsilon", (0.1, 0.3)),
        ("svc", "alpha", (0.1, 0.5)),
    ):
        rest = {"density": 0.5} if method in ("breadcrumbs", "della") else {}
        merge([one, one], method, **rest, **{option: values[0]})
        before = layers._run._cache_size()
        merge([one, one], method, **rest, **{option: values[1]})
        assert layers._run._cache_size() == before


def test_a_density_is_counted_in_full_precision(lora, dense):
    entries = {UP: LoRA(jnp.arange(1.0, 101).reshape(1, 10, 10), jnp.eye(10)[None])}
    for density, count in ((0.29, 28), (0.57, 56), (0.3, 30)):  # as PEFT's int(density * 100)
        found, _ = merge([entries], "magnitude_prune", density=density)
        assert np.count_nonzero(np.abs(dense(found)[UP]) > 0.5) == count


def test_every_method_names_its_paper():
    for method in METHODS:
        for space in ("delta", "factor"):
            if space == "delta" or method in (*SUMS, *ELEMENTWISE):
                assert re.search(r"\d{4}\.\d{5}|SIGGRAPH", getdoc(function_of(method, space)))


@pytest.mark.parametrize("method", [m for m in ELEMENTWISE if m != "fisher"])
def test_ia3_is_merged_by_its_offsets(ia3, method):
    options = {"density": 0.5} if "density" in options_of(method) else {}
    adapters = [ia3(0), {}] if method == "slerp" else [ia3(0), {}, ia3(1)]
    found, errors = merge(adapters, method, seed=1, **options)
    assert isinstance(found[UP], IA3) and found[UP].offset.shape == (2, 9) and not errors
    if not any(word in method for word in ("dare", "della")):
        offsets = jnp.stack([a[UP].offset if a else jnp.zeros((2, 9)) for a in adapters])
        wanted = ELEMENTWISE[method](offsets[:, 1], jnp.ones(len(adapters)), **options)
        np.testing.assert_allclose(found[UP].offset[1], wanted, atol=1e-6)


def test_weights_may_be_one_a_layer_or_by_projection(ragged, dense, far):
    by_layer = [jnp.array([1.0, 2.0]), 0.5, {UP: 3.0}]
    found, _ = merge(ragged, "ties", weights=by_layer, rank=9, density=0.5)
    for path, third in ((UP, 3.0), (Q, 0.0)):
        members = tensors(ragged, dense, path)[:, 1]
        weights = jnp.array([2.0, 0.5, third])
        wanted = ELEMENTWISE["ties"](members, weights, density=0.5)
        assert far(dense(found)[path][1], wanted) < 1e-5


def test_chance_depends_on_the_seed_the_layer_and_the_projection(lora):
    x = {path: jax.tree.map(jnp.ones_like, m) for path, m in lora(0, rank=1).items()}
    x["other"] = x[UP]
    found = [merge([x], "dare_linear", density=0.5, rank=5, seed=n)[0] for n in (0, 0, 1)]
    one, again, other = ([np.asarray(m.a @ m.b) for m in f.values()] for f in found)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert all(np.abs(x - y).max() > 0.5 for x, y in zip(one, other, strict=True))
    assert np.abs(one[1][0] - one[1][1]).max() > 0.5 and np.abs(one[1] - one[2]).max() > 0.5


def test_types_stay_and_projections_without_layers_are_merged(lora, dense, far):
    half = {UP: jax.tree.map(lambda x: x[0].astype(jnp.bfloat16), lora(0, layers=1)[UP])}
    for space in ("delta", "factor"):
        found, errors = merge([half], "ties", space=space)
        assert found[UP].a.dtype == found[UP].b.dtype == jnp.bfloat16 and errors[UP].shape == ()
        assert far(dense(found)[UP], dense(half)[UP]) < 0.02


def test_it_jits_vmaps_and_differentiates_over_weights_and_numbers(lora):
    x, y = lora(0, rank=2, paths=(UP,)), lora(1, rank=2, paths=(UP,))

    def size(weights, density):
        for_b = merge([x, y], "ties", weights=weights, rank=3, density=density)[0][UP]
        return jnp.sum((for_b.a @ for_b.b) ** 2)

    weights, density = jnp.array([1.0, 0.5]), jnp.array([0.4, 0.8])
    sizes = jax.jit(jax.vmap(size, (None, 0)))(weights, density)
    np.testing.assert_allclose(sizes[0], size(weights, 0.4), rtol=1e-4)
    slope = jax.jit(jax.grad(size))(weights, 0.8)
    np.testing.assert_allclose(slope @ weights, 2 * sizes[1], rtol=1e-3)  # of degree two


ONE = {UP: LoRA(jnp.ones((2, 5, 1)), jnp.ones((2, 1, 9)))}


@pytest.mark.parametrize(
    ("adapters", "method", "options", "words"),
    [
        ([ONE], "tise", {}, "unknown method 'tise'; did you mean ties"),
        ([], "ties", {}, "merge of no modules"),
        ([ONE], "ties", {"weights": [1.0, 2.0]}, "1 modules need as many weights; got 2"),
        ([ONE], "ties", {"gamma": 1.0}, "ties has no option 'gamma'; it has density, majority"),
        ([ONE], "linear", {"density": 1.0}, "linear has no option 'density'; it has none"),
        ([ONE], "wudi", {"damping": -1}, "damping must be at least 0; got -1"),
        ([ONE], "compress_then_merge", {"beta": 2.0}, "beta must be at least 0 and at most 1"),
        ([ONE], "slerp", {"t": float("nan")}, "t must be finite; got nan"),
        ([ONE], "dare_linear", {"density": "a"}, "density is a number; got 'a'"),
        ([ONE], "fisher", {}, "fisher needs fishers, which lora-train --fisher measures"),
        ([ONE], "knots", {"inner": "fisher"}, "fisher knows entries, not coordinates; choose as"),
        ([{UP: IA3(jnp.ones((2, 9)))}], "svd", {"rank": 1}, "IA3 has no rank to bring down"),
        ([ONE], "svc", {"alpha": 0.0}, "alpha must be above 0; got 0"),
        ([ONE], "iso_cts", {"common": jnp.ones(())}, "common decides what is compiled: give a"),
        ([ONE], "tsv", {"keep": jnp.ones((), int)}, "keep decides what is compiled"),
        ([ONE], "fisher", {"fishers": []}, "1 modules need as many fishers; got 0"),
        ([ONE], "fisher", {"fishers": [{}]}, r"fishers\[0\] lacks mlp.up_proj"),
        ([ONE], "ties", {"rank": 0}, "rank must be at least 1"),
        ([ONE], "ties", {"rank": 1, "space": "factor"}, "factor space keeps its ranks"),
        ([ONE], "ties", {"space": "dleta"}, "unknown space 'dleta'; choose delta or factor"),
        ([ONE], "svd", {"space": "factor"}, "svd works on deltas"),
        ([ONE], "knots", {"inner": "cat"}, "unknown inner method 'cat'"),
        ([ONE], "ties", {"weights": [{"q": 1.0}]}, "a weight for q, which no module changes"),
        ([{UP: Saved(jnp.ones(3))}], "ties", {}, "mlp.up_proj is kept whole, and only weighted"),
        (
            [{UP: IA3(jnp.ones((2, 9)))}],
            "knots",
            {},
            "knots has no form for; these have: linear",
        ),
        ([{UP: DoRA(*jax.tree.leaves(ONE), jnp.ones((2, 9)))}], "ties", {}, "DoRA"),
        ([{UP: ONE[UP].replace(bias=jnp.ones((2, 9)))}], "ties", {}, "lora_bias"),
    ],
)
def test_what_cannot_be_merged_is_refused(adapters, method, options, words):
    with pytest.raises(InputError, match=words):
        merge(adapters, method, **options)


def test_weights_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="a weight is nan; weights are finite numbers"):
        merge([ONE, ONE], "ties", weights=[float("nan"), 1.0])
