import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.activations import ACTIVATIONS

# At -1 and 2, to six places: x Φ(x), its tanh form, x σ(1.702 x), and the rest by hand.
EXACT, TANH = (-0.158655, 1.954500), (-0.158808, 1.954598)
VALUES = {
    "gelu": EXACT,
    "gelu_python": EXACT,
    "gelu_new": TANH,
    "gelu_fast": TANH,
    "gelu_accurate": TANH,
    "gelu_pytorch_tanh": TANH,
    "quick_gelu": (-0.154204, 1.935659),
    "relu": (0, 2),
    "relu2": (0, 4),
    "silu": (-0.268941, 1.761594),
    "swish": (-0.268941, 1.761594),
    "tanh": (-0.761594, 0.964028),
}


def test_every_activation_has_its_value():
    assert VALUES.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", VALUES)
def test_activations_are_the_functions_of_their_names(name):
    found = ACTIVATIONS[name](jnp.asarray([-1.0, 2.0]))
    np.testing.assert_allclose(found, VALUES[name], atol=2e-6)
