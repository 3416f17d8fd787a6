import jax
import jax.numpy as jnp
import numpy as np

from compose.merging.unlearning import ext_sub, ext_sub_vector, negmerge
from lora_jax.modules import LoRA

WEIGHTS = jnp.array([0.7, 0.4, 2.0])
extracted = jax.jit(ext_sub)


def unit(x):
    return x / np.linalg.norm(x)


def rows_ext_sub(expert, others, weights):
    """As the authors' code has it: output by output, on vectors of inputs."""
    result = weights[0] * expert.copy()
    for n, x in enumerate(expert):
        for other, weight in zip(others, weights[1:], strict=True):
            common = unit(unit(x) + unit(other[n]))
            result[n] = result[n] - weight * other[n] + weight * (other[n] @ common) * common
    return result


def test_ext_sub_is_the_authors_on_every_output(members, deltas, far):
    m = members()
    expert, *others = (delta.T for delta in deltas(m))
    want = rows_ext_sub(expert, others, np.asarray(WEIGHTS, np.float64)).T
    assert far(deltas(extracted(m, WEIGHTS)), want) < 1e-5


def test_ext_sub_leaves_what_the_two_share(members, deltas, far):
    m = members(count=1)
    twice = LoRA(jnp.concatenate([m.a, m.a]), jnp.concatenate([m.b, 2 * m.b]), m.scale)
    assert far(deltas(extracted(twice, jnp.ones(2))), deltas(m)[0]) < 1e-5
    against = twice.replace(b=twice.b * jnp.array([1.0, -1.0])[:, None, None])
    assert far(deltas(extracted(against, jnp.ones(2))), 3 * deltas(m)[0]) < 1e-5


def test_ext_sub_of_offsets_is_that_of_one_output(far):
    offsets = np.random.default_rng(0).standard_normal((3, 7))
    want = rows_ext_sub(offsets[:1], offsets[1:, None], np.asarray(WEIGHTS, np.float64))[0]
    assert far(ext_sub_vector(jnp.asarray(offsets, jnp.float32), WEIGHTS), want) < 1e-5


def test_ext_sub_has_a_gradient_where_a_module_does_nothing(members):
    m = members()
    m = m.replace(b=m.b.at[1].set(0).at[2, :, 0].set(0))
    slope = jax.jit(jax.grad(lambda m, w: jnp.sum(ext_sub(m, w).b ** 2), (0, 1)))
    slopes = slope(m, WEIGHTS)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(slopes))


def test_negmerge_keeps_the_mean_of_what_all_agree_on(members, deltas, far):
    m = members()
    taus = np.asarray(WEIGHTS, np.float64)[:, None, None] * deltas(m)
    same = np.abs(np.sign(taus).sum(0)) == 3
    want = np.where(same, taus.mean(0), 0)
    assert 0 < same.sum() < same.size
    assert far(jax.jit(negmerge)(m, WEIGHTS), want) < 1e-5
    dense = jnp.asarray(deltas(m), jnp.float32)
    assert far(negmerge(dense, WEIGHTS), want) < 1e-5
    assert far(negmerge(dense[:, 0], WEIGHTS), want[0]) < 1e-5


def test_negmerge_of_a_module_that_does_nothing_is_nothing(members):
    m = members(count=2)
    assert not np.any(negmerge(m.replace(b=m.b.at[1].set(0)), jnp.ones(2)))
