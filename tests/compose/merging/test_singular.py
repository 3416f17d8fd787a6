import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.merging.singular import iso_c, iso_cts, tsv
from lora_jax.errors import InputError
from lora_jax.modules import LoRA

WEIGHTS = jnp.array([0.7, -1.3, 2.0])
run_tsv = jax.jit(tsv, static_argnames="keep")
run_iso_c = jax.jit(iso_c)
run_iso_cts = jax.jit(iso_cts, static_argnames="common")


def polar(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def dense_tsv(deltas, weights, keep):
    """As the authors' code has it, on (O, I) matrices, with the triplets that are there."""
    us, ss, vs = [], [], []
    for delta, weight in zip(deltas, weights, strict=True):
        u, s, vt = np.linalg.svd(delta.T, full_matrices=False)
        us, ss, vs = [*us, u[:, :keep]], [*ss, weight * s[:keep]], [*vs, vt[:keep]]
    return (polar(np.hstack(us)) @ np.diag(np.hstack(ss)) @ polar(np.vstack(vs))).T


def dense_iso_c(deltas, weights):
    u, s, vt = np.linalg.svd(np.einsum("M,MIO->IO", weights, deltas))
    rank = (s > 1e-9 * s[0]).sum()
    return s[:rank].mean() * u[:, :rank] @ vt[:rank]


def dense_iso_cts(deltas, weights, size, common):
    """As the authors' code has it, on (O, I) matrices, with `size` for their smaller side."""
    count = len(deltas)
    own = round((size - int(size * common)) / count)
    shared = size - own * count
    tasks = [weight * delta.T for weight, delta in zip(weights, deltas, strict=True)]
    u, s, vt = np.linalg.svd(sum(tasks), full_matrices=False)
    us, ss, vs = [u[:, :shared]], [s[:shared]], [vt[:shared]]
    for task in tasks:
        rest = task - us[0] @ us[0].T @ task
        u, s, vt = np.linalg.svd(rest, full_matrices=False)
        us, ss, vs = [*us, u[:, :own]], [*ss, s[:own]], [*vs, vt[:own]]
    return (np.hstack(ss).mean() * polar(np.hstack(us)) @ polar(np.vstack(vs))).T


@pytest.mark.parametrize("keep", [None, 1, 2])
def test_tsv_is_the_dense_method_on_the_triplets_that_are_there(members, deltas, far, keep):
    m = members(rank=3)  # three of each would be all of width 9
    found = deltas(run_tsv(m, WEIGHTS, keep=keep))
    assert far(found, dense_tsv(deltas(m), WEIGHTS, keep or 3)) < 1e-5


def test_tsv_keeps_of_each_module_what_fits_side_by_side(members, deltas, far):
    m = members(rank=4)
    found = run_tsv(m, WEIGHTS)
    assert found.a.shape == (11, 9)
    assert far(deltas(found), dense_tsv(deltas(m), WEIGHTS, 3)) < 1e-5


def test_tsv_of_modules_in_orthogonal_subspaces_is_their_sum(deltas, far, members):
    m = members(count=2, rank=1)
    a = jnp.stack([jnp.eye(11)[:, :1], jnp.eye(11)[:, 4:5]])
    b = jnp.stack([jnp.eye(9)[2:3], jnp.eye(9)[7:8]])
    m = m.replace(a=a, b=b)
    assert far(deltas(run_tsv(m, jnp.ones(2))), deltas(m).sum(0)) < 1e-6


def test_iso_c_gives_every_direction_of_the_sum_the_mean_strength(members, deltas, far):
    m = members()
    found = run_iso_c(m, WEIGHTS)
    assert far(deltas(found), dense_iso_c(deltas(m), WEIGHTS)) < 1e-5
    s = np.linalg.svd(deltas(found), compute_uv=False)
    np.testing.assert_allclose(s[:6], s[0], rtol=1e-5)
    assert s[6] < 1e-5 * s[0]


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_is_the_dense_method(members, deltas, far, common):
    m = members()
    found = deltas(run_iso_cts(m, WEIGHTS, common=common))
    assert far(found, dense_iso_cts(deltas(m), np.asarray(WEIGHTS), 6, common)) < 1e-5


def test_iso_cts_with_everything_in_common_is_iso_c(members, deltas, far):
    m = members()
    assert far(deltas(run_iso_cts(m, WEIGHTS, common=1.0)), deltas(run_iso_c(m, WEIGHTS))) < 1e-5


@pytest.mark.parametrize("method", [run_tsv, run_iso_c, run_iso_cts])
def test_ranks_of_padding_take_no_part(members, deltas, far, method):
    m = members()
    grown = m.replace(
        a=jnp.pad(m.a, [(0, 0), (0, 0), (0, 1)]), b=jnp.pad(m.b, [(0, 0), (0, 1), (0, 0)])
    )
    found = deltas(method(grown, WEIGHTS))
    assert far(found, deltas(method(m, WEIGHTS))) < 1e-5


def test_iso_cts_of_unequal_ranks_knows_no_order_and_follows_the_modules_size(members, deltas, far):
    m = members(rank=4)
    m = m.replace(b=m.b.at[0, 2:].set(0).at[2, 1:].set(0))  # ranks 2, 4 and 1
    found = deltas(run_iso_cts(m, WEIGHTS))
    assert far(found, dense_iso_cts(deltas(m), np.asarray(WEIGHTS), 7, 0.8)) < 1e-5
    turned = LoRA(m.a[::-1], m.b[::-1], m.scale)
    assert far(deltas(run_iso_cts(turned, WEIGHTS[::-1])), found) < 1e-5
    assert far(deltas(run_iso_cts(m.replace(b=3 * m.b), WEIGHTS)), 3 * found) < 1e-5


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (tsv, {"keep": 0}, "keep must be at least 1"),
        (iso_cts, {"common": 1.5}, "at most 1; got 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(members, method, options, message):
    with pytest.raises(InputError, match=message):
        method(members(), WEIGHTS, **options)
