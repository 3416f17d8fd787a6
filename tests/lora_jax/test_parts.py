import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.parts import attend, attention_mask, empty_cache, put, rms_norm, rotate
from lora_jax.rope import Rope, tables

KEYS = jax.random.split(jax.random.key(0), 4)


def test_rms_norm_has_unit_root_mean_square_and_its_gain():
    x = 5 * jax.random.normal(KEYS[0], (3, 64))
    y = rms_norm(x, jnp.full(64, 2.0), 1e-6)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(y**2, -1)), 2, rtol=1e-5)


def test_rms_norm_takes_its_mean_in_float32():
    x = jnp.full((1, 4096), 200.0, jnp.float16)  # 200² overflows the sum in float16
    np.testing.assert_allclose(rms_norm(x, jnp.ones(4096, jnp.float16), 1e-6), 1, rtol=1e-3)


def turned(x, positions, width=None):
    return rotate(x, tables(Rope(width or x.shape[-1]), positions))


def test_rotation_keeps_lengths_and_leaves_position_zero():
    x = jax.random.normal(KEYS[0], (1, 6, 2, 8))
    y = turned(x, jnp.arange(6)[None])
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(y[:, 0], x[:, 0], rtol=1e-6)


def test_narrow_tables_turn_a_heads_first_numbers_and_leave_the_rest():
    x = jax.random.normal(KEYS[0], (1, 6, 2, 8))
    y = turned(x, jnp.arange(6)[None], width=4)
    np.testing.assert_allclose(y[..., 4:], x[..., 4:])
    np.testing.assert_allclose(y[..., :4], turned(x[..., :4], jnp.arange(6)[None]), rtol=1e-6)


def test_scores_of_rotated_vectors_depend_on_their_distance_only():
    q, k = jax.random.normal(KEYS[0], (2, 1, 1, 1, 8))
    at = lambda x, n: turned(x, jnp.full((1, 1), n))  # noqa: E731
    near = jnp.sum(at(q, 7) * at(k, 4))
    np.testing.assert_allclose(jnp.sum(at(q, 103) * at(k, 100)), near, rtol=1e-4)
    assert abs(jnp.sum(at(q, 7) * at(k, 5)) - near) > 1e-3


def test_put_fills_slots_from_the_used_one_on():
    pages = put(jnp.zeros((2, 6, 3)), jnp.ones((2, 2, 3)), jnp.asarray(3))
    assert pages[0, :, 0].tolist() == [0, 0, 0, 1, 1, 0]


def mask_of(segments, window=None):
    segments = jnp.asarray(segments)
    positions = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    return attention_mask(segments, positions, segments, positions, window=window)[:, 0]


def test_a_query_sees_the_earlier_keys_of_its_own_segment_and_no_padding():
    mask = mask_of([[1, 1, 2, 2, 0]])
    assert mask[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_window_counts_the_query_itself(window):
    assert mask_of([[1] * 6], window)[0].sum(-1).tolist() == [min(n + 1, window) for n in range(6)]


def test_attention_equals_its_definition_with_grouped_heads():
    q = jax.random.normal(KEYS[0], (2, 5, 4, 8))
    k, v = jax.random.normal(KEYS[1], (2, 2, 5, 2, 8))
    mask = mask_of([[1] * 5] * 2)
    scores = jnp.einsum("BTHC,BSHC->BHTS", q, jnp.repeat(k, 2, 2)) / np.sqrt(8)
    shares = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    want = jnp.einsum("BHTS,BSHC->BTHC", shares, jnp.repeat(v, 2, 2))
    np.testing.assert_allclose(attend(q, k, v, mask[:, None]), want, rtol=1e-4, atol=1e-5)


def test_a_padding_query_that_sees_no_key_is_finite_with_a_finite_gradient():
    q, k, v = jax.random.normal(KEYS[0], (3, 1, 2, 2, 4))
    mask = mask_of([[1, 0]])[:, None]
    value, gradient = jax.jit(jax.value_and_grad(lambda q: attend(q, k, v, mask).sum()))(q)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_an_empty_cache_shows_nothing():
    cache = empty_cache(2, 3, 7, 1, 4, jnp.bfloat16)
    assert cache.keys.shape == (2, 3, 7, 1, 4) and cache.keys.dtype == jnp.bfloat16
    assert not cache.segments.any() and cache.used == 0


def test_a_negative_segment_is_a_prefix_that_every_later_one_sees():
    mask = mask_of([[-1, -1, 1, 2, 2]])
    assert mask[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
