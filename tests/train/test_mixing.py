"""Learned mixing: what is useful gains weight, by gradient and by search; and what is written."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose import arithmetic
from compose.inputs import load_input
from lora_jax import models, peft
from lora_jax.errors import InputError
from lora_jax.files import read_json, write_json
from lora_jax.merge import merge
from lora_jax.modules import IA3, LoRA
from train import mixing, search
from train.config import Mixing, checked
from train.record import read_metrics
from train.run import train


@pytest.fixture(scope="module")
def of(finished, base, random_lora, tmp_path_factory):
    """A module that learned the sums, and one that knows nothing, as `--mix.of` names them."""
    folder = tmp_path_factory.mktemp("noise") / "noise"
    noise = random_lora(base.config, seed=9, rank=2, size=0.3)
    peft.save_adapter(folder, noise, base.config)
    return (f"sums={finished.out}", f"noise={folder}")


def weights_of(out) -> dict:
    return read_json(out / "mixing.json")["weights"]


@pytest.mark.parametrize("per", ["module", "layer", "projection"])
def test_what_is_useful_gains_weight_and_noise_loses_it(config_of, base, of, finished, per):
    config = config_of(mix=Mixing(of, per=per), steps=20, learning_rate=0.1)
    assert train(config, base) == config.out
    found = weights_of(config.out)
    useful, noise = (np.concatenate([*map(np.ravel, _leaves(found[n]))]) for n in ("sums", "noise"))
    assert useful.mean() > 0.6 and np.abs(noise).mean() < 0.4
    mixture, alone = (read_json(run.out / "training.json") for run in (config, finished))
    assert mixture["validation_loss"] < 1.03 * alone["validation_loss"]
    assert (config.out / "mixing.png").stat().st_size > 1000


def _leaves(value) -> list:
    return list(value.values()) if isinstance(value, dict) else [value]


def test_the_module_that_is_written_is_the_sum_under_its_weights(config_of, base, of):
    config = config_of(mix=Mixing(of, rank=5), steps=3, validation=0.0, learning_rate=0.1)
    train(config, base)
    found, record = weights_of(config.out), read_json(config.out / "mixing.json")
    modules = [load_input(f, base.config) for f in map(_folder, of)]
    summed = arithmetic.delta_sum(modules, [found["sums"], found["noise"]])
    written = peft.load_adapter(config.out, base.config)
    for path, module in written.items():
        lost = np.asarray(record["truncation_error"][path])
        whole = summed[path].scale * summed[path].a @ summed[path].b
        apart = jnp.linalg.norm(module.scale * module.a @ module.b - whole, axis=(1, 2))
        assert module.a.shape[-1] <= 5
        np.testing.assert_allclose(apart / jnp.linalg.norm(whole, axis=(1, 2)), lost, atol=1e-4)


def _folder(named: str) -> Path:
    return Path(named.partition("=")[2])


def test_a_bound_and_a_penalty_hold_the_weights(config_of, base, of):
    settings = {"steps": 6, "learning_rate": 0.3, "validation": 0.0}
    config = config_of(mix=Mixing(of, bound=0.55), **settings)
    train(config, base)
    assert max(weights_of(config.out).values()) == pytest.approx(0.55)
    config = config_of(mix=Mixing(of, penalty=1e4), **settings | {"learning_rate": 0.02})
    train(config, base)
    assert max(weights_of(config.out).values()) < 0.45


def test_a_search_finds_it_too_and_reads_what_it_has_tried(config_of, base, of, monkeypatch):
    mix = Mixing(of, space="factor", search=12, bound=1.5, penalty=0.05, start=0.0)
    config = config_of(mix=mix)
    train(config, base)
    found = weights_of(config.out)
    assert abs(found["sums"]) > 3 * abs(found["noise"])
    tried = [row for row in read_metrics(config.out / "metrics.jsonl") if "weights" in row]
    assert len(tried) == 12 and min(row["loss"] for row in tried) < tried[0]["loss"]

    _unfinish(config.out)
    evaluate, times = search._evaluate, []
    monkeypatch.setattr(search, "_evaluate", lambda *a: times.append(a) or evaluate(*a))
    train(replace(config, resume=True), base)
    assert weights_of(config.out) == found
    assert len(times) == 1  # what is held out, at the end


def _unfinish(folder: Path) -> None:
    """Leaves a run as if it had been killed before its end."""
    write_json(folder / "training.json", read_json(folder / "training.json") | {"finished": False})


def test_entropy_falls_on_text_without_labels(config_of, base, of, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("3 plus 2 is 5. 6 plus 1 is 7.\n" * 40)
    config = config_of(
        data=(str(text),), objective="entropy", mix=Mixing(of), steps=10, learning_rate=0.1,
        validation=0.0,
    )  # fmt: skip
    train(config, base)
    course = [row["loss"] for row in read_metrics(config.out / "metrics.jsonl")]
    assert all(0 < loss <= np.log(base.config.vocabulary) for loss in course)
    assert course[-1] < course[0]


def test_a_resumed_run_ends_with_the_same_bits(config_of, base, of):
    whole = config_of(mix=Mixing(of, per="layer"), steps=8)
    train(whole, base)
    part = replace(whole, out=whole.out.parent / "part")
    train(part, base)
    shutil.rmtree(max((part.out / "checkpoints").iterdir(), key=lambda p: int(p.name)))
    _unfinish(part.out)
    train(replace(part, resume=True), base)
    assert weights_of(part.out) == weights_of(whole.out)


def test_first_weights_have_an_entry_for_all_that_has_a_weight(base, random_lora, random_ia3):
    adapters = [random_lora(base.config), random_lora(base.config)]
    assert mixing.first_weights(Mixing(), adapters).tolist() == [0.5, 0.5]
    assert mixing.first_weights(Mixing(per="layer", start=0.3), adapters).shape == (2, 2)
    by_path = mixing.first_weights(Mixing(per="projection"), adapters)
    assert by_path.keys() == adapters[0].keys() and by_path["self_attn.q_proj"].shape == (2, 2)
    uneven = {"x": LoRA(jnp.ones((2, 3, 1)), jnp.ones((2, 1, 3))), "y": IA3(jnp.ones((5, 3)))}
    with pytest.raises(InputError, match=r"differ in depth .* take --mix.per projection"):
        mixing.first_weights(Mixing(per="layer"), [uneven, uneven])


def test_a_gradient_is_that_of_the_dense_sum(base, of):
    modules = [load_input(f, base.config) for f in map(_folder, of)]
    tokens = jnp.arange(12)[None] % 64

    def size(weights, merged):
        if merged:
            whole = base.weights
            for n, module in enumerate(modules):
                scaled = arithmetic.delta_sum([module], [weights[n]])
                whole = merge(whole, scaled)
            out = models.forward(base.config, whole, {}, tokens)
        else:
            out = models.forward(
                base.config, base.weights, mixing.mixed(modules, weights, "delta"), tokens
            )
        return jnp.sum(out.hidden * jnp.sin(jnp.arange(out.hidden.size)).reshape(out.hidden.shape))

    gradient = jax.jit(jax.grad(size), static_argnums=1)
    ours, dense = (gradient(jnp.array([0.3, 0.7]), merged) for merged in (False, True))
    np.testing.assert_allclose(ours, dense, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mix": Mixing(("a=x", "b=y"), bound=-1.0)}, "--mix.bound must not be negative"),
        ({"mix": Mixing(("a=x", "b=y"), start=float("nan"))}, "--mix.start must be finite"),
        ({"mix": Mixing(per="layer")}, "--mix.of names what is mixed"),
        ({"objective": "entropy"}, "--objective entropy is for --mix.of"),
        ({"mix": Mixing(("a=x", "b=y"), search=9, per="layer")}, "leave --mix.per layer out"),
        ({"mix": Mixing(("a=x", "b=y")), "start_from": "z"}, "--start-from is a module's"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config_of, changes, told):
    with pytest.raises(InputError, match=told):
        checked(config_of(**changes))


def test_one_module_is_not_mixed(config_of, base, of):
    with pytest.raises(InputError, match="names 1 module; there are two at least"):
        train(config_of(mix=Mixing(of[:1])), base)
