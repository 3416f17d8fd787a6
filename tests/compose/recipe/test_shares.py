import jax.numpy as jnp
import numpy as np
import pytest

from compose.recipe.shares import is_share, mixing, refuse_idle
from lora_jax.errors import InputError
from lora_jax.modules import IA3, LoRA

Q, UP = "self_attn.q_proj", "mlp.up_proj"


@pytest.fixture
def adapter():
    """A module of four layers at two projections, and of an embedding, which is there once."""
    layered = LoRA(jnp.ones((4, 3, 2)), jnp.ones((4, 2, 3)))
    return {
        "embed": LoRA(jnp.ones((3, 2)), jnp.ones((2, 3))),
        Q: layered,
        UP: IA3(jnp.ones((4, 3))),
    }


def test_one_number_is_itself(adapter):
    weight = jnp.array(0.5)
    assert mixing(2, adapter) == 2 and mixing(weight, adapter) is weight


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("q_proj", [Q]),
        ("*.q_proj", [Q]),
        ("self_attn.*", [Q]),
        ("self_attn.q_proj", [Q]),
        ("*_proj", [Q, UP]),
        ("mlp.*", [UP]),
        ("*", ["embed", Q, UP]),
        ("q_pro", []),
        ("attn.q_proj", []),
    ],
)
def test_a_pattern_fits_a_path_or_its_last_parts(adapter, pattern, fits):
    found = mixing({pattern: 3, "**": 1}, adapter)
    assert [path for path, weight in found.items() if weight == 3] == fits


def test_the_first_pattern_that_fits_counts(adapter):
    assert mixing({"q_proj": 2, "*_proj": 3, "*": 4}, adapter) == {"embed": 4, Q: 2, UP: 3}


def test_numbers_over_depth_rise_in_straight_lines(adapter):
    found = mixing({"embed": 1, "*": [0, 3]}, adapter)
    for path in (Q, UP):
        np.testing.assert_allclose(found[path], [0, 1, 2, 3])
    del adapter["embed"]
    np.testing.assert_allclose(mixing((1, 0, 1), adapter)[Q], [1, 1 / 3, 1 / 3, 1], atol=1e-6)


def test_what_has_no_layers_needs_a_number(adapter):
    with pytest.raises(InputError, match=r'embed is there once, .* \{"embed": 1, "\*": \[0, 1\]\}'):
        mixing([0, 1], adapter)


def test_no_projection_goes_without_a_weight(adapter):
    with pytest.raises(InputError, match=r'no weight for embed; end the table .* "\*" for all'):
        mixing({"*_proj": 1}, adapter)


def test_a_pattern_that_fits_nothing_is_refused(adapter):
    refuse_idle([{"mlp.*": 1, "*": 2}, 3, [0, 1]], [{Q: adapter[Q]}, {UP: adapter[UP]}])
    with pytest.raises(
        InputError, match=r"weights for o_proj, k_proj, which fit no projection; .*q"
    ):
        refuse_idle([{"o_proj": 1, "*": 1}, {"k_proj": 1}], [adapter])


@pytest.mark.parametrize("value", [1, 0.5, [0, 1], (1,), {"q": 1, "*": [0, 1]}, jnp.ones(3)])
def test_weights(value):
    assert is_share(value)


@pytest.mark.parametrize(
    "value", ["1", None, True, [], {}, [1, "x"], [[1]], {"q": "x"}, {1: 2}, float("nan")]
)
def test_what_is_no_weight(value):
    assert not is_share(value)
