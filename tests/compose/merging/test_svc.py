import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose import arithmetic
from compose.merging.svc import calibrated, svc, svc_vector
from lora_jax.errors import InputError
from lora_jax.modules import DoRA, LoRA, Saved

UP = "mlp.up_proj"
WEIGHTS = jnp.array([0.7, 0.4, 2.0])
ALPHAS = pytest.mark.parametrize("alpha", [1.0, 0.1])
merged = jax.jit(svc, static_argnames="alpha")


def dense_svc(total, tasks, alpha):
    """Equations 4 to 9 on (O, I) matrices, one singular direction after another."""
    u, s, vt = np.linalg.svd(total.T, full_matrices=False)
    for r in range(len(s)):
        answers = [u[:, r] @ task.T for task in tasks]
        counts = [u[:, r] @ total.T @ a / (a @ a) if a @ a else 0.0 for a in answers]
        s[r] *= len(tasks) / sum(max(alpha, count) for count in counts)
    return ((u * s) @ vt).T


@ALPHAS
def test_it_is_the_dense_method_after_a_weighted_sum(members, deltas, far, alpha):
    m = members()
    total = np.einsum("M,MIO->IO", WEIGHTS, deltas(m))
    assert far(deltas(merged(m, WEIGHTS, alpha=alpha)), dense_svc(total, deltas(m), alpha)) < 1e-5


def test_the_authors_other_version_of_the_gain_is_another(members, deltas, far):
    tasks = deltas(members(rows=40, width=30))
    total = tasks.sum(0)
    u, s, vt = np.linalg.svd(total.T, full_matrices=False)
    for r in range(6):
        answers = [u[:, r] @ task.T for task in tasks]
        counts = np.array([u[:, r] @ total.T @ a / (a @ a) for a in answers])
        s[r] /= max(counts.mean(), 1) if np.all(counts > 0) else 1
    assert far(((u * s) @ vt).T, dense_svc(total, tasks, 1)) == pytest.approx(0.021, abs=5e-4)


def test_equal_modules_are_averaged_and_orthogonal_ones_summed(members, deltas, far):
    m = members(count=1)
    same = LoRA(*(jnp.concatenate([x] * 4) for x in (m.a, m.b)), m.scale)
    assert far(deltas(merged(same, jnp.ones(4))), deltas(m)[0]) < 1e-5
    apart = LoRA(
        jnp.stack([jnp.eye(11)[:, :2], jnp.eye(11)[:, 4:6]]),
        jnp.stack([jnp.diag(jnp.arange(1.0, 10))[2:4], jnp.eye(9)[7:9]]),
    )
    assert far(deltas(merged(apart, jnp.ones(2))), deltas(apart).sum(0)) < 1e-5


@ALPHAS
def test_any_merged_adapter_is_calibrated_by_its_modules(lora, dense, far, alpha):
    ragged = [{"rank": 2}, {"rank": 3, "scale": 0.5}, {"rank": 1}]
    adapters = [lora(n, paths=(UP,), **more) for n, more in enumerate(ragged)]
    total = arithmetic.factor_sum([lora(n, paths=(UP,)) for n in (0, 1)], [0.5, 0.5])
    found = dense(calibrated(total, adapters, alpha=alpha))
    for path, layers in dense(total).items():
        for n, layer in enumerate(layers):
            tasks = [dense(adapter)[path][n] for adapter in adapters]
            assert far(found[path][n], dense_svc(layer, tasks, alpha)) < 1e-5


def test_calibrating_a_sum_is_the_method_itself(lora, dense, far):
    adapters = [lora(n, paths=(UP,)) for n in (0, 1)]
    total = arithmetic.delta_sum(adapters, [1.0, 1.0])
    found = dense(calibrated(total, adapters))
    for path in total:
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *(adapter[path] for adapter in adapters))
        want = [merged(jax.tree.map(lambda x, n=n: x[:, n], stacked), jnp.ones(2)) for n in (0, 1)]
        assert far(found[path], np.stack([m.scale * m.a @ m.b for m in want])) < 1e-5


@ALPHAS
def test_an_ia3_vector_has_one_gain(ia3, far, alpha):
    offsets = jnp.stack([ia3(seed)[UP].offset[0] for seed in range(3)])
    total = WEIGHTS @ offsets
    x, y = (np.asarray(v, np.float64) for v in (total, offsets))
    want = x * 3 / np.maximum(alpha, y @ x / (y**2).sum(1)).sum()
    assert far(svc_vector(offsets, WEIGHTS, alpha=alpha), want) < 1e-5


def test_ia3_adapters_are_calibrated_layer_by_layer(ia3, far):
    adapters = [ia3(0), ia3(1)]
    found = calibrated(arithmetic.delta_sum(adapters, [1.0, 1.0]), adapters)[UP].offset
    for n in (0, 1):
        offsets = jnp.stack([adapter[UP].offset[n] for adapter in adapters])
        assert far(found[n], svc_vector(offsets, jnp.ones(2))) < 1e-6


def test_a_projection_without_layers_and_a_weight_kept_whole_are_taken(lora, dense, far):
    one = jax.tree.map(lambda x: x[0], lora(0, paths=(UP,)))
    found = calibrated({**one, "head": Saved(jnp.ones(3))}, [{**one, "head": Saved(jnp.ones(3))}])
    assert np.all(found.pop("head").value == 1)
    assert all(far(delta, dense(one)[path]) < 1e-5 for path, delta in dense(found).items())


def test_what_cannot_be_calibrated_is_refused_by_its_path(lora):
    one, other = lora(0), lora(0, paths=(UP,))
    with pytest.raises(InputError, match=r"self_attn\.q_proj: changed by the merged module"):
        calibrated(one, [other])
    m = one[UP]
    dora = {UP: DoRA(m.a, m.b, jnp.ones((2, 9)))}
    with pytest.raises(InputError, match=r"mlp\.up_proj: only IA3 and LoRA"):
        calibrated(dora, [dora])
