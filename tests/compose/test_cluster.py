"""Clusters that were planted are found; the similarities are those of a dense NumPy recipe."""

import jax
import numpy as np
import pytest

from compose.arithmetic import average
from compose.cluster import cluster_library, cluster_means
from compose.library import Library
from compose.merging.merge import merge
from lora_jax.errors import InputError

Q = "self_attn.q_proj"
NAMES = ("a1", "b1", "a2", "c1", "b2", "a3", "c2")
PLANTED = (("a1", "a2", "a3"), ("b1", "b2"), ("c1", "c2"))


@pytest.fixture(scope="module")
def library(lora):
    """Seven modules around three, in mixed order."""

    def near(centre, noise):
        return jax.tree.map(lambda x, y: x + 0.3 * y, lora(centre), lora(noise))

    adapters = tuple(near("abc".index(name[0]), 10 + n) for n, name in enumerate(NAMES))
    return Library(NAMES, adapters)


def flat(adapter):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(adapter)])


def mttl_cosines(library, sparsity, components):
    """MTTL's recipe as its code has it, on whole vectors."""
    rows = np.stack([flat(dict(adapter)) for adapter in library.adapters])
    if sparsity:
        rows[np.abs(rows) <= np.quantile(np.abs(rows), sparsity, axis=1)[:, None]] = 0
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    embedded = (u * s)[:, :components]
    embedded /= np.linalg.norm(embedded, axis=1, keepdims=True)
    return embedded @ embedded.T


@pytest.mark.parametrize("method", ["mttl", "delta"])
def test_planted_clusters_are_found(library, method):
    found = cluster_library(library, 3, method)
    assert found.groups == PLANTED and found.names == NAMES and found.method == method
    assert found.labels() == ("cluster_1", "cluster_2", "cluster_3")


@pytest.mark.parametrize("components", [64, 2])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.0])
def test_mttl_cosines_are_those_of_its_code(library, sparsity, components):
    found = cluster_library(library, 2, sparsity=sparsity, components=components)
    want = mttl_cosines(library, sparsity, components)
    np.testing.assert_allclose(found.similarity, want, atol=1e-6)


def test_delta_cosines_are_those_of_dense_deltas_and_know_no_factors(library, dense):
    rows = np.stack(
        [np.concatenate([np.ravel(x) for x in dense(m).values()]) for m in library.adapters]
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = cluster_library(library, 3, "delta")
    np.testing.assert_allclose(found.similarity, rows @ rows.T, atol=2e-6)
    turned = library.map(
        lambda x: {p: m.replace(a=-m.a, b=-m.b, scale=m.scale) for p, m in x.items()}
    )
    both = Library((*NAMES, *(f"-{n}" for n in NAMES)), (*library.adapters, *turned.adapters))
    doubled = cluster_library(both, 3, "delta").groups
    assert doubled[0] == ("a1", "a2", "a3", "-a1", "-a2", "-a3")
    assert cluster_library(both, 3, "mttl").groups != doubled


def test_inertia_is_the_least_that_any_grouping_has(library):
    found = cluster_library(library, 3, "delta")
    rows = found.similarity

    def inertia(labels):
        groups = [rows[[n for n, label in enumerate(labels) if label == k]] for k in set(labels)]
        return sum(((group - group.mean(axis=0)) ** 2).sum() for group in groups)

    every = np.ndindex(*[3] * len(NAMES))
    least = min(inertia(labels) for labels in every if len(set(labels)) == 3)
    assert found.inertia == pytest.approx(least, rel=1e-9)


def test_ragged_modules_are_padded_and_thresholds_their_own(lora):
    x, y = lora(0), lora(1, rank=2, scale=0.5, paths=(Q,))
    near = {p: m.replace(a=m.a * 1.01) for p, m in y.items()}
    found = cluster_library(Library(("x", "y", "near", "none"), (x, y, near, {})), 3)
    assert found.groups == (("x",), ("y", "near"), ("none",))
    assert found.similarity[1, 2] > 0.999 and found.similarity[1, 1] == pytest.approx(1)
    assert not found.similarity[3].any()


def test_as_many_clusters_as_modules_and_one(library):
    assert cluster_library(library, 7).groups == tuple((name,) for name in NAMES)
    assert cluster_library(library, 1).groups == (NAMES,)


def test_one_seed_gives_one_answer(library):
    first, again = (cluster_library(library, 4, "delta", restarts=1) for _ in range(2))
    assert first.groups == again.groups and first.inertia == again.inertia


def test_means_are_averages_or_merges_of_the_groups(library):
    found = cluster_library(library, 3)
    means = cluster_means(library, found)
    by_name = dict(zip(library.names, library.adapters, strict=True))
    assert means.names == found.labels() and means.routing is None
    for group, adapter in zip(found.groups, means.adapters, strict=True):
        want = average([by_name[name] for name in group], space="delta")
        np.testing.assert_array_equal(adapter[Q].a, want[Q].a)
    merged = cluster_means(library, found, method="tsv", keep=2)
    want, _ = merge([by_name["b1"], by_name["b2"]], "tsv", keep=2)
    np.testing.assert_allclose(merged.adapters[1][Q].b, want[Q].b, rtol=1e-6)


def test_what_makes_no_sense_is_told_at_once(library, ia3):
    with pytest.raises(InputError, match=r"k must lie between 1 and the 7.*sparsity.*restarts"):
        cluster_library(library, 8, sparsity=1.0, restarts=0)
    with pytest.raises(InputError, match="IA3, which mttl does not flatten; take delta"):
        cluster_library(Library(("x", "y"), (ia3(0), ia3(1))), 1)
    assert cluster_library(Library(("x", "y"), (ia3(0), ia3(1))), 2, "delta").groups
    with pytest.raises(InputError, match="unknown method 'ward'"):
        cluster_library(library, 2, "ward")
    same = Library(("x", "y"), library.adapters[:1] * 2)
    with pytest.raises(InputError, match="k is 2, but fewer"):
        cluster_library(same, 2)
