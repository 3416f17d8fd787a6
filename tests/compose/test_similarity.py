"""Similarities of modules, against dense NumPy; and the search for the nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from compose.arithmetic import weighted_sum
from compose.library import Library
from compose.similarity import nearest, principal_angles, similarity
from compose.slots import for_rows
from lora_jax.errors import InputError
from lora_jax.modules import DoRA, Saved

Q, UP = "self_attn.q_proj", "mlp.up_proj"


@pytest.fixture(scope="module")
def library(lora):
    """Modules of unequal ranks, scales and targets, one of rank 2 in three, and nothing."""
    x, y = lora(0), lora(1, rank=2, scale=-0.5)
    flat = {
        p: m.replace(a=m.a.at[..., 2].set(m.a[..., 0] - m.a[..., 1])) for p, m in lora(2).items()
    }
    near = weighted_sum([x, y], [1.0, 0.1], space="delta")
    none = jax.tree.map(jnp.zeros_like, x)
    adapters = (x, y, flat, near, lora(3, paths=(UP,)), none, {})
    return Library(("x", "y", "flat", "near", "up", "none", "base"), adapters)


def cosine(one, other):
    size = np.linalg.norm(one) * np.linalg.norm(other)
    return 0.0 if size == 0 else float(np.ravel(one) @ np.ravel(other)) / size


def deltas(dense, library, path, shape):
    return [dense(m)[path] if path in m else np.zeros(shape) for m in library.adapters]


SHAPES = {Q: (2, 7, 6), UP: (2, 5, 9)}


def square(function, members):
    return np.array([[function(one, other) for other in members] for one in members])


def test_cosines_are_those_of_dense_deltas(library, dense):
    found = similarity(library)
    every = {path: deltas(dense, library, path, shape) for path, shape in SHAPES.items()}
    whole = [np.concatenate([np.ravel(every[p][n]) for p in every]) for n in range(7)]
    np.testing.assert_allclose(found.overall, square(cosine, whole), atol=2e-6)
    for path, members in every.items():
        np.testing.assert_allclose(found.projections[path], square(cosine, members), atol=2e-6)
        for layer in range(2):
            want = square(cosine, [member[layer] for member in members])
            np.testing.assert_allclose(found.layers[path][layer], want, atol=2e-6)
    assert found.names == library.names and found.measure == "cosine"


def span(delta, side):
    u, s, vt = np.linalg.svd(delta)
    rank = int((s > 1e-5 * max(s[0], 1e-9)).sum())
    return u[:, :rank] if side == "input" else vt[:rank].T


@pytest.mark.parametrize("side", ["input", "output"])
def test_overlaps_are_those_of_dense_deltas_subspaces(library, dense, side):
    def overlap(one, other):
        one, other = span(one, side), span(other, side)
        least = min(one.shape[1], other.shape[1])
        return np.sum((one.T @ other) ** 2) / least if least else np.nan

    found, places = similarity(library, side), []
    for path, shape in SHAPES.items():
        members = deltas(dense, library, path, shape)
        each = [square(overlap, [member[layer] for member in members]) for layer in range(2)]
        np.testing.assert_allclose(found.layers[path], np.nan_to_num(each), atol=1e-5)
        places += each
    both = np.maximum(np.sum(~np.isnan(places), axis=0), 1)
    mean = np.sum(np.nan_to_num(places), axis=0) / both
    np.testing.assert_allclose(found.overall, mean, atol=1e-5)


@pytest.mark.parametrize("side", ["input", "output"])
def test_angles_are_scipys_and_exact_where_they_are_small(library, dense, lora, side):
    x, y, flat = library.adapters[:3]
    for one, other in ((x, y), (x, flat)):
        found = principal_angles(one, other, side)
        for path, layers in found.items():
            for layer, angles in enumerate(layers):
                spans = (span(dense(m)[path][layer], side) for m in (one, other))
                want = np.sort(scipy.linalg.subspace_angles(*spans))
                np.testing.assert_allclose(angles, want, atol=1e-5)
    assert [len(angles) for angles in found[Q]] == [2, 2]
    itself = principal_angles(x, x, side)
    assert max(angle for layers in itself.values() for angles in layers for angle in angles) < 1e-6
    assert principal_angles(x, {}, side) == {}
    assert [a.size for a in principal_angles(x, library.adapters[5], side)[Q]] == [0, 0]


def test_what_two_modules_differ_by_is_measured_where_ranks_cancel(lora):
    x, y = lora(0), lora(1)
    small = weighted_sum([x, x, y], [1.0, -1.0, 1e-3], space="delta")
    for measure in ("cosine", "input", "output"):
        found = similarity(Library(("y", "small"), (y, small)), measure)
        np.testing.assert_allclose(found.overall, 1, atol=1e-3)


def test_the_nearest_are_found_by_name(library, lora):
    x = library.adapters[0]
    assert nearest(library, x, 1) == [("x", pytest.approx(1, abs=1e-6))]
    query = lora(9, rank=4)
    every = Library((*library.names, "query"), (*library.adapters, query))
    for measure in ("cosine", "input", "output"):
        found = nearest(library, query, 7, measure=measure)
        assert [value for _, value in found] == sorted((v for _, v in found), reverse=True)
        both = similarity(every, measure)
        for name, value in found:
            assert abs(both.overall[-1][both.names.index(name)] - value) < 1e-6
        assert len({name for name, _ in found}) == 7


def test_ia3_has_cosines_and_no_subspaces(ia3):
    x, y = ia3(0), ia3(1)
    library = Library(("x", "y"), (x, y))
    found = similarity(library).overall[0, 1]
    assert abs(found - cosine(x[UP].offset, y[UP].offset)) < 1e-6
    with pytest.raises(InputError, match=r"no input to compare: mlp\.up_proj holds IA3"):
        similarity(library, "input")


def test_one_program_serves_libraries_of_one_size(lora):
    from compose import similarity as module

    before = module._compared._cache_size()
    for seed in range(3):
        similarity(Library(("x", "y"), (lora(seed), lora(seed + 1))))
    assert module._compared._cache_size() <= before + 1


def test_what_cannot_be_compared_is_refused_by_name(lora, ia3):
    x, m = lora(), lora()[UP]
    dora = {UP: DoRA(m.a, m.b, jnp.ones((2, 9)))}
    with pytest.raises(InputError, match=r"no cosine to compare: mlp\.up_proj holds DoRA"):
        similarity(Library(("x", "dora"), (x, dora)))
    with pytest.raises(InputError, match="up_proj holds PerExample"):
        nearest(Library(("x",), (x,)), for_rows([x], [0]))
    with pytest.raises(InputError, match="cannot combine IA3"):
        nearest(Library(("x",), (x,)), ia3())
    with pytest.raises(InputError, match="unknown measure 'size'; choose cosine, input, output"):
        similarity(Library(("x",), (x,)), "size")
    with pytest.raises(InputError, match="count must be at least 1"):
        nearest(Library(("x",), (x,)), x, 0)
    whole = {**x, "head": Saved(jnp.ones((3, 3)))}
    assert similarity(Library(("x", "whole"), (x, whole))).projections.keys() == x.keys()
