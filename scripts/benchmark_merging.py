"""What merging costs, against PEFT's add_weighted_adapter: ten adapters of Phi-3-mini's shapes.

    python -m scripts.benchmark_merging

Every merge of either side runs in a process of its own, one after another. Memory is what a merge
adds at its peak to what its process held before. PEFT merges one layer; ours one, and then all.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import tyro

from lora_jax.files import write_json
from scripts.timing import show

Projection = Literal["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
FACTORS = ("linear", "cat", "ties", "magnitude_prune", "dare_linear", "dare_ties")
DELTAS = ("svd", "ties_svd", "magnitude_prune_svd", "dare_linear_svd", "dare_ties_svd")


@dataclass(frozen=True)
class Settings:
    """Times merges here and in PEFT on torch, and prints the table."""

    methods: tuple[str, ...] = (*FACTORS, *DELTAS)  # by PEFT's names
    projections: tuple[Projection, ...] = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    layers: int = 32  # of the whole model; 1 leaves it out
    rounds: int = 3  # timed merges after the first; PEFT's that take over five seconds have one
    results: Path | None = None  # a JSON file of every merge's cost; those in it are not made again
    figure: Path | None = None  # an image of the costs, .png or .svg
    worker: Literal["ours", "peft"] | None = None  # one merge alone, as the command calls itself


def main() -> None:
    """Prints the table; `--worker` is how it calls itself for one merge."""
    settings = tyro.cli(Settings, prog="python -m scripts.benchmark_merging")
    if settings.worker:
        from scripts import merging_cost

        work = {"ours": merging_cost.ours, "peft": merging_cost.peft}[settings.worker]
        print(json.dumps(work(settings)))
        return
    missing = [name for name in ("torch", "peft") if find_spec(name) is None]
    if missing:
        sys.exit(f"error: {' and '.join(missing)} not installed; run `make bench`")
    report(settings)


def report(settings: Settings) -> None:
    """Runs every merge, shows what it took, and draws it if a figure is asked for."""
    costs = {method: _costs(method, settings) for method in settings.methods}
    rows = []
    for method, (theirs, one, *whole) in costs.items():
        ratio = f"{theirs['again'] / one['again']:.1f}x"
        row = [method, _told(theirs), _told(one), ratio, *map(_told, whole)]
        rows.append([*row, f"{one['first']:.1f} s"])
    columns = ["method", *_sides(settings), "first, compiled"]
    columns.insert(3, "ratio")
    where, load = ", ".join(settings.projections), os.getloadavg()[1]
    title = f"Ten rank-16 adapters of Phi-3-mini ({where}), to rank 16 (svd), load {load:.1f}"
    show(title, columns, rows)
    if settings.figure is not None:
        from scripts import merging_cost

        merging_cost.draw(costs, _sides(settings), settings.figure)


def _sides(settings: Settings) -> list[str]:
    """What is measured of every method, in words."""
    whole = [f"ours, {settings.layers} layers"] if settings.layers > 1 else []
    return ["PEFT, a layer", "ours, a layer", *whole]


def _costs(method: str, settings: Settings) -> list[dict[str, float]]:
    """What a method costs PEFT and us at one layer, and us at all."""
    alone = replace(settings, methods=(method,), layers=1)
    whole = [replace(settings, methods=(method,), rounds=1)] if settings.layers > 1 else []
    ours = [_kept("ours", one) for one in (alone, *whole)]
    return [_kept("peft", alone), *ours]


def _kept(side: Literal["ours", "peft"], settings: Settings) -> dict[str, float]:
    """A merge's cost, out of the results if they have it, and into them if they do not."""
    file = settings.results
    known = json.loads(file.read_text()) if file is not None and file.exists() else {}
    told = (side, *settings.methods, f"{settings.layers} layers", *settings.projections)
    key = " ".join(told)
    if key not in known:
        known[key] = _worker(side, settings)
        print(f"{key}: {_told(known[key])}", file=sys.stderr)
        if file is not None:
            write_json(file, known)
    return known[key]


def _told(found: dict[str, float]) -> str:
    """Seconds on the clock and of all processors, and memory, in words."""
    seconds = f"{found['again']:.3g} s ({found['cpu']:.3g} of CPU)"
    return f"{seconds}, {found['peak'] / 2**20:,.0f} MiB"


def _worker(side: str, settings: Settings) -> dict[str, float]:
    """One merge, by a process of its own."""
    given = {name: getattr(settings, name) for name in ("methods", "projections")}
    words = [word for name, values in given.items() for word in (f"--{name}", *values)]
    words += ["--layers", str(settings.layers), "--rounds", str(settings.rounds)]
    command = [sys.executable, "-m", "scripts.benchmark_merging", "--worker", side, *words]
    # OpenBLAS' threads spin while they wait, which costs thin decompositions more than they gain.
    alone = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    if done.returncode:
        sys.exit(f"{side}, {settings.methods[0]} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
