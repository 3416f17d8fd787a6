from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.library import Library, Routing
from compose.routing import directions
from compose.routing.build import route
from compose.routing.change import with_expert, without_expert
from compose.routing.given import oracle, with_weights
from compose.routing.settings import ACTIVATIONS, GATES, SPECTR, UNIFORM, routing_for
from lora_jax.errors import InputError
from lora_jax.routing import routed

Q, LAST = "self_attn.q_proj", "self_attn.o_proj"
ROUTINGS = {
    "arrow": Routing(top_k=2),
    "shared": Routing(top_k=2, prototypes="shared", inputs="centred"),
    "spectr": replace(SPECTR, top_k=2),
    "spectr-code": replace(SPECTR, top_k=2, router="spectr-code"),
    "gates": GATES,
    "activations": replace(ACTIVATIONS, top_k=2),
    "uniform": UNIFORM,
}
USUAL = {
    "arrow": Routing(),
    "shared": Routing(prototypes="shared", inputs="centred"),
    "spectr": SPECTR,
    "spectr-code": replace(SPECTR, router="spectr-code"),
    "gates": GATES,
    "activations": ACTIVATIONS,
    "uniform": UNIFORM,
}
LEAVES = {"a": -3, "b": -3, "prototypes": -2, "spectrum": -2}


def part(library, *numbers):
    """The members of these numbers, with their vectors."""
    vectors = {r: tuple(held[n] for n in numbers) for r, held in library.vectors.items()}
    names, adapters = (tuple(x[n] for n in numbers) for x in (library.names, library.adapters))
    return Library(names, adapters, vectors=vectors)


def anew(library, name, *numbers):
    """The members of these numbers routed by a router's usual settings."""
    held = part(library, *numbers)
    return route(held, routing_for(held, USUAL[name], None))


def assert_same(found, want):
    assert jax.tree.structure(found) == jax.tree.structure(want)
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, atol=1e-5), found, want)


@pytest.mark.parametrize("name", ROUTINGS)
def test_one_more_is_the_whole_library_routed_anew(library, name):
    routing = ROUTINGS[name]
    before = route(part(library, 0, 1, 2), routing)
    vectors = library.vectors[name][3] if name in library.vectors else None
    after = with_expert(before, library.adapters[3], routing, vectors)
    assert_same(after, route(part(library, 0, 1, 2, 3), routing))


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_others_stay_the_same_bits(library, name):
    routing = ROUTINGS[name]
    before = route(part(library, 0, 1, 2), routing)
    vectors = library.vectors[name][3] if name in library.vectors else None
    after = with_expert(before, library.adapters[3], routing, vectors)
    back = without_expert(after, 3)
    assert_same(back, before)
    for path, held in before.items():
        for leaf, axis in LEAVES.items():
            if getattr(held, leaf) is not None:
                old, new = (getattr(one[path], leaf) for one in (before, after))
                assert (jnp.take(new, jnp.arange(3), axis=axis) == old).all()
                assert (getattr(back[path], leaf) == old).all()


def test_only_the_new_module_is_decomposed(library, monkeypatch):
    before, seen = route(part(library, 0, 1, 2), Routing(top_k=2)), []
    real = directions.svd
    monkeypatch.setattr(directions, "svd", lambda m: seen.append(m.a.shape[-3]) or real(m))
    with_expert(before, library.adapters[3], Routing(top_k=2))
    assert seen == [1] * len(before)


def test_a_higher_rank_gives_the_others_zeros(library):
    before = route(part(library, 1, 4), Routing(top_k=2))
    after = with_expert(before, library.adapters[2], Routing(top_k=2))
    assert before[Q].a.shape[-1] == 2 and after[Q].a.shape[-1] == 4
    assert (after[Q].a[:, :2, :, :2] == before[Q].a).all() and not after[Q].a[:, :2, :, 2:].any()


def test_a_module_that_leaves_a_projection_alone_is_nothing_there(library):
    before = route(part(library, 0, 1, 2), Routing(top_k=2))
    after = with_expert(before, {Q: library.adapters[3][Q]}, Routing(top_k=2))
    assert not after[LAST].a[:, 3].any() and not after[LAST].prototypes[:, 3].any()
    assert after[Q].prototypes[:, 3].any()


def test_taking_one_out_of_the_middle(library):
    whole = route(library, Routing(top_k=5))
    found = without_expert(whole, 1)
    assert_same(found, route(part(library, 0, 2, 3, 4), Routing(top_k=4)))
    even = without_expert(route(library, UNIFORM), 1)
    assert_same(even, route(part(library, 0, 2, 3, 4), UNIFORM))


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_by_its_usual_settings_it_is_the_whole_library_routed_anew(library, name, count):
    before, numbers = part(library, *range(count)), range(count + 1)
    vectors = library.vectors[name][count] if name in library.vectors else None
    held = routing_for(before, USUAL[name], None)
    for routing in (held, USUAL[name]):
        after = with_expert(route(before, held), library.adapters[count], routing, vectors)
        assert_same(after, anew(library, name, *numbers))


def test_a_library_may_grow_one_by_one(library):
    for name in ("arrow", "activations"):
        routed = anew(library, name, 0)
        for n in (1, 2, 3, 4):
            vectors = library.vectors["activations"][n]
            routed = with_expert(routed, library.adapters[n], USUAL[name], vectors)
        assert_same(routed, anew(library, name, *range(5)))


def test_how_many_are_taken_may_be_said(library):
    before, routing = route(part(library, 0, 1), Routing(top_k=2)), Routing(top_k=2)
    for top_k in (1, 2, 3):
        after = with_expert(before, library.adapters[2], routing, top_k=top_k)
        assert_same(after, route(part(library, 0, 1, 2), Routing(top_k=top_k)))
    for top_k in (0, 4):
        with pytest.raises(InputError, match=rf"top_k .* between 1 and .* 3 modules; got {top_k}"):
            with_expert(before, library.adapters[2], routing, top_k=top_k)
    even = route(part(library, 0, 1), UNIFORM)
    with pytest.raises(InputError, match="uniform takes all modules; leave top_k out"):
        with_expert(even, library.adapters[2], UNIFORM, top_k=1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"top_k": 2}, "top_k is 1 .* 2 in the routing"),
        ({"temperature": 0.5}, "temperature is 1.0 .* 0.5 in the routing"),
        ({"mixing": "factors"}, "mixing is outputs .* factors in the routing"),
        ({"weighting": "uniform"}, "weighting is softmax .* uniform in the routing"),
        ({"inputs": "unit"}, "inputs is raw .* unit in the routing"),
        ({"inputs": "centred"}, "inputs or prototypes are others"),
        ({"prototypes": "shared"}, "inputs or prototypes are others"),
        ({"temperature": 2, "mixing": "factors"}, "temperature is .*; mixing is"),
        ({"router": "gates"}, "not routed by gates"),
        ({"router": "nearest"}, "unknown router 'nearest'"),
        ({"top_k": 0}, "top_k .* got 0"),
    ],
)
def test_settings_that_are_not_the_librarys_are_refused_by_name(library, given, words):
    routed, routing = route(part(library, 0, 1, 2), Routing(top_k=1)), Routing(top_k=1)
    with pytest.raises(InputError, match=words):
        with_expert(routed, library.adapters[3], replace(routing, **given))


@pytest.mark.parametrize("name", ["gates", "activations"])
def test_a_module_without_its_own_vectors_is_refused(library, name):
    routed, held = anew(library, name, 0, 1), library.vectors[name][2]
    for vectors in (None, {path: row for path, row in held.items() if path != Q}):
        with pytest.raises(InputError, match=rf"{name} needs the new module's vectors at .*q_proj"):
            with_expert(routed, library.adapters[2], USUAL[name], vectors)


def test_weights_that_were_given_are_never_evened(library):
    weights = jnp.array([0.5, 0.3, 0.1, 0.1, 0.0])
    for held in (
        with_weights(library, weights),
        with_weights(library, jnp.full(5, 0.2)),
        with_weights(library, weights[None]),
        oracle(part(library, 0), "v"),
    ):
        with pytest.raises(InputError, match=r"have given weights; .*with_weights"):
            without_expert(held, 0)
        with pytest.raises(InputError, match=r"have given weights; .*with_weights"):
            with_expert(held, library.adapters[3], UNIFORM)


def test_even_shares_stay_even_and_route_as_given_ones(library):
    even = route(library, UNIFORM)
    given = with_weights(library, jnp.full(5, 0.2))
    x = jax.random.normal(jax.random.key(3), (4, 32))
    first = [jax.tree.map(lambda leaf: leaf[0], held[Q]) for held in (even, given)]
    np.testing.assert_array_equal(*(routed(x, held) for held in first))
    three = without_expert(without_expert(even, 4), 0)
    assert_same(three, route(part(library, 1, 2, 3), UNIFORM))


def test_what_does_not_fit_is_refused(library, ia3):
    routing = Routing(top_k=1)
    routed = route(part(library, 0), routing)
    wrong = {Q: library.adapters[1][LAST].replace(b=jnp.zeros((2, 2, 9))), **ia3()}
    with pytest.raises(InputError, match=r"q_proj: the new module is .*; .*no module at mlp\.up"):
        with_expert(routed, wrong, routing)
    with pytest.raises(InputError, match="it is not routed by spectr; give the routing"):
        with_expert(routed, library.adapters[1], replace(routing, router="spectr"))
    with pytest.raises(InputError, match=r"the last module .* cannot be taken out"):
        without_expert(routed, 0)
    with pytest.raises(InputError, match="no module 1 to take out; there are 0 to 0"):
        without_expert(routed, 1)
    with pytest.raises(InputError, match="given weights"):
        without_expert(oracle(library, "x"), 0)
    with pytest.raises(InputError, match="it is empty"):
        with_expert({}, library.adapters[0], routing)
