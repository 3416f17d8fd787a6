import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.merging import truncate
from compose.merging.truncate import truncated


@pytest.fixture
def big(monkeypatch):
    """Every matrix counts as a big one."""
    monkeypatch.setattr(truncate, "SMALL", 0)


def matrix(kind, rows=90, columns=130):
    random = np.random.default_rng(0)
    flat = random.standard_normal((rows, columns))
    if kind == "flat":
        return flat.astype(np.float32)
    u, _, vt = np.linalg.svd(flat, full_matrices=False)
    s = {"steep": 0.7 ** np.arange(90), "slow": 1 / np.arange(1.0, 91)}[kind]
    return (u * s[: u.shape[1]] @ vt).astype(np.float32)


def least(x, rank):
    s = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    return np.linalg.norm(s[rank:]) / np.linalg.norm(s)


@pytest.mark.parametrize("kind", ["flat", "steep", "slow"])
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("rank", [1, 8])
def test_a_big_matrix_loses_what_numpys_svd_says(big, kind, tall, rank):
    x = matrix(kind).T if tall else matrix(kind)
    a, b, error = jax.jit(truncated, static_argnums=1)(x, rank)
    assert a.shape == (x.shape[0], rank) and b.shape == (rank, x.shape[1])
    np.testing.assert_allclose(a.T @ a, np.eye(rank), atol=1e-5)
    lost = np.linalg.norm(np.float64(x) - np.float64(a) @ np.float64(b)) / np.linalg.norm(x)
    np.testing.assert_allclose(error, lost, rtol=1e-3, atol=1e-6)
    assert least(x, rank) - 1e-6 <= lost <= 1.001 * least(x, rank) + 1e-5


def test_a_big_matrix_of_that_rank_or_less_comes_back(big):
    for true in (0, 2, 5):
        x = matrix("flat")[:, :true] @ matrix("flat")[:true]
        a, b, error = truncated(jnp.asarray(x), 5)
        np.testing.assert_allclose(a @ b, x, atol=1e-4)
        assert error < 1e-5


@pytest.mark.parametrize(("rank", "kept"), [(3, 3), (40, 6)])
def test_a_small_matrix_has_its_exact_svd(rank, kept):
    x = matrix("flat", 6, 9)
    a, b, error = truncated(jnp.asarray(x), rank)
    assert a.shape == (6, kept) and b.shape == (kept, 9)
    np.testing.assert_allclose(error, least(x, rank), atol=1e-6)


def test_gradients_of_a_small_matrix_are_exact_and_of_a_big_one_along_its_directions(
    big, monkeypatch
):
    x, step = jnp.asarray(matrix("slow")), 1e-2 * jnp.asarray(matrix("flat"))

    def kept(x):
        a, b, _ = truncated(x, 4)
        return jnp.sum(a @ b * step)

    a, _, _ = truncated(x, 4)
    np.testing.assert_allclose(jax.grad(kept)(x), a @ (a.T @ step), atol=1e-5)
    monkeypatch.setattr(truncate, "SMALL", 256)
    change = (kept(x + 0.1 * step) - kept(x - 0.1 * step)) / 0.2
    np.testing.assert_allclose(jnp.sum(jax.grad(kept)(x) * step), change, rtol=0.05)
