"""What one merge of ten adapters of Phi-3-mini's shapes costs, here and in PEFT."""

import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from scripts.benchmark_merging import Settings

SHAPES = {  # a layer's projections: in, out
    "self_attn.qkv_proj": (3072, 9216),
    "self_attn.o_proj": (3072, 3072),
    "mlp.gate_up_proj": (3072, 16384),
    "mlp.down_proj": (8192, 3072),
}
COUNT, RANK, DENSITY = 10, 16, 0.3
SLOW = 5.0  # seconds beyond which PEFT's merge is timed once


def ours(settings: Settings) -> dict[str, float]:
    """Seconds of the first merge and of the next ones, and bytes added at the peak."""
    import jax

    from compose.merging.merge import merge

    (method,), shapes = settings.methods, _shapes(settings)
    adapters = [_adapter(number, settings.layers, shapes) for number in range(COUNT)]
    dense = method.endswith("_svd")
    name = method.removesuffix("_svd")
    options: dict = {"rank": RANK} if method.endswith("svd") else {}
    if name not in ("linear", "cat", "svd"):
        options["density"] = DENSITY
    space = "delta" if dense or name in ("cat", "svd") else "factor"
    jax.block_until_ready(adapters)

    def work() -> None:
        jax.block_until_ready(merge(adapters, name, space=space, **options))

    return _cost(work, lambda: None, settings.rounds)


def _shapes(settings: Settings) -> dict[str, tuple[int, int]]:
    """The shapes of the projections that are merged."""
    return {path: SHAPES[path] for path in SHAPES if path.split(".")[1] in settings.projections}


def _adapter(seed: int, layers: int, shapes: Mapping[str, tuple[int, int]]) -> dict:
    """A random adapter of every projection."""
    import jax
    import numpy as np

    from lora_jax.modules import LoRA

    random = np.random.default_rng(seed)

    def draw(*shape: int):
        return jax.numpy.asarray(random.standard_normal((layers, *shape), np.float32))

    return {p: LoRA(draw(i, RANK), draw(RANK, o), 2.0) for p, (i, o) in shapes.items()}


def peft(settings: Settings) -> dict[str, float]:
    """The same of PEFT's add_weighted_adapter on one layer; a slow merge is made once."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    (method,), shapes = settings.methods, _shapes(settings)
    layer = torch.nn.ModuleDict(
        {p.split(".")[1]: torch.nn.Linear(*shape, bias=False) for p, shape in shapes.items()}
    )
    lora = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=list(layer), init_lora_weights=False
    )
    model = get_peft_model(torch.nn.Sequential(layer), lora, "0")
    for number in range(1, COUNT):
        model.add_adapter(str(number), lora)
    options: dict = {} if method in ("linear", "cat", "svd") else {"density": DENSITY}

    def work() -> None:
        adapters = [str(number) for number in range(COUNT)]
        model.add_weighted_adapter(adapters, [1.0] * COUNT, "merged", method, **options)

    return _cost(work, lambda: model.delete_adapter("merged"), settings.rounds, compiles=False)


def _cost(
    work: Callable[[], None], undo: Callable[[], None], rounds: int, *, compiles: bool = True
) -> dict[str, float]:
    """A merge's first seconds, the median of the next, their CPU seconds, and its peak's bytes.

    One that compiles nothing and is slow is made once.
    """
    with Memory() as memory:
        taken = [_seconds(work)]
        for _ in range(rounds if compiles or taken[0][0] < SLOW else 0):
            undo()
            taken.append(_seconds(work))
    again, cpu = (statistics.median(column) for column in zip(*(taken[1:] or taken), strict=True))
    return {"first": taken[0][0], "again": again, "cpu": cpu, "peak": memory.peak}


def _seconds(work: Callable[[], None]) -> tuple[float, float]:
    """What a call takes, on the clock and of all processors."""
    began, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - used


def draw(costs: Mapping[str, list[dict[str, float]]], sides: list[str], path: Path) -> None:
    """Bars of each method's seconds and memory, on logarithmic axes, by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.6 * len(costs)), layout="constrained")
    panels = {"seconds": ("again", 1.0), "MiB added at the peak": ("peak", 2.0**20)}
    thick = 0.8 / len(sides)
    for axes, (label, (key, unit)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for n, side in enumerate(sides):
            places = [row + (n - (len(sides) - 1) / 2) * thick for row in range(len(costs))]
            values = [found[n][key] / unit for found in costs.values()]
            bars = axes.barh(places, values, thick, label=side)
            told = [f"{value:,.0f}" if value >= 100 else f"{value:.2g}" for value in values]
            axes.bar_label(bars, told, padding=2, fontsize=7)
        axes.set_yticks(range(len(costs)), list(costs))
        axes.set(xscale="log", xlabel=label)
        axes.margins(x=0.15)
        axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(sides))
    figure.savefig(path)


class Memory:
    """The most bytes of memory that the process has taken while in the context; Linux only."""

    def __enter__(self) -> "Memory":
        self.peak, self._before, self._done = 0, _resident(), threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, _resident() - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()


def _resident() -> int:
    """Bytes of the process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
