from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.merging.merge import merge
from lora_jax import models, peft
from lora_jax.errors import InputError
from lora_jax.files import read_json
from lora_jax.losses import cross_entropy
from train.batches import assemble
from train.config import Mixing, checked
from train.data import plan_data
from train.fisher import diagonal
from train.loss import batch_loss
from train.record import read_metrics
from train.run import RECORD, train


def test_it_is_the_mean_of_squared_gradients_and_weighs_a_merge(
    config, weights, random_lora, random_tokens
):
    adapter, rows = random_lora(config), random_tokens(3, 8)

    def loss(adapter, row):
        hidden = models.forward(config, weights, adapter, row[None, :-1]).hidden
        logits = models.unembed(config, weights, adapter, hidden)[0]
        return jnp.sum(cross_entropy(logits, row[1:])[0])

    found = jax.jit(lambda a: diagonal(loss, a, rows))(adapter)
    gradients = [jax.jit(jax.grad(loss))(adapter, row) for row in rows]
    wanted = jax.tree.map(lambda *gs: sum(g**2 for g in gs) / 3, *gradients)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), found, wanted)
    other = random_lora(config, 1)
    nothing = jax.tree.map(jnp.zeros_like, found)
    merged, _ = merge([adapter, other], "fisher", space="factor", fishers=[found, nothing])
    path = next(iter(adapter))
    known = np.asarray(found[path].b > 0)
    mine = adapter[path].scale * np.einsum("NIR,NRO->NIO", adapter[path].a, adapter[path].b)
    its = np.einsum("NIR,NRO->NIO", merged[path].a, merged[path].b)
    assert known.all() and np.abs(its - mine).max() < 1e-4 * np.abs(mine).max()


@pytest.fixture(scope="module")
def module(base, random_lora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("module") / "sums"
    peft.save_adapter(folder, random_lora(base.config, 1, size=0.1), base.config)
    return folder


def measured(config_of, module, **changes):
    return config_of(start_from=str(module), fisher=True, limit=11, batch=4, **changes)


def test_a_run_writes_every_rows_squared_gradient(config_of, base, module):
    config = measured(config_of, module)
    assert train(config, base) == config.out
    found, adapter = (peft.load_adapter(f, base.config) for f in (config.out, module))
    plan, held_out = plan_data(checked(config), base, None)
    assert len(plan.examples) == 11 and held_out is None

    @jax.jit
    def gradient(row):
        return jax.grad(lambda a: batch_loss(base.config, base.weights, a, row))(adapter)

    rows = [assemble(plan, np.array([n])) for n in range(11)]
    rows = [jax.tree.map(lambda x: x[0, :1], row) for row in rows]
    wanted = jax.tree.map(lambda *gs: sum(np.square(g) for g in gs) / 11, *map(gradient, rows))
    for path, module_ in wanted.items():
        for side in ("a", "b"):
            want = getattr(module_, side)
            assert np.max(want) > 0 and np.min(getattr(found[path], side)) >= 0
            np.testing.assert_allclose(
                getattr(found[path], side), want, atol=1e-4 * np.max(want), rtol=1e-3
            )
    record = read_json(config.out / RECORD)
    assert record["finished"] and record["steps"] == 0 and record["examples"] == 11
    losses = [row["loss"] for row in read_metrics(config.out / "metrics.jsonl")]
    assert len(losses) == plan.steps and np.isfinite(losses).all()


MESHES = """
from pathlib import Path
from train.config import Config
from train.run import train

for name, sizes in dict(one=(1, 1, 1), many=(2, 2, 2)).items():
    mesh = dict(zip(("mesh_data", "mesh_fsdp", "mesh_tensor"), sizes))
    settings = dict(data=({data!r},), base={base!r}, length=64, limit=9, batch=4, fisher=True)
    train(Config(out=Path({out!r}) / name, start_from={module!r}, **settings, **mesh))
"""


@pytest.mark.slow
def test_eight_devices_measure_what_one_does(
    run_on_devices, sums, base_folder, base, module, tmp_path
):
    places = {"data": sums, "base": str(base_folder), "out": str(tmp_path), "module": str(module)}
    run_on_devices(MESHES.format(**places))
    one, many = (peft.load_adapter(tmp_path / name, base.config) for name in ("one", "many"))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-4 * np.max(x))


def test_what_cannot_be_measured_is_refused(config_of, base, module, tmp_path):
    with pytest.raises(InputError, match="--fisher measures an adapter; give it by --start-from"):
        checked(config_of(fisher=True))
    slips = {"pack": True, "mix": Mixing(("a=x",)), "validation_data": ("x",)}
    with pytest.raises(InputError, match=r"--pack puts rows.*neither --mix.of nor.*-data out"):
        checked(measured(config_of, module, **slips))
    broken = peft.load_adapter(module, base.config)
    broken = {path: replace(m, b=m.b * 1e30) for path, m in broken.items()}
    peft.save_adapter(tmp_path / "broken", broken, base.config)
    with pytest.raises(InputError, match=r"batch 1, from .*jsonl.* gave loss (nan|inf)"):
        train(measured(config_of, tmp_path / "broken"), base)
