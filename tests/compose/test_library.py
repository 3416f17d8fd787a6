import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.library import Library, Routing, each, join, stack, unstack
from lora_jax.errors import InputError
from lora_jax.modules import DoRA, Experts

Q, UP = "self_attn.q_proj", "mlp.up_proj"


def test_a_stack_keeps_every_delta_whatever_ranks_scales_and_targets(lora, dense):
    adapters = [lora(0, rank=2), lora(1, rank=4, scale=0.5), lora(2, paths=(UP,)), {}]
    stacked = stack(adapters)
    assert stacked[UP].a.shape == (4, 2, 5, 4) and stacked[UP].b.shape == (4, 2, 4, 9)
    for adapter, member in zip(adapters, unstack(stacked), strict=True):
        for path in (Q, UP):
            want = dense(adapter).get(path, 0.0)
            np.testing.assert_allclose(dense(member)[path], want, rtol=1e-6)


def test_unstack_undoes_stack_bit_for_bit(lora, ia3):
    for adapters in ([lora(0), lora(1)], [ia3(0), ia3(1)]):
        for one, other in zip(adapters, unstack(stack(adapters)), strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)


def test_ia3_stacks_with_the_identity_where_a_module_has_none(ia3):
    stacked = stack([ia3(), {}])
    assert stacked[UP].offset.shape == (2, 2, 9)
    assert not stacked[UP].offset[1].any()


def test_routed_adapters_of_one_form_stack(lora):
    a, b = jnp.zeros((2, 3, 5, 4)), jnp.zeros((2, 3, 4, 9))
    routed = {UP: Experts(a, b, a[..., 0], top_k=2)}
    assert stack([routed, routed])[UP].prototypes.shape == (2, 2, 3, 5)
    with pytest.raises(InputError, match="cannot combine"):
        stack([routed, {UP: Experts(a, b, a[..., 0], top_k=1)}])


def test_modules_of_two_kinds_do_not_stack(lora, ia3):
    with pytest.raises(InputError, match="cannot combine IA3"):
        stack([lora(), ia3()])


def test_dora_stacks_with_the_identity_where_a_module_has_none(lora):
    m = lora()[UP]
    dora = {UP: DoRA(m.a, m.b, jnp.ones((2, 9)), 2.0)}
    stacked = stack([dora, {}])[UP]
    assert (stacked.magnitude[0] == 1).all() and not stacked.magnitude[1].any()
    with pytest.raises(InputError, match=r"DoRA \(2 layers, 5 to 9, rank 3, scale 2\) with LoRA"):
        stack([dora, lora()])


def test_nothing_stacks_to_nothing():
    assert stack([]) == {} and unstack({}) == []


def test_joined_libraries_keep_their_names_apart(lora):
    x = Library(("boolq", "piqa"), (lora(0), lora(1)))
    both = join([x, Library(("boolq",), (lora(2),)), x])
    assert both.names == ("boolq", "piqa", "boolq_2", "boolq_3", "piqa_2")
    assert both.adapters[2][UP] is not x.adapters[0][UP]


def test_functions_reach_every_member_of_one_library(lora):
    library = Library(("x", "y"), (lora(0), lora(1)))
    found = each(lambda m, n: {**m, "n": n}, library, 7)
    assert [member["n"] for member in found.adapters] == [7, 7]
    assert each(lambda m: m, lora()).keys() == lora().keys()


def test_libraries_of_the_same_names_are_combined_member_by_member(lora):
    x = Library(("x", "y"), (lora(0), lora(1)), Routing(1), {"gates": ({UP: 1}, {UP: 2})})
    other = Library(("x", "y"), (lora(2), lora(3)), Routing(2))
    found = each(lambda m, n, k: {"m": m, "n": n, "k": k}, x, other, 7)
    assert found.names == x.names and (found.routing, found.vectors) == (x.routing, x.vectors)
    for n, member in enumerate(found.adapters):
        assert member == {"m": x.adapters[n], "n": other.adapters[n], "k": 7}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("x", "z"), "one alone has y, the other z"),
        (("x",), "one alone has y, the other none"),
        (("y", "x"), "they are x, y in one and y, x in the other"),
    ],
)
def test_libraries_of_other_names_are_refused_with_the_names_that_differ(lora, names, words):
    library = Library(("x", "y"), (lora(0), lora(1)))
    other = Library(names, tuple(map(lora, range(len(names)))))
    with pytest.raises(InputError, match=rf"must agree: {words}; take member\(\) or mean\(\)"):
        each(lambda m, n: m, library, other)


def test_a_library_is_a_pytree_that_keeps_its_order(lora):
    library = Library(("z", "a"), (lora(0), lora(1)))
    doubled = jax.jit(lambda x: jax.tree.map(lambda leaf: 2 * leaf, x))(library)
    assert doubled.names == ("z", "a")
    np.testing.assert_array_equal(doubled.adapters[0][UP].a, 2 * lora(0)[UP].a)
