"""What it takes to train one module for each cluster: its members' data, under their settings."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.cluster import Clusters
from compose.provenance import TRAINED
from lora_jax.errors import InputError, refuse_all
from lora_jax.files import read_json

# What says how rows are read, and so must be the same for rows that are trained on together.
_READS = ("objective", "prompt", "completion", "second", "label", "chat")
# What belongs to a run and not to what it trains; a preset's settings are all written out.
_OWN = ("data", "validation_data", "out", "preset", "mix", "resume", "overwrite")


@dataclass(frozen=True)
class Retraining:
    """One cluster's run of lora-train."""

    name: str
    members: tuple[str, ...]
    data: tuple[str, ...]  # the members' files, each once
    validation_data: tuple[str, ...]
    settings: dict[str, Any]  # those of training.json's config that all members share
    differing: tuple[str, ...]  # settings that they do not share, left at lora-train's own

    def command(self, out: Path) -> str:
        """The run as a command line that writes to a folder of the cluster's name in `out`."""
        words = ["lora-train", *self.data, "--out", str(out / self.name)]
        for name, value in self.settings.items():
            words += _flag(name, value)
        words += _flag("validation_data", list(self.validation_data))
        return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    """A setting as lora-train's flag; nothing where it is empty or off, as by default."""
    if value is None or value is False or value in ("", []):
        return []
    values = [] if value is True else value if isinstance(value, list) else [value]
    return [f"--{name.replace('_', '-')}", *map(str, values)]


def retraining(folders: Mapping[str, Path], clusters: Clusters) -> list[Retraining]:
    """A run for every cluster, from the training.json in the folders of its modules, by name.

    Paths of data are as the members' own runs were given them.
    """
    configs, problems = {}, []
    for name in clusters.names:
        try:
            configs[name] = _config(name, folders)
        except InputError as error:
            problems.append(str(error))
    refuse_all(problems, "retraining")
    return [
        _run(label, group, [configs[name] for name in group])
        for label, group in zip(clusters.labels(), clusters.groups, strict=True)
    ]


def _config(name: str, folders: Mapping[str, Path]) -> dict[str, Any]:
    """The settings that a module was trained with."""
    if name not in folders:
        raise InputError(f"{name} has no folder")
    config = read_json(folders[name] / TRAINED).get("config")
    if not isinstance(config, dict) or not isinstance(config.get("data"), list):
        raise InputError(f"{folders[name] / TRAINED} does not tell the data of its run")
    if (config.get("mix") or {}).get("of"):
        raise InputError(f"{name} is a learned mixture; cluster the modules it is of")
    return config


def _run(label: str, group: tuple[str, ...], configs: list[dict[str, Any]]) -> Retraining:
    first, *others = configs
    shared, differing = {}, []
    for name, value in first.items():
        if name in _OWN or name.startswith("mesh_"):
            continue
        if all(config.get(name) == value for config in others):
            shared[name] = value
        else:
            differing.append(name)
    return Retraining(
        label,
        group,
        _each_once(configs, "data"),
        _each_once(configs, "validation_data"),
        shared,
        tuple(differing),
    )


def _each_once(configs: list[dict[str, Any]], key: str) -> tuple[str, ...]:
    """Every file that the members have under a key, in order."""
    return tuple(dict.fromkeys(path for config in configs for path in config.get(key) or ()))


def script(runs: list[Retraining], out: Path) -> str:
    """The runs as a shell script, with what the members of a cluster do not agree on."""
    lines = ["#!/bin/sh", "# Paths of data are as the members' own runs had them.", "set -e"]
    for run in runs:
        lines += ["", f"# {run.name}: {', '.join(run.members)}"]
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in run.differing)
        if flags:
            lines.append(f"# its members differ in {flags}: at lora-train's defaults here")
        if apart := set(run.differing) & set(_READS):
            lines.append("# Their rows are read in different ways: give them one form, then run")
        lines.append(f"# {run.command(out)}" if apart else run.command(out))
    return "\n".join(lines) + "\n"
