"""A training run from its config to the folder it leaves behind."""

import platform
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lora_jax import __version__, models, peft
from lora_jax.bases import Base, load_base
from lora_jax.errors import InputError
from lora_jax.files import read_json, refuse_existing, sha256, write_json
from lora_jax.mesh import make_mesh, replicated, rows_multiple
from lora_jax.modules import Adapter, init_ia3, init_lora
from lora_jax.progress import bar
from lora_jax.tokens import load_tokenizer
from train.batches import Plan, make_plan
from train.checkpoints import Saver, open_checkpoints, restore
from train.config import Config, as_json, checked, refuse_other_run
from train.examples import Example, load_examples
from train.loop import Run, fit
from train.record import draw_losses, forget_after, read_metrics
from train.step import State, make_programs

RECORD = "training.json"  # the run's config and provenance, beside the adapter


def train(config: Config, base: Base | None = None) -> Path:
    """Trains the module that a config describes, and the folder it was written to.

    The folder holds the adapter in PEFT's format (of the lowest validation loss, or the last if
    nothing was held out), training.json, metrics.jsonl, loss.png and the checkpoints. `base` saves
    loading the base model anew for every module of a library.
    """
    config = checked(config)
    mesh = _mesh(config)
    _open_folder(config)
    base = base or load_base(config.base, mesh=mesh)
    plan, held_out = _plans(config, base, mesh)
    steps = config.steps or max(round(config.epochs * plan.steps), 1)
    programs = make_programs(config, base.config, steps)
    state = programs.start(_first_adapter(config, base))
    if mesh is not None:
        state = jax.device_put(state, replicated(mesh))
    write_json(config.out / RECORD, {"config": as_json(config), "finished": False})
    with open_checkpoints(config.out / "checkpoints") as checkpointer:
        state = (restore(checkpointer, state) if config.resume else None) or state
        metrics = config.out / "metrics.jsonl"
        forget_after(metrics, int(state.step))
        saver = Saver(checkpointer) if config.checkpoint_every else None
        run = Run(config, programs, base.weights, plan, held_out, steps, mesh, metrics, saver)
        began = time.perf_counter()
        state = _fit_with_progress(run, state)
        if saver is not None:
            saver.wait()
    _write_result(run, state, base, time.perf_counter() - began)
    return config.out


def _mesh(config: Config) -> Mesh | None:
    sizes = (config.mesh_data, config.mesh_fsdp, config.mesh_tensor)
    return None if sizes == (1, 1, 1) else make_mesh(*sizes)


def _open_folder(config: Config) -> None:
    """Makes the output folder; refuses one in use, or a resumption of something else."""
    if config.resume:
        record = config.out / RECORD
        if not record.exists():
            raise InputError(f"nothing to resume in {config.out}: it holds no {RECORD}")
        refuse_other_run(config, read_json(record)["config"])
        return
    refuse_existing(config.out, config.overwrite)
    if config.out.exists():
        shutil.rmtree(config.out)
    config.out.mkdir(parents=True)


def _plans(config: Config, base: Base, mesh: Mesh | None) -> tuple[Plan, Plan | None]:
    """The batches to train on, and the held-out ones if there are any."""
    tokenizer = load_tokenizer(base.folder)
    longest = config.context + config.predict
    reach = config.length if config.objective != "next-tokens" else longest
    if reach > base.config.context:
        raise InputError(
            f"rows of {reach} tokens exceed the base model's context of {base.config.context}"
        )
    examples = load_examples(config, config.data, tokenizer)
    if config.limit:
        order = np.random.default_rng((config.seed, 1)).permutation(len(examples))
        examples = [examples[i] for i in order[: config.limit]]
    if config.validation_data:
        held = load_examples(config, config.validation_data, tokenizer)
    else:
        examples, held = _split(examples, config)
    pack = config.length if config.pack else 0
    size = {"batch": config.batch, "pack": pack, "multiple": rows_multiple(mesh)}
    plan = make_plan(examples, accumulate=config.accumulate, **size)
    return plan, make_plan(held, accumulate=1, **size) if held else None


def _split(examples: list[Example], config: Config) -> tuple[list[Example], list[Example]]:
    """The examples without a held-out share, and that share, drawn by the seed."""
    count = round(config.validation * len(examples))
    order = np.random.default_rng((config.seed, 0)).permutation(len(examples))
    if count == len(examples):
        raise InputError(f"{len(examples)} examples are too few to hold out {config.validation:g}")
    return [examples[i] for i in sorted(order[count:])], [examples[i] for i in order[:count]]


def _first_adapter(config: Config, base: Base) -> Adapter:
    """The module as it is before the first step."""
    if config.start_from is not None:
        return peft.load_adapter(config.start_from, base.config)
    shapes, layers = models.projections(base.config), base.config.layers
    if config.kind == "ia3":
        return init_ia3(shapes, layers, layout=config.ia3_layout)
    return init_lora(
        jax.random.key(config.init_seed),
        shapes,
        layers,
        targets=config.targets,
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
    )


def _fit_with_progress(run: Run, state: State) -> State:
    with bar("training") as progress:
        task = progress.add_task(
            run.config.out.name, total=run.steps, completed=int(state.step), note="compiling"
        )
        return fit(run, state, progress, task)


def _write_result(run: Run, state: State, base: Base, seconds: float) -> None:
    """Writes the adapter, the record and the loss curve into the output folder."""
    config, out = run.config, run.config.out
    adapter = state.best if np.isfinite(float(state.best_loss)) else state.adapter
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        peft.write_adapter(Path(scratch), adapter, base.config, base_name=config.base)
        for path in Path(scratch).iterdir():
            path.replace(out / path.name)
    metrics = read_metrics(run.metrics)
    draw_losses(metrics, out / "loss.png", f"{out.name}: {config.kind} on {config.base}")
    best = float(state.best_loss)
    write_json(
        out / RECORD,
        {
            "config": as_json(config),
            "finished": True,
            "steps": int(state.step),
            "seconds": round(seconds, 2),
            "validation_loss": best if np.isfinite(best) else None,
            "examples": len(run.plan.examples),
            **provenance(config, base),
        },
    )


def provenance(config: Config, base: Base) -> dict[str, Any]:
    """What the result rests on: the base's and the data's hashes, versions, the command."""
    files = [Path(p) for p in (*config.data, *config.validation_data) if not p.startswith("hub:")]
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    python = {"python": platform.python_version(), "lora_jax": __version__}
    return {
        "base_sha256": base.digest,
        "data_sha256": {str(path): sha256(path) for path in files},
        "versions": python | {p: version(p) for p in packages},
        "command": sys.argv,
    }
