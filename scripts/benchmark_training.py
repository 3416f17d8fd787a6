"""Training speed against PEFT on torch: same CPU, model, rows, module and optimiser, in one run.

    python -m scripts.benchmark_training

Rows are 8x128 random tokens, the first half of each its prompt. The two sides run as processes of
their own, in turns, so that neither's threads disturb the other. The limit is the step's matrix
products (forward and input gradient of the frozen base; the unembedding where labels are) at the
rate of a large product in the same process.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import tyro

from scripts.timing import show

ROWS, LENGTH, RANK, ALPHA, RATE = 8, 128, 8, 16.0, 1e-4
TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Settings:
    """Times LoRA's training here and in PEFT on torch, in turns, and prints the table."""

    rounds: int = 3  # turns of each side
    steps: int = 4  # timed steps a turn
    worker: Literal["ours", "peft"] | None = None  # one side alone, as the command calls itself


def main() -> None:
    """Prints the table; `--worker` is how it calls itself for one side."""
    settings = tyro.cli(Settings, prog="python -m scripts.benchmark_training")
    if settings.worker:
        work = {"ours": ours, "peft": peft}[settings.worker]
        sys.stdout.write(json.dumps(work(settings.steps)) + "\n")
    else:
        _refuse_without_peft()
        report(settings.rounds, settings.steps)


def _refuse_without_peft() -> None:
    """Refuses at once where there is nothing to compare with."""
    missing = [name for name in ("torch", "peft") if find_spec(name) is None]
    if missing:
        sys.exit(f"error: {' and '.join(missing)} not installed; run `make bench`")


def report(rounds: int, steps: int) -> None:
    """Runs both sides in turns and shows their medians."""
    sides = ("ours", "peft")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            found[side].append(_worker(side, steps))
    middle = {
        side: {k: statistics.median(run[k] for run in runs) for k in runs[0]}
        for side, runs in found.items()
    }
    rows = []
    for name in ("completion", "all"):
        us, them = middle["ours"][name], middle["peft"][name]
        share = middle["ours"][f"{name}_limit"]
        rows.append([name, f"{us:.0f}", f"{them:.0f}", f"{us / them:.2f}x", f"{us / share:.0%}"])
    rate = middle["ours"]["gflops"]
    title = f"SmolLM2-135M, LoRA rank {RANK} on q and v, {ROWS}x{LENGTH}; limit {rate:.0f} GFLOP/s"
    show(title, ["loss on", "ours, tokens/s", "PEFT, tokens/s", "ratio", "of the limit"], rows)


def _worker(side: str, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "scripts.benchmark_training", "--worker", side]
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [*command, "--steps", str(steps)], capture_output=True, text=True, env=quiet
    )
    if done.returncode:
        sys.exit(f"the {side} side failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _speed(step: Callable[[], None], steps: int) -> float:
    """Tokens a second of a step, after one to warm up: the median step counts."""
    step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return ROWS * LENGTH / statistics.median(times)


def ours(steps: int) -> dict[str, float]:
    """This library's tokens a second, and the limit that matrix products set."""
    import jax
    import numpy as np

    from lora_jax import models
    from lora_jax.bases import load_base
    from lora_jax.modules import init_lora
    from train.batches import assemble, make_plan
    from train.config import Config
    from train.step import make_programs

    base = load_base("smollm2-135m")
    config = Config(data=(), out=Path(), rank=RANK, alpha=ALPHA, learning_rate=RATE)
    rate, result = _product_rate(), {}
    for name, first in (("completion", LENGTH // 2), ("all", 1)):
        plan = make_plan(_examples(base.config.vocabulary, first), batch=ROWS, accumulate=1)
        batch = jax.tree.map(jax.device_put, assemble(plan, np.arange(ROWS)))
        shapes = models.projections(base.config)
        adapter = init_lora(jax.random.key(0), shapes, targets=TARGETS, rank=RANK, alpha=ALPHA)
        programs = make_programs(config, base.config, steps=1000)
        state = programs.start(adapter)

        def step() -> None:
            nonlocal state
            state, metrics = programs.train(base.weights, state, batch)  # noqa: B023
            metrics["loss"].block_until_ready()

        result[name] = _speed(step, steps)
        flops = _step_flops(base.config, labels=ROWS * (LENGTH - first))
        result[f"{name}_limit"] = ROWS * LENGTH / (flops / rate)
    return result | {"gflops": rate / 1e9}


def _examples(vocabulary: int, first: int):
    """Rows of random tokens that are learned from position `first` on."""
    import numpy as np

    from train.examples import Example

    rng, learned = np.random.default_rng(0), np.arange(LENGTH) >= first
    return [
        Example(rng.integers(0, vocabulary, LENGTH, dtype=np.int32), learned, f"row {n}")
        for n in range(ROWS)
    ]


def _step_flops(config, labels: int) -> float:
    """Operations of a step's products with frozen kernels: forward, and back to the inputs."""
    from lora_jax import models

    kernels = sum(n * i * o for n, i, o in models.projections(config).values())
    body = 2 * kernels * ROWS * LENGTH
    return 2 * (body + 2 * config.width * config.vocabulary * labels)


def _product_rate(size: int = 2048) -> float:
    """Operations a second of a large float32 matrix product: the median of twenty."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(20):
        began = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times)


def peft(steps: int) -> dict[str, float]:
    """PEFT's tokens a second on torch, for the same rows."""
    import peft as library
    import torch
    from transformers import AutoModelForCausalLM

    from lora_jax.bases import locate

    folder = locate("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = library.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    model = library.get_peft_model(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    result = {}
    for name, first in (("completion", LENGTH // 2), ("all", 1)):
        tokens = torch.tensor([e.tokens for e in _examples(model.config.vocab_size, first)]).long()
        labels = tokens.clone()
        labels[:, :first] = -100

        def step() -> None:
            model(input_ids=tokens, labels=labels).loss.backward()  # noqa: B023
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        result[name] = _speed(step, steps)
    return result


if __name__ == "__main__":
    main()
