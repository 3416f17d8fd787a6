import jax
import jax.numpy as jnp
import numpy as np

from compose.slots import make_slots, put
from lora_jax.modules import LoRA, PerExample
from lora_jax.project import project
from scripts.per_example_cost import _passes, in_turn, random_lora


def test_the_benchmarked_formulations_agree():
    kernel, members = random_lora((16, 12), 1, 12).a, random_lora((3, 16, 12), 0, 4)
    x, rows = jax.random.normal(jax.random.key(2), (5, 4, 16)), np.array([2, 0, 2, 1, 0])
    found = project(x, kernel, None, PerExample((members,), jnp.asarray(rows)))
    np.testing.assert_allclose(found, in_turn(x, kernel, members, rows), atol=1e-6)


def test_every_way_to_run_the_batch_runs_the_same_rows():
    library = [{"q": LoRA(jnp.full((1, 2, 1), n), jnp.ones((1, 1, 2)))} for n in range(3)]
    slots = make_slots(library[:1], 3)
    for n, adapter in enumerate(library):
        slots = put(slots, n, adapter)

    def run(adapter, tokens):
        if isinstance(module := adapter.get("q"), PerExample):
            return tokens + 10 * module.parts[0].a[0, module.rows[0], 0, 0][:, None]
        return tokens + 10 * (module.a[0, 0, 0] if module else 0)

    tokens = jnp.arange(4)[:, None]
    passes = _passes(run, library, slots, tokens)
    assert passes["the base"]().tolist() == tokens.tolist()
    mixed, apart = (passes[name]() for name in list(passes)[2:])
    np.testing.assert_array_equal(mixed, np.vstack(apart))
    assert sorted(mixed[:, 0].tolist()) == [0, 3, 11, 22]
