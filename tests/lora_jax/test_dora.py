from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.dora import column_norms, gain, with_magnitudes
from lora_jax.errors import InputError
from lora_jax.merge import merge, unmerge
from lora_jax.modules import DoRA, LoRA
from lora_jax.project import Dropout, dropped, project


@pytest.fixture
def module():
    """A DoRA from 6 to 5."""
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = jax.random.normal(keys[0], (6, 2)), jax.random.normal(keys[1], (2, 5))
    return DoRA(a, b, 0.5 + jax.random.uniform(keys[2], (5,)), 0.7)


@pytest.fixture
def kernel():
    return jax.random.normal(jax.random.key(9), (6, 5))


def whole(kernel, module):
    """The changed kernel, as the paper's equation 5 has it."""
    changed = kernel + module.scale * module.a @ module.b
    return module.magnitude * changed / jnp.linalg.norm(changed, axis=0)


def test_norms_need_no_sum_of_kernels(module, kernel):
    for scale in (0.7, -3.0, 0.0):
        changed = kernel + scale * module.a @ module.b
        norms = column_norms(kernel, module.a, module.b, scale)
        np.testing.assert_allclose(norms, jnp.linalg.norm(changed, axis=0), rtol=1e-5)


def test_a_column_that_vanishes_has_norm_zero_and_no_nan(module):
    kernel = -module.scale * module.a @ module.b
    norms = column_norms(kernel, module.a, module.b, module.scale)
    np.testing.assert_allclose(norms, 0, atol=1e-3)
    assert jnp.isfinite(gain(jnp.zeros((6, 5)), replace(module, b=0 * module.b))).all()


def test_the_projection_is_the_papers(module, kernel):
    x, bias = jax.random.normal(jax.random.key(4), (3, 6)), jnp.arange(5.0)
    got = project(x, kernel, bias, module)
    np.testing.assert_allclose(got, x @ whole(kernel, module) + bias, atol=1e-5)


def test_a_magnitude_of_zero_is_plain_lora(module, kernel):
    x = jax.random.normal(jax.random.key(4), (3, 6))
    plain = project(x, kernel, None, LoRA(module.a, module.b, module.scale))
    got = project(x, kernel, None, replace(module, magnitude=0 * module.magnitude))
    np.testing.assert_allclose(got, plain, atol=1e-6)
    half = replace(module, magnitude=module.magnitude.at[:2].set(0))
    np.testing.assert_allclose(project(x, kernel, None, half)[:, :2], plain[:, :2], atol=1e-6)
    nothing = jax.tree.map(jnp.zeros_like, module)
    assert (project(x, kernel, None, nothing) == x @ kernel).all()


def test_no_gradient_passes_through_the_norm(module, kernel):
    x = jax.random.normal(jax.random.key(4), (3, 6))
    norms = jnp.linalg.norm(kernel + module.scale * module.a @ module.b, axis=0)

    def held(module):
        changed = kernel + module.scale * module.a @ module.b
        return jnp.sum(jnp.sin(x @ (module.magnitude * changed / norms)))

    got = jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(project(x, kernel, None, m)))))(module)
    want = jax.jit(jax.grad(held))(module)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), got, want)
    free = jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(x @ whole(kernel, m)))))(module)
    assert not np.allclose(free.a, want.a, atol=1e-3)


def test_dropout_reaches_both_terms(module, kernel):
    """PEFT's training forward: the base as it is, and what DoRA adds on the dropped input."""
    x, dropout = jax.random.normal(jax.random.key(4), (3, 6)), Dropout(jax.random.key(5), 0.5)
    seen = dropped(x, dropout)
    want = x @ kernel + seen @ (whole(kernel, module) - kernel)
    np.testing.assert_allclose(project(x, kernel, None, module, dropout), want, atol=1e-5)


@pytest.fixture
def adapter(config, weights, random_lora):
    """A DoRA on some projections, moved from where it began."""
    lora = random_lora(config)
    new = with_magnitudes({path: replace(m, b=0 * m.b) for path, m in lora.items()}, weights)
    grown = {path: replace(m, b=lora[path].b) for path, m in new.items()}
    return {path: replace(m, magnitude=1.2 * m.magnitude) for path, m in grown.items()}


def test_a_new_dora_is_the_identity(config, weights, random_lora, random_tokens, hidden):
    lora = {path: replace(m, b=0 * m.b) for path, m in random_lora(config).items()}
    new, tokens = with_magnitudes(lora, weights), random_tokens(1, 5)
    plain = hidden(config, weights, {}, tokens)
    np.testing.assert_allclose(hidden(config, weights, new, tokens), plain, atol=1e-5)
    with pytest.raises(InputError, match=r"q_proj: DoRA has no lora_bias"):
        with_magnitudes({"self_attn.q_proj": LoRA(*lora["self_attn.q_proj"].a, 1, 2)}, weights)


def test_a_merged_base_equals_the_adapted_base(config, weights, adapter, random_tokens, hidden):
    tokens = random_tokens(2, 6)
    want = hidden(config, weights, adapter, tokens)
    np.testing.assert_allclose(hidden(config, merge(weights, adapter), {}, tokens), want, atol=1e-4)
    with pytest.raises(InputError, match=r"\(DoRA\).* out of a base again"):
        unmerge(weights, adapter)


def test_embedding_and_unembedding(config, weights, random_tokens, hidden):
    """Each for itself, though the base has one for both; merged, it has two."""
    keys = jax.random.split(jax.random.key(0), 4)
    lora = {
        "embed": LoRA(jax.random.normal(keys[0], (264, 2)), jax.random.normal(keys[1], (2, 32))),
        "unembed": LoRA(jax.random.normal(keys[2], (32, 2)), jax.random.normal(keys[3], (2, 264))),
    }
    kernels = {"embed": weights["embed"], "unembed": weights["embed"].T}
    for path, rows in (("embed", 32), ("unembed", 264)):
        module, tokens = lora[path], random_tokens(1, 5)
        dora = DoRA(module.a, module.b, jnp.linspace(0.5, 2, rows))
        adapter = {path: dora}
        out = hidden(config, weights, adapter, tokens)
        logits = models.unembed(config, weights, adapter, out)
        changed = {**weights, "unembed": weights["embed"].T, path: whole(kernels[path], dora)}
        states = hidden(config, changed, {}, tokens)
        np.testing.assert_allclose(logits, states @ changed["unembed"], atol=1e-3)
        merged = merge(weights, adapter)
        np.testing.assert_allclose(merged[path], changed[path], atol=1e-4)
