import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose import arithmetic
from compose.weights import over_depth
from lora_jax.errors import InputError
from lora_jax.modules import Saved

Q, UP = "self_attn.q_proj", "mlp.up_proj"


@pytest.mark.parametrize("space", ["delta", "factor"])
def test_a_weight_a_layer_is_that_layers_weight(lora, dense, space):
    x, y = lora(0), lora(1)
    whole = arithmetic.weighted_sum([x, y], [np.array([0.5, 2.0]), -1.0], space=space)
    for layer, weight in enumerate([0.5, 2.0]):
        one = arithmetic.weighted_sum([x, y], [weight, -1.0], space=space)
        for path, delta in dense(one).items():
            np.testing.assert_allclose(dense(whole)[path][layer], delta[layer], atol=1e-5)


def test_a_weight_by_projection_is_that_projections_weight(lora, ia3, dense):
    x, y = lora(0, paths=(Q,)) | ia3(0), lora(1, paths=(Q,)) | ia3(1)
    mixed = arithmetic.weighted_sum([x, y], [{Q: 2.0, UP: 3.0}, {UP: -1.0}], space="delta")
    parts = dense(x), dense(y)
    np.testing.assert_allclose(dense(mixed)[Q], 2 * parts[0][Q], rtol=1e-6)
    np.testing.assert_allclose(dense(mixed)[UP], 3 * parts[0][UP] - parts[1][UP], atol=1e-6)


def test_an_average_divides_by_the_total_of_every_projection(lora, dense):
    x, y = lora(0), lora(1)
    mean = arithmetic.average([x, y], [{Q: 1.0, UP: 3.0}, {Q: 1.0, UP: 1.0}], space="delta")
    parts = dense(x), dense(y)
    np.testing.assert_allclose(dense(mean)[Q], (parts[0][Q] + parts[1][Q]) / 2, atol=1e-5)
    np.testing.assert_allclose(dense(mean)[UP], (3 * parts[0][UP] + parts[1][UP]) / 4, atol=1e-5)


def test_a_gradient_comes_through_every_weight(lora):
    def size(weights):
        mixed = arithmetic.weighted_sum([lora(0), lora(1)], list(weights), space="delta")
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(mixed))

    gradient = jax.jit(jax.grad(size))(jnp.ones((2, 2)))
    assert gradient.shape == (2, 2) and (gradient > 0).all()


def test_over_depth_goes_through_its_points():
    np.testing.assert_allclose(over_depth([0, 1], 5), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(over_depth([1, 0, 1], 5), [1, 0.5, 0, 0.5, 1])
    np.testing.assert_allclose(over_depth([0.3], 2), [0.3, 0.3])


def test_weights_that_do_not_fit_are_refused(lora):
    with pytest.raises(InputError, match=r"shape \(3,\) do not fit a module of 2 layers"):
        arithmetic.scale(lora(), jnp.ones(3), space="delta")
    with pytest.raises(InputError, match="a weight for o_proj, which no module changes"):
        arithmetic.scale(lora(), {"o_proj": 1.0}, space="delta")
    with pytest.raises(InputError, match="at least one number"):
        over_depth([], 3)
    head = {"classifier.dense": Saved(jnp.ones((2, 2)))}
    with pytest.raises(InputError, match="take one number, not one a layer"):
        arithmetic.scale(head, jnp.ones(2), space="delta")
