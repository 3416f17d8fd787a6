"""A training run from its config to the folder it leaves behind."""

import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from compose.inputs import base_name, located, named_folders
from lora_jax import models, peft
from lora_jax.bases import Base, load_base, load_config
from lora_jax.dora import with_magnitudes
from lora_jax.errors import InputError
from lora_jax.files import read_json, refuse_existing, write_json
from lora_jax.mesh import make_mesh, replicated
from lora_jax.modules import Adapter, Module, init_ia3, init_lora, resolve_targets
from lora_jax.peft.settings import read_settings
from lora_jax.progress import bar, say
from lora_jax.wheels import published
from train.batches import Plan
from train.checkpoints import Saver, open_checkpoints, restore
from train.classify import first_head
from train.config import Config, as_json, checked, refuse_other_run
from train.data import plan_data
from train.fisher import estimate
from train.interrupt import stop_asked
from train.loop import Run, fit
from train.mixing import Mix, first_weights, load_mix, mixed_module, mixing_subject
from train.mixing_report import weight_table, write_mixing
from train.record import draw_losses, forget_after, provenance, read_metrics
from train.rows import existing
from train.search import search
from train.step import State, make_programs
from train.subject import MODULE, Subject

RECORD = "training.json"  # the run's config and provenance, beside the adapter


def train(config: Config, base: Base | None = None) -> Path:
    """Trains the module that a config describes, and the folder it was written to.

    The folder holds the adapter in PEFT's format (of the lowest validation loss, or the last if
    nothing was held out), training.json, metrics.jsonl, loss.png and the checkpoints. `base` saves
    loading the base model anew for every module of a library.
    """
    config = checked(config)
    saved = _saved_record(config)
    if saved.get("finished"):
        say(f"{config.out} is finished; nothing is left to resume")
        return config.out
    mesh = _mesh(config)
    _refuse_mistyped(config, base)
    base = base or _loaded(config, mesh)
    plan, held_out = plan_data(config, base, mesh)
    steps = _steps(config, plan)
    mix = load_mix(config, base.config) if config.mix.of else None
    # Committed to its place, as restored and validated states are, or each kind would compile anew.
    place = replicated(mesh) if mesh is not None else jax.devices()[0]
    subject, frozen, first = _subject(config, base, mix, place)
    programs = make_programs(config, base.config, steps, mesh, subject)
    state = jax.device_put(programs.start(first), place)
    record = {"config": as_json(config), "finished": False, **provenance(config, base)}
    _refuse_changes(saved, record, config.out)
    _open_folder(config)
    write_json(config.out / RECORD, record)
    with open_checkpoints(config.out / "checkpoints") as checkpointer, stop_asked() as stop:
        state = (restore(checkpointer, state) if config.resume else None) or state
        metrics = config.out / "metrics.jsonl"
        if not config.mix.search:
            forget_after(metrics, int(state.step))
        saver = Saver(checkpointer) if config.checkpoint_every else None
        run = Run(config, programs, frozen, plan, held_out, steps, mesh, metrics, saver, stop)
        began = time.perf_counter()
        state = _fit_with_progress(run, subject, state)
        if saver is not None:
            saver.wait()
    seconds = {"seconds": round(time.perf_counter() - began, 2)}
    _write_result(run, state, base, mix, record | seconds)
    return config.out


def _steps(config: Config, plan: Plan) -> int:
    """How far the run goes: in optimiser steps, evaluations of a search, or batches measured."""
    if config.fisher:
        return plan.steps
    return config.mix.search or config.steps or max(round(config.epochs * plan.steps), 1)


def _refuse_mistyped(config: Config, base: Base | None) -> None:
    """Refuses data, an adapter or projections that are not there, before weights are read."""
    for source in (*config.data, *config.validation_data):
        if not source.startswith("hub:"):
            existing(source)
    if config.start_from is not None:
        read_settings(located(config.start_from))
    for folder in named_folders(config.mix.of).values():
        base_name(located(folder))
    shapes = models.projections(base.config if base else load_config(config.base))
    if config.kind != "ia3":
        resolve_targets(config.targets, shapes)


def _loaded(config: Config, mesh: Mesh | None) -> Base:
    """The base model that the config names."""
    say(f"loading {config.base}")
    return load_base(config.base, mesh=mesh, labels=config.labels, quantization=config.quantize)


def _mesh(config: Config) -> Mesh | None:
    """The mesh that the config asks for; none for a single device."""
    sizes = (config.mesh_data, config.mesh_fsdp, config.mesh_tensor)
    return None if sizes == (1, 1, 1) else make_mesh(*sizes)


def _saved_record(config: Config) -> dict[str, Any]:
    """The record of the run to resume, or nothing; refuses a folder in use, or another run's."""
    if not config.resume:
        refuse_existing(config.out, config.overwrite)
        return {}
    path = config.out / RECORD
    if not path.exists():
        raise InputError(f"nothing to resume in {config.out}: it holds no {RECORD}")
    saved = read_json(path)
    refuse_other_run(config, saved.get("config", {}))
    return saved


def _refuse_changes(saved: dict[str, Any], record: dict[str, Any], out: Path) -> None:
    """Refuses to resume on a base model or data that changed since the run began."""
    for key, name in (("base_sha256", "base model"), ("data_sha256", "data")):
        if saved.get(key, record[key]) != record[key]:
            raise InputError(f"{out} holds a run whose {name} has changed since; start anew")


def _open_folder(config: Config) -> None:
    """Makes the output folder, in place of an old one unless that one is resumed.

    Only once everything else has been read, so that a mistyped name costs no earlier result.
    """
    if not config.resume and config.out.exists():
        shutil.rmtree(config.out)
    config.out.mkdir(parents=True, exist_ok=True)


def _subject(config: Config, base: Base, mix: Mix | None, place: Any) -> tuple[Subject, Any, Any]:
    """How the run trains, what is frozen, and what is trained as it is before the first step."""
    if mix is None:
        return MODULE, base.weights, first_adapter(config, base)
    frozen = (base.weights, jax.device_put(mix.adapters, place))
    return mixing_subject(config.mix), frozen, first_weights(config.mix, mix.adapters)


def first_adapter(config: Config, base: Base) -> Adapter:
    """The module as it is before the first step, with the head that a classifier trains too."""
    head = first_head(base.config, base.weights)
    if config.start_from is not None:
        return head | peft.load_adapter(located(config.start_from), base.config)
    return _new_module(config, base) | head


def _new_module(config: Config, base: Base) -> dict[str, Module]:
    """A new LoRA, DoRA or IA3, which changes nothing yet."""
    shapes = models.projections(base.config)
    if config.kind == "ia3":
        layouts = models.ia3_layouts(base.config)
        if config.ia3_layout not in layouts:
            lost = f"--ia3-layout {config.ia3_layout} has no place in this base model"
            raise InputError(f"{lost}; choose {' or '.join(layouts)}")
        return dict(init_ia3(shapes, layouts[config.ia3_layout]))
    lora = init_lora(
        jax.random.key(config.init_seed),
        shapes,
        targets=config.targets or models.default_targets(base.config),
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
    )
    return dict(with_magnitudes(lora, base.weights) if config.kind == "dora" else lora)


def _fit_with_progress(run: Run, subject: Subject, state: State) -> State:
    doing = "measuring" if run.config.fisher else "mixing" if run.config.mix.of else "training"
    with bar(doing) as progress:
        task = progress.add_task(
            run.config.out.name, total=run.steps, completed=int(state.step), note="compiling"
        )
        if run.config.fisher:
            return estimate(run, state, progress, task)
        if run.config.mix.search:
            return search(run, subject, state, progress, task)
        return fit(run, state, progress, task)


def _write_result(
    run: Run, state: State, base: Base, mix: Mix | None, record: dict[str, Any]
) -> None:
    """Writes the adapter, the record and the loss curve into the output folder."""
    config, out = run.config, run.config.out
    trained = state.best if np.isfinite(float(state.best_loss)) else state.adapter
    adapter, errors = (trained, {}) if mix is None else mixed_module(config.mix, mix, trained)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        peft.write_adapter(Path(scratch), adapter, base.config, base_name=published(config.base))
        if mix is not None:
            write_mixing(Path(scratch), config.mix, mix, trained, errors)
            Console(stderr=True).print(weight_table(mix.names, trained))
        for path in Path(scratch).iterdir():
            path.replace(out / path.name)
    metrics = read_metrics(run.metrics)
    kind = config.kind if mix is None else f"{len(mix.names)} modules mixed"
    draw_losses(metrics, out / "loss.png", f"{out.name}: {kind} on {config.base}")
    best = float(state.best_loss)
    write_json(
        out / RECORD,
        {
            **record,
            "finished": True,
            "steps": int(state.step),
            "validation_loss": best if np.isfinite(best) else None,
            "examples": len(run.plan.examples),
        },
    )
    if config.fisher:
        return say(
            f"Fisher information of {config.start_from}, {len(run.plan.examples)} rows: {out}"
        )
    last = next((row["loss"] for row in reversed(metrics) if "loss" in row), math.nan)
    held_out = f"lowest validation loss {best:.4g}" if np.isfinite(best) else "no validation"
    say(f"{int(state.step)} steps, last training loss {last:.4g}, {held_out}: {out}")
