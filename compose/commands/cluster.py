"""`lora-compose cluster`: groups of modules, an average of each, and how to train each again."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array
from rich.console import Console
from rich.table import Table

from compose import provenance
from compose.cluster import Clusters, cluster_library, cluster_means
from compose.commands.arguments import Cluster
from compose.commands.given import Given, given
from compose.figures import heat_map
from compose.folder import save_library
from compose.geometry import recompress
from compose.library import Library
from compose.retraining import Retraining, retraining, script
from lora_jax.errors import InputError
from lora_jax.files import new_folder, refuse_existing, write_beside
from lora_jax.progress import say
from lora_jax.runtime import prepare
from lora_jax.wheels import published

FILE, FIGURE, SCRIPT = "clusters.json", "similarity.png", "retrain.sh"


def run(command: Cluster) -> None:
    """Writes the library of averages with its records, and prints who is with whom."""
    refuse_existing(command.out, command.overwrite)
    prepare()
    found = given([_named(text) for text in command.inputs], command.base)
    clusters = cluster_library(
        Library(tuple(found.modules), tuple(found.modules.values())),
        command.k,
        command.method,
        seed=command.seed,
    )
    _write(command, found, clusters, _runs(found, clusters))
    Console(highlight=False, markup=False).print(table(clusters))
    print(command.out)


def _named(text: str) -> str:
    """NAME=FOLDER, of a folder alone with its own name."""
    name = re.sub(r"[^\w.]", "_", Path(text).name, flags=re.ASCII)
    return text if "=" in text else f"{name}={text}"


def _runs(found: Given, clusters: Clusters) -> list[Retraining]:
    """The runs that train a module for each cluster; none where a record is missing."""
    try:
        return retraining(found.folders, clusters)
    except InputError as error:
        say(f"note: no {SCRIPT}: {error}")
        return []


def _write(command: Cluster, found: Given, clusters: Clusters, runs: list[Retraining]) -> None:
    modules = Library(tuple(found.modules), tuple(found.modules.values()))
    means = cluster_means(modules, clusters)
    errors: dict[str, dict[str, Array]] = {}
    if command.rank is not None:
        pairs = [recompress(adapter, command.rank) for adapter in means.adapters]
        means = replace(means, adapters=tuple(adapter for adapter, _ in pairs))
        errors = {n: lost for n, (_, lost) in zip(means.names, pairs, strict=True)}
    made = {"expression": f"means of {command.k} clusters by {command.method}", "space": "delta"}
    record = provenance.record(
        {**made, "rank": command.rank}, found.places, base_name=found.base, errors=errors
    )
    extra: dict[str, Any] = {FILE: as_json(clusters, runs), provenance.FILE: record}
    if runs:
        extra[SCRIPT] = script(runs, command.out.with_name(f"{command.out.name}-trained"))
    with new_folder(command.out, command.overwrite) as scratch:
        save_library(scratch, means, found.config, base_name=published(found.base))
        write_beside(scratch, extra)
        title = f"cosines, by {clusters.method}"
        order = [clusters.names.index(n) for group in clusters.groups for n in group]
        shown = clusters.similarity[np.ix_(order, order)]
        names = [clusters.names[n] for n in order]
        heat_map(shown, names, scratch / FIGURE, title=title)


def as_json(clusters: Clusters, runs: list[Retraining]) -> dict[str, Any]:
    """The clusters as JSON values, with the data of each where that is known."""
    data = {run.name: run.data for run in runs}
    return {
        "method": clusters.method,
        "clusters": [
            {"name": label, "modules": group, "data": data.get(label)}
            for label, group in zip(clusters.labels(), clusters.groups, strict=True)
        ],
        "inertia": clusters.inertia,
        "names": clusters.names,
        "similarity": clusters.similarity.tolist(),
    }


def table(clusters: Clusters) -> Table:
    """A row for every cluster: its modules, and how alike they are among themselves and to others.

    Means of the cosines of pairs.
    """
    shown = Table("cluster", "modules")
    for column in ("cosine within", "to others"):
        shown.add_column(column, justify="right")
    for label, group in zip(clusters.labels(), clusters.groups, strict=True):
        inside = np.isin(clusters.names, group)
        rows = clusters.similarity[inside]
        pairs = rows[:, inside][np.triu_indices(len(group), 1)]
        shown.add_row(label, ", ".join(group), _mean(pairs), _mean(rows[:, ~inside]))
    return shown


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():+.3f}" if values.size else ""
