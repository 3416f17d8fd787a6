"""Columns that stack are measured together, and each as if it were alone."""

import numpy as np
import pytest

from compose.expression import evaluate
from compose.library import Library
from eval import batches, compare, devices, scoring


@pytest.fixture(scope="module")
def columns(config, random_lora, random_ia3):
    """The base, LoRA modules of unlike rank, scale and targets, IA3, and two routed libraries."""
    small = random_lora(config, 1, targets=("q_proj",), rank=2, alpha=1.0)
    library = Library(("a", "b"), (random_lora(config, 2), random_lora(config, 3)))
    inputs = {"lib": library}
    return [
        random_ia3(config),
        {},
        random_lora(config),
        evaluate("arrow(lib, top_k=1)", inputs),
        small,
        evaluate("arrow(lib, top_k=2)", inputs),
    ]


def test_stacks_by_kind(columns):
    found = [stack.columns for stack in compare.stacks(columns)]
    assert found == [(0,), (2, 4, 1), (3,), (5,)]


def test_the_base_joins_ia3_where_there_is_no_lora(columns):
    assert [stack.columns for stack in compare.stacks(columns[:2])] == [(0, 1)]


def test_routed_modules_of_one_structure_stack(columns):
    assert [s.columns for s in compare.stacks([columns[3], {}, columns[3]])] == [(0, 2), (1,)]


def test_stacked_equals_alone(config, weights, columns, encoded):
    planned = batches.plan(encoded("answer_mean"), tokens=400, program=10_000)
    run = devices.spread(scoring.score, config, weights, "one")
    together = compare.measure(run, compare.stacks(columns), planned, "test")
    for adapter, found in zip(columns, together, strict=True):
        [alone] = compare.measure(run, compare.stacks([adapter]), planned, "test")
        for one, other in zip(found, alone, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
