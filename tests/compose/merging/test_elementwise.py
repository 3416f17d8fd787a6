"""Every entrywise method against dense numpy, written from its definition."""

from inspect import signature

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.merging import members as members_of
from compose.merging.elementwise import ELEMENTWISE
from lora_jax.errors import InputError
from lora_jax.modules import LoRA

WEIGHTS = np.array([1.0, 0.5, 2.0])
KEY = jax.random.key(3)
DRAWN = [name for name in ELEMENTWISE if "dare" in name or "della" in name]


def top(xs, density):
    """Each tensor's largest entries, the others zero, by a full sort."""
    kept = np.zeros_like(xs)
    for x, out in zip(xs, kept, strict=True):
        places = np.argsort(-np.abs(x), axis=None)[: int(density * x.size)]
        out.flat[places] = x.flat[places]
    return kept


def middling(xs, density, gamma):
    """Entries neither among the largest nor the smallest, by a full sort."""
    size = xs[0].size
    low, high = size - int(density * size) - int(gamma * size), int(gamma * size)
    if low < 0:
        low, high = 0, high + low
    kept = np.zeros_like(xs)
    for x, out in zip(xs, kept, strict=True):
        places = np.argsort(np.abs(x), axis=None)[low : size - high]
        out.flat[places] = x.flat[places]
    return kept


def column(weights, xs):
    return np.reshape(weights, (-1, *[1] * (xs.ndim - 1)))


def plain(xs, weights):
    return np.sum(column(weights, xs) * xs, axis=0)


def elected(xs, majority="total"):
    votes = xs.sum(0) if majority == "total" else np.sign(xs).sum(0)
    return np.sign(xs) == np.where(votes >= 0, 1, -1)


def by_count(xs, weights, majority="total"):
    agree = elected(xs, majority)
    return plain(xs * agree, weights) / np.maximum(agree.sum(0), 1)


def by_weight(xs, weights, majority="total", normalize=True):
    agree = elected(column(weights, xs) * xs, majority)
    share = np.sum(column(weights, xs) * agree, axis=0)
    return plain(xs * agree, weights) / (np.where(share == 0, 1, share) if normalize else 1)


def arc(xs, weights, t):
    x, y = (weight * x for weight, x in zip(weights, xs, strict=True))
    angle = np.arccos(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))
    return (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)


def unanimous(xs, weights):
    xs = column(weights, xs) * xs
    same = np.all(xs > 0, axis=0) | np.all(xs < 0, axis=0)
    return np.where(same, xs.mean(0), 0)


CASES = [
    ("linear", {}, plain),
    ("magnitude_prune", {"density": 0.3}, lambda xs, w: plain(top(xs, 0.3), w)),
    ("ties", {"density": 0.3}, lambda xs, w: by_count(top(xs, 0.3), w)),
    (
        "ties",
        {"density": 0.6, "majority": "frequency"},
        lambda xs, w: by_count(top(xs, 0.6), w, "frequency"),
    ),
    ("ties_mergekit", {"density": 0.3}, lambda xs, w: by_weight(top(xs, 0.3), w)),
    (
        "ties_mergekit",
        {"density": 0.6, "majority": "frequency"},
        lambda xs, w: by_weight(top(xs, 0.6), w, "frequency"),
    ),
    (
        "breadcrumbs",
        {"density": 0.5, "gamma": 0.1},
        lambda xs, w: plain(middling(xs, 0.5, 0.1), w),
    ),
    (
        "breadcrumbs",
        {"density": 0.95, "gamma": 0.1},
        lambda xs, w: plain(middling(xs, 0.95, 0.1), w),
    ),
    (
        "breadcrumbs_ties",
        {"density": 0.5, "gamma": 0.1},
        lambda xs, w: by_weight(middling(xs, 0.5, 0.1), w, normalize=False),
    ),
    ("negmerge", {}, unanimous),
]


@pytest.fixture(params=["deltas", "tensors"])
def modules(request, members, deltas, monkeypatch):
    """Three modules as LoRA's deltas, in several blocks, or as an array, and their tensors."""
    found = members(count=3)
    monkeypatch.setattr(members_of, "BLOCK", 60)
    dense = deltas(found)
    return (found if request.param == "deltas" else jnp.asarray(dense, jnp.float32)), dense


@pytest.mark.parametrize(("name", "options", "reference"), CASES)
def test_a_method_is_its_definition(modules, far, name, options, reference):
    given, dense = modules
    found = jax.jit(lambda m, w: ELEMENTWISE[name](m, w, **options))(given, jnp.array(WEIGHTS))
    wanted = reference(dense, WEIGHTS)
    if not wanted.any():
        return np.testing.assert_array_equal(found, wanted)
    assert far(found, wanted) < 1e-5


@pytest.mark.parametrize("name", [n for n in DRAWN if n.startswith("dare")])
def test_what_dare_keeps_is_rescaled_and_then_merged(modules, far, name):
    """The masks are read off a merge of one module each, which draws as all together do not."""
    given, dense = modules
    kept = drawn(name, given, density=0.4)
    scaled = dense * kept / 0.4
    if name.endswith("mergekit"):
        sums = [np.abs(x).sum(axis=(1, 2), keepdims=True) for x in (dense, dense * kept)]
        scaled = dense * kept * sums[0] / sums[1]
    merge = {
        "dare_linear": plain,
        "dare_ties": by_count,
        "dare_linear_mergekit": plain,
        "dare_ties_mergekit": lambda xs, w: by_weight(xs, w, normalize=False),
    }[name]
    found = ELEMENTWISE[name](given, jnp.array(WEIGHTS), key=KEY, density=0.4)
    assert far(found, merge(scaled, WEIGHTS)) < 1e-5
    assert 0.2 < kept.mean() < 0.6


def drawn(name, given, **options):
    """Which entries of each module a seeded method keeps: those a weight of one shows."""
    linear = {"dare_ties": "dare_linear", "dare_ties_mergekit": "dare_linear_mergekit"}
    linear |= {"della": "della_linear_mergekit", "della_mergekit": "della_linear_mergekit"}
    one = ELEMENTWISE[linear.get(name, name)]
    alone = jax.jit(jax.vmap(lambda weights: one(given, weights, key=KEY, **options)))
    return np.asarray(alone(jnp.eye(3))) != 0


@pytest.mark.parametrize("name", ["della_mergekit", "della_linear_mergekit"])
def test_della_drops_by_rank_and_rescales(modules, far, name):
    given, dense = modules
    kept = drawn("della_linear_mergekit", given, density=0.5, epsilon=0.2)
    sums = [np.abs(x).sum(axis=(1, 2), keepdims=True) for x in (dense, dense * kept)]
    scaled = dense * kept * sums[0] / sums[1]
    merge = by_weight if name == "della_mergekit" else plain
    found = ELEMENTWISE[name](given, jnp.array(WEIGHTS), key=KEY, density=0.5, epsilon=0.2)
    assert far(found, merge(scaled, WEIGHTS)) < 1e-5


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_della_divides_each_entry_by_its_own_chance(members, deltas, far, majority):
    """The draws are JAX's own numbers; the chances, from a full sort of every output's inputs."""
    given, density, epsilon = members(), 0.5, 0.4
    dense = deltas(given)
    ranks = np.argsort(np.argsort(np.abs(dense), axis=1), axis=1) + 1
    chances = density - epsilon / 2 + epsilon * ranks / dense.shape[1]
    kept = np.asarray(jax.random.uniform(jax.random.fold_in(KEY, 0), dense.shape)) < chances
    wanted = by_count(np.where(kept, dense / chances, 0), WEIGHTS, majority)
    options = {"density": density, "epsilon": epsilon, "majority": majority, "key": KEY}
    for form in (given, jnp.asarray(dense, jnp.float32)):
        found = ELEMENTWISE["della"](form, jnp.array(WEIGHTS), **options)
        assert far(found, wanted) < 1e-5
    assert 0.4 < kept.mean() < 0.6


@pytest.mark.parametrize(
    ("name", "epsilon", "low", "high"),
    [("della", 0.4, 0.5 - 0.2 + 0.4 / 4, 0.7), ("della_mergekit", 0.2, 0.3, 0.7)],
)
def test_della_keeps_small_entries_less_often(name, epsilon, low, high):
    """Columns of four entries: the smallest is kept at `low`, the largest at `high`."""
    xs = jnp.tile(jnp.array([2.0, -4.0, 1.0, 3.0])[:, None], (1, 40_000))[None]
    found = ELEMENTWISE[name](xs, jnp.ones(1), key=KEY, density=0.5, epsilon=epsilon)
    chances = np.mean(np.asarray(found) != 0, axis=1)
    np.testing.assert_allclose(chances[[2, 1]], [low, high], atol=0.01)
    if name == "della":  # each entry over its own chance keeps its mean
        np.testing.assert_allclose(found.mean(1), xs[0, :, 0], rtol=0.03)


def test_dare_keeps_the_mean_and_mergekits_the_sum_of_magnitudes():
    xs = jnp.ones((1, 200, 200)) * jnp.array([[1.0], [-3.0]] * 100)
    kept = ELEMENTWISE["dare_linear"](xs, jnp.ones(1), key=KEY, density=0.25)
    assert set(np.unique(kept)) == {-12.0, 0.0, 4.0}
    np.testing.assert_allclose(kept.mean(), xs.mean(), atol=0.1)
    kept = ELEMENTWISE["dare_linear_mergekit"](xs, jnp.ones(1), key=KEY, density=0.25)
    np.testing.assert_allclose(jnp.abs(kept).sum(), jnp.abs(xs).sum(), rtol=1e-5)


@pytest.mark.parametrize("name", DRAWN)
def test_a_key_draws_the_same_again_and_another_key_others(modules, name):
    given, _ = modules
    draw = jax.jit(lambda key: ELEMENTWISE[name](given, jnp.ones(3), key=key, density=0.5))
    one, again, other = (np.asarray(draw(jax.random.key(n))) for n in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.mean(one != other) > 0.3


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_goes_along_the_arc(members, deltas, far, t):
    given = members(count=2)
    dense, weights = deltas(given), np.array([1.0, 0.7])
    tensors = jnp.asarray(dense, jnp.float32)
    for found in (given, tensors):
        found = ELEMENTWISE["slerp"](found, jnp.array(weights), t=t)
        assert far(found, arc(dense, weights, t)) < 1e-5


def test_slerp_of_parallel_tensors_is_a_straight_line_and_differentiates():
    xs = jnp.stack([jnp.ones(4), 3 * jnp.ones(4)])
    np.testing.assert_allclose(ELEMENTWISE["slerp"](xs, jnp.ones(2), t=0.25), 1.5, rtol=1e-6)
    slope = jax.grad(lambda t: ELEMENTWISE["slerp"](xs, jnp.ones(2), t=t).sum())(0.25)
    np.testing.assert_allclose(slope, 8, rtol=1e-5)
    with pytest.raises(InputError, match="between two modules; got 3"):
        ELEMENTWISE["slerp"](jnp.ones((3, 2)), jnp.ones(3))


def test_fisher_weighs_every_entry(members, deltas, far):
    given, information = members(count=3), members(1, count=3, scale=1.0)
    information = jax.tree.map(jnp.abs, information)
    xs, fs = deltas(given), deltas(information)
    wanted = plain(fs * xs, WEIGHTS) / plain(fs, WEIGHTS)
    found = ELEMENTWISE["fisher"](given, jnp.array(WEIGHTS), fishers=information)
    assert far(found, wanted) < 1e-5
    nothing = jax.tree.map(jnp.zeros_like, information)
    found = ELEMENTWISE["fisher"](given, jnp.array(WEIGHTS), fishers=nothing)
    assert far(found, plain(xs, WEIGHTS) / WEIGHTS.sum()) < 1e-5


def test_fisher_information_of_nothing_leaves_a_finite_average(members):
    given = members()
    nothing = jax.tree.map(jnp.zeros_like, given)
    found = ELEMENTWISE["fisher"](given, jnp.array([1.0, -1.0, 0.0]), fishers=nothing)
    np.testing.assert_array_equal(found, 0)


LAWFUL = [name for name in ELEMENTWISE if name not in ("fisher", "wudi_adam")]


@pytest.mark.parametrize("name", LAWFUL)
def test_one_module_at_weight_one_is_itself(members, deltas, far, name):
    given = members(count=1)
    key = {"key": KEY} if name in DRAWN else {}
    assert far(ELEMENTWISE[name](given, jnp.ones(1), **key), deltas(given)[0]) < 1e-6


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ties", {"density": 1.2}, "density must be above 0 and at most 1; got 1.2"),
        ("ties", {"density": 0.0}, "density must be above 0 and at most 1; got 0"),
        ("breadcrumbs", {"density": 0.5, "gamma": -1}, "gamma must be at least 0 and at most 1"),
        ("ties", {"majority": "votes"}, "unknown majority 'votes'; choose total or frequency"),
        ("della", {"density": 0.05, "key": KEY}, "must lie between 0 and 1; choose another"),
    ],
)
def test_settings_out_of_bounds_are_refused(members, name, options, words):
    with pytest.raises(InputError, match=words):
        ELEMENTWISE[name](members(), jnp.ones(3), **options)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_it_jits_vmaps_and_differentiates_in_weights_and_modules(members, name):
    """The slope along a step is the change that a small one makes; a batch is its rows."""
    count = 2 if name == "slerp" else 3
    m, weights = members(2, count=count), jnp.array([1.0, 1.1, 0.9])[:count]
    random = np.random.default_rng(5)
    moved = [jnp.asarray(random.standard_normal(x.shape), jnp.float32) for x in (m.a, m.b, weights)]
    options = {"key": KEY} if name in DRAWN else {}
    if "density" in signature(ELEMENTWISE[name]).parameters:
        options["density"] = 0.5
    if name == "fisher":
        options["fishers"] = jax.tree.map(jnp.square, members(1, count=count, scale=1.0))
    along = random.standard_normal((11, 9))

    def size(t):
        """A number that every entry has to do with, a little along the step."""
        a, b, w = (x + t * dx for x, dx in zip((m.a, m.b, weights), moved, strict=True))
        return jnp.sum(along * ELEMENTWISE[name](m.replace(a=a, b=b), w, **options))

    times = np.linspace(-2e-3, 2e-3, 17)
    sizes = np.asarray(jax.jit(jax.vmap(size))(jnp.array(times, jnp.float32)), np.float64)
    found, slope = jax.jit(jax.value_and_grad(size))(0.0)
    np.testing.assert_allclose(found, sizes[8], rtol=1e-4, atol=1e-4)
    wanted = np.median(np.diff(sizes) / np.diff(times))  # a jump spoils few of the steps
    np.testing.assert_allclose(slope, wanted, rtol=0.02, atol=0.1)


TRACED = {"density": (0.25, 0.5), "gamma": (0.1, 0.2), "epsilon": (0.1, 0.3), "t": (0.2, 0.7)}
SWEPT = [
    (name, option)
    for name, function in ELEMENTWISE.items()
    for option in TRACED
    if option in signature(function).parameters
]


@pytest.mark.parametrize(("name", "option"), SWEPT)
def test_an_option_that_is_a_number_may_be_mapped_over(members, far, name, option):
    given = members(count=2)
    options = {"key": KEY} if name in DRAWN else {}
    if option != "density" and "density" in signature(ELEMENTWISE[name]).parameters:
        options["density"] = 0.5

    def merged(value):
        return ELEMENTWISE[name](given, jnp.ones(2), **options, **{option: value})

    swept = jax.jit(jax.vmap(merged))(jnp.array(TRACED[option]))
    for value, found in zip(TRACED[option], swept, strict=True):
        assert far(found, merged(value)) < 1e-5


def test_modules_of_no_common_block_size_are_whole(members, deltas, far, monkeypatch):
    monkeypatch.setattr(members_of, "BLOCK", 1)
    given = LoRA(*(members(rows=13, width=7).a, members(rows=13, width=7).b), 1.0)
    assert far(ELEMENTWISE["linear"](given, jnp.ones(3)), deltas(given).sum(0)) < 1e-6
