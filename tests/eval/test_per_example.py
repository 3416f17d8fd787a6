"""What is written, scored and lost row by row, each row under its own adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.arrow import route_library
from compose.library import Library
from compose.slots import for_rows
from eval.generation import Sampling, generate
from eval.scoring import Batch, score
from lora_jax.errors import InputError
from lora_jax.families import t5

PROMPTS = [[1, 2, 3], [70, 71, 72, 73, 74, 75, 76, 77], [5], [9, 8, 7, 6]]
ROWS = [2, 0, 1, 1]
T5 = t5.Config(264, 32, 48, encoder_layers=2, layers=2, heads=4, head_width=8)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_each_prompt_is_continued_under_its_own_adapter(
    config, random_weights, random_lora, random_ia3, family
):
    config = T5 if family == "t5" else config
    weights, targets = random_weights(config), ["all-linear"]
    adapters = [{}, random_lora(config, 1, targets=targets), random_ia3(config, size=1.0)]

    def written(adapter):
        sampling = Sampling(max_new_tokens=6)
        return generate(config, weights, adapter, PROMPTS, stop=-1, sampling=sampling, tokens=30)

    found, alone = written(for_rows(adapters, ROWS)), list(map(written, adapters))
    assert found == [alone[which][row] for row, which in enumerate(ROWS)]
    assert len(set(map(str, alone))) == 3
    with pytest.raises(InputError, match="for 1 rows, and the batch has 4"):
        written(for_rows(adapters, [1]))


def test_questions_are_scored_each_under_its_own(config, weights, random_lora, random_tokens):
    library = Library(("a", "b"), (random_lora(config, 3), random_lora(config, 4)))
    adapters, rows = [{}, random_lora(config), route_library(library, top_k=1)], [1, 2, 0]
    prefix, rest = random_tokens(3, 6), random_tokens(3, 2, 4, seed=1)
    batch = Batch(
        prefix,
        -jnp.ones_like(prefix),
        jnp.zeros_like(prefix),
        rest,
        jnp.ones_like(rest),
        jnp.full((3, 2), 4.0),
        shared=1,
    )
    run = jax.jit(score, static_argnums=0)
    found = run(config, weights, for_rows(adapters, rows), batch)
    for row, which in enumerate(rows):
        one = jax.tree.map(lambda x, n=row: x[n : n + 1], batch)
        want = run(config, weights, adapters[which], one)[0]
        np.testing.assert_allclose(found[row], want, rtol=2e-6)
