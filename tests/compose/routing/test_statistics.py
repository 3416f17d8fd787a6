from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.arrow import routing_statistics
from compose.library import Routing
from compose.routing.build import route
from compose.routing.given import oracle, with_weights
from compose.routing.settings import ACTIVATIONS, GATES, SPECTR, UNIFORM
from lora_jax import models, selected

ROUTINGS = [
    Routing(top_k=2, inputs="unit"),
    Routing(top_k=2, inputs="standard", prototypes="shared", temperature="sqrt(d)"),
    Routing(top_k=3, weighting="uniform"),
    SPECTR,
    replace(SPECTR, router="spectr-code", weighting="softmax", mixing="outputs"),
    GATES,
    replace(ACTIVATIONS, top_k=5),
    UNIFORM,
]


@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: r.router)
def test_every_router_has_statistics(config, weights, library, random_tokens, routing):
    routed = route(library, routing)
    found = routing_statistics(config, weights, routed, random_tokens(2, 6))
    assert found.keys() == routed.keys()
    for one in found.values():
        assert one["share"].shape == (config.layers, 5)
        np.testing.assert_allclose(one["share"].sum(-1), 1, rtol=1e-5)
        assert np.all((one["relative_entropy"] >= 0) & (one["relative_entropy"] <= 1 + 1e-6))
        if routing.router == "uniform":
            np.testing.assert_allclose(one["share"], 0.2, rtol=1e-5)
        if "uniform" in (routing.router, routing.weighting):
            np.testing.assert_allclose(one["relative_entropy"], 1, rtol=1e-5)


def test_given_weights_have_statistics_too(config, weights, library, random_tokens):
    tokens = random_tokens(2, 6)
    for found in routing_statistics(config, weights, oracle(library, "x"), tokens).values():
        np.testing.assert_array_equal(found["share"], np.eye(5)[[2, 2]])
        assert not found["entropy"].any()
    rows = jnp.array([[1.0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0]])
    mixed = with_weights(library, rows, top_k=2)
    for found in routing_statistics(config, weights, mixed, tokens).values():
        np.testing.assert_allclose(found["share"], [[0.5, 0.25, 0.25, 0, 0]] * 2, rtol=1e-5)


@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: r.router)
def test_a_whole_model_is_the_same_by_either_path(
    config, weights, library, random_tokens, monkeypatch, routing
):
    routed, tokens, found = route(library, routing), random_tokens(2, 6), []
    for choice in (False, True):
        monkeypatch.setattr(selected, "worthwhile", lambda *_, choice=choice: choice)
        forward = jax.jit(lambda adapter: models.forward(config, weights, adapter, tokens).hidden)
        found.append(forward(routed))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-3)
