"""What a run tells of itself: notes, metrics.jsonl, a loss curve, what its result rests on."""

import json
import math
from pathlib import Path
from typing import Any

from lora_jax.bases import Base
from lora_jax.files import sha256, write_text
from lora_jax.provenance import environment
from train.config import Config
from train.rows import existing


def provenance(config: Config, base: Base) -> dict[str, Any]:
    """What a result rests on: the base's and the data's hashes, and the environment."""
    files = [p for p in (*config.data, *config.validation_data) if not p.startswith("hub:")]
    return {
        "base_sha256": base.digest,
        "data_sha256": {path: sha256(existing(path)) for path in files},
        **environment(),
    }


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Adds a line to metrics.jsonl; a number that is not finite is written as null."""
    plain = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def forget_after(path: Path, step: int) -> None:
    """Drops the metrics of steps that a resumed run will take again."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def draw_losses(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Writes the loss curve as a PNG: every step faint, a running mean, the validations as dots."""
    from matplotlib.figure import Figure  # its import takes half a second

    train = [(r["step"], r["loss"]) for r in metrics if r.get("loss") is not None]
    held = [(r["step"], r["validation_loss"]) for r in metrics if "validation_loss" in r]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(steps, _running_mean(losses), color="tab:blue", label="training, running mean")
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="tab:orange", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per learned token)", title=title)
    axes.grid(alpha=0.3)
    if train or held:
        axes.legend()
    figure.savefig(path, dpi=120)


def _running_mean(losses: tuple[float, ...], decay: float = 0.9) -> list[float]:
    """An exponential mean without the bias towards its start."""
    total = weight = 0.0
    means = []
    for loss in losses:
        total, weight = decay * total + loss, decay * weight + 1
        means.append(total / weight)
    return means
