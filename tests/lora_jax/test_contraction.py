"""A kernel of any axes is a matrix to its module, whatever the axes' order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.contraction import along, einsum, refuse_misfits
from lora_jax.errors import InputError
from lora_jax.modules import DoRA, LoRA

KEYS = jax.random.split(jax.random.key(0), 4)


def agrees(how, call, x, kernel, shape):
    """Whether a call under a module is the call with the merged kernel."""
    x, kernel = jax.random.normal(KEYS[0], x), jax.random.normal(KEYS[1], kernel)
    module = LoRA(
        jax.random.normal(KEYS[2], (shape[0], 2)), jax.random.normal(KEYS[3], (2, shape[1]))
    )
    assert how.shape(kernel.shape) == how.matrix(kernel).shape == shape
    merged, _ = how.merged("here", module, kernel, None)
    got = how.changed(lambda x: call(x, kernel), x, kernel, "here", module)
    np.testing.assert_allclose(got, call(x, merged), rtol=1e-4, atol=1e-3)


ROWS = [LoRA(jnp.ones((3, 2)), jnp.ones((2, 4)), 1.0, jnp.ones(4))]
ROWS += [DoRA(jnp.ones((3, 2)), jnp.ones((2, 4)), jnp.ones(4))]


@pytest.mark.parametrize("module", ROWS)
def test_a_row_of_another_width_has_no_place(module):
    refuse_misfits({"here": module}, {"here": (3, 4)})
    wide = jax.tree.map(lambda leaf: leaf if leaf.ndim == 2 else jnp.ones(1), module)
    with pytest.raises(InputError, match=r"here is \(3, 4\), and its .* holds .*\(1,\)"):
        refuse_misfits({"here": wide}, {"here": (3, 4)})


@pytest.mark.parametrize(
    "equation, x, kernel, shape",
    [
        ("btd,do->bto", (2, 3, 4), (4, 5), (4, 5)),
        ("btd,ndh->btnh", (2, 3, 4), (2, 4, 5), (4, 10)),
        ("b t d, d h k -> b h t k", (2, 3, 4), (4, 5, 2), (4, 10)),
        ("...nh,hnd->...d", (2, 3, 4, 5), (5, 4, 6), (20, 6)),
        ("n...h,hno->...o", (4, 3, 5), (5, 4, 6), (20, 6)),
        ("d...,od->o...", (4, 2, 3), (5, 4), (4, 5)),
    ],
)
def test_an_einsum_is_a_product_with_its_kernel_as_a_matrix(equation, x, kernel, shape):
    agrees(einsum(equation), lambda x, k: jnp.einsum(equation, x, k), x, kernel, shape)


def test_axes_are_taken_in_the_inputs_order():
    def call(x, kernel):
        return jnp.einsum("bhtk,hkdc->btdc", x, kernel)

    agrees(along((-1, 1), 2), call, (2, 3, 4, 5), (3, 5, 6, 2), (15, 12))


@pytest.mark.parametrize(
    "equation",
    [
        "btd,td->btd",  # nothing summed
        "btd,td->b",  # nothing of the kernel given out
        "btd,tdo->bto",  # t is in all three
        "btd,do->bo",  # t is summed alone
        "btd,do->tbo",  # the input's own axes change places
        "btd,dok->bto",  # k is summed alone
        "bdd,do->bdo",  # a diagonal
        "...d,...do->...o",  # a kernel for each
    ],
)
def test_what_is_no_plain_contraction_is_none(equation):
    assert einsum(equation) is None
