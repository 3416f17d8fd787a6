"""The demo's report: one HTML page that needs nothing beside it."""

from collections.abc import Sequence
from pathlib import Path

import jax
from jinja2 import Environment
from markupsafe import Markup

import lora_jax
from lora_jax.files import write_text
from scripts.demo import figures
from scripts.demo.stages import TOP_K, Demo, Routing, Sweep, Trained, Unlearning

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write(
    demo: Demo,
    trained: Trained,
    sweep: Sweep,
    unlearning: Sequence[Unlearning],
    routing: Routing,
    seconds: float,
) -> Path:
    """Writes report.html into the demo's folder, and its path."""
    drawn = {
        "losses": figures.losses(trained.records),
        "sweep": figures.sweep(sweep),
        "unlearning": figures.unlearning(unlearning),
        "columns": figures.columns(routing),
        "shares": figures.shares(routing),
    }
    # What the model wrote is escaped; the figures are our own markup.
    environment = Environment(autoescape=True)
    safe = {name: Markup(svg) for name, svg in drawn.items()}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        base=demo.base.folder.name,
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        version=lora_jax.__version__,
        test=next(iter(routing.lines.values()))[0].examples,
        seed=demo.seed,
        seconds=seconds,
        records=trained.records,
        sweep=sweep,
        unlearning=unlearning,
        top_k=TOP_K,
        tables={task: figures.intervals(lines) for task, lines in routing.lines.items()},
        entropy=routing.entropy,
        figures=safe,
    )
    path = demo.out / "report.html"
    write_text(path, page)
    return path
