import pytest

from lora_jax import mesh
from lora_jax.errors import InputError

COMPARE = """
import jax, jax.numpy as jnp, numpy as np
from lora_jax import mesh, models, modules, table
from lora_jax.families import llama
from lora_jax.rope import Rope
c = llama.Config(kind="llama", vocabulary=264, width=32, hidden=64, layers=2, heads=4,
                  kv_heads=2, head_width=8, context=128, rope=Rope(8), tied=True)
w = table.init(jax.random.key(0), models.table(c))
a = modules.init_lora(jax.random.key(1), models.projections(c),
                      targets=["q_proj", "down_proj"], rank=2, alpha=4)
a = jax.tree.map(lambda x: x + 0.1, a)
x = jax.random.randint(jax.random.key(2), (8, 6), 0, 256)
@jax.jit
def run(a, w, x):
    def loss(a):
        states = models.forward(c, w, a, x).hidden
        return jnp.mean(states[:, -1] ** 2 + states[:, -1]), states
    (_, states), gradient = jax.value_and_grad(loss, has_aux=True)(a)
    return states, gradient
one = run(a, w, x)
for sizes in [(8, 1, 1), (2, 2, 2), (1, 2, 4)]:
    m = mesh.make_mesh(*sizes)
    placed = jax.device_put(w, table.shardings(models.table(c), m))
    many = run(jax.device_put(a, mesh.replicated(m)), placed, mesh.put_batch(np.asarray(x), m))
    assert len(many[0].devices()) == 8
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-3, atol=2e-5), many, one)
    q = placed["layers"]["self_attn.q_proj"]
    assert q.addressable_shards[0].data.size * sizes[1] * sizes[2] == q.size
    print("same", *sizes)
"""


def test_eight_devices_compute_what_one_does_however_they_are_laid_out(run_on_devices):
    assert run_on_devices(COMPARE).count("same") == 3


def test_weights_load_onto_a_mesh(base_folder, run_on_devices):
    printed = run_on_devices(
        f"""
from lora_jax import bases, mesh
base = bases.load_base({str(base_folder)!r}, mesh=mesh.make_mesh(2, 2, 2))
embed, norm = base.weights["embed"], base.weights["norm"]
print(*embed.sharding.spec, len(embed.devices()), len(norm.devices()))
"""
    )
    assert printed.split() == ["tensor", "fsdp", "8", "8"]


def test_a_mesh_takes_what_the_named_axes_leave(run_on_devices):
    printed = run_on_devices(
        """
import numpy as np
from lora_jax import mesh
print(*[tuple(mesh.make_mesh(*s).shape.values()) for s in [(-1,), (-1, 2), (2, -1, 2), (3,)]])
m = mesh.make_mesh(2, 2, 2)
print(mesh.rows_multiple(m), mesh.rows_multiple(None))
batch = mesh.put_batch({"x": np.arange(24).reshape(3, 8)}, m, axis=1)["x"]
print(batch.addressable_shards[0].data.shape, bool((batch == np.arange(24).reshape(3, 8)).all()))
"""
    )
    assert printed.splitlines() == ["(8, 1, 1) (4, 2, 1) (2, 2, 2) (3, 1, 1)", "4 1", "(3, 2) True"]


@pytest.mark.parametrize("sizes", [(64, 1, 1), (0, 1, 1), (-1, -1, 1), (-1, 64, 1), (1, 1, -2)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(InputError, match=f"a mesh of data={sizes[0]}, fsdp={sizes[1]}"):
        mesh.make_mesh(*sizes)


def test_without_a_mesh_a_batch_goes_to_the_one_device():
    batch = mesh.put_batch({"x": [1, 2]}, None)
    assert [int(x) for x in batch["x"]] == [1, 2]
