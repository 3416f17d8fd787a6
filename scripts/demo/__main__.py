"""`make demo`: modules trained, added, negated, purified, routed and measured on a real model."""

import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from lora_jax.files import refuse_existing
from scripts.demo import tasks


@dataclass(frozen=True)
class Settings:
    """Runs the demo and prints the path of its report."""

    out: Path = Path("out/demo")  # folder of the report, the modules and the data
    base: str = "smollm2-135m"  # the base model
    train: int = 192  # training questions a task
    test: int = 48  # held-out questions a task
    seed: int = 0  # of the data, the modules and the sampling
    overwrite: bool = True  # the last demo is written over; with the flag it is refused
    only_data: bool = False  # writes the data and the task files alone, without the base model


def main() -> None:
    """Runs all stages, each with its progress, and writes the report."""
    settings = tyro.cli(Settings, prog="make demo ARGS=", config=(tyro.conf.FlagCreatePairsOff,))
    if not settings.overwrite:
        refuse_existing(settings.out, overwrite=False)
    if settings.only_data:
        rows = {"train": settings.train, "test": settings.test, "seed": settings.seed}
        print(tasks.write_files(settings.out / "data", **rows))
    else:
        print(_whole(settings))


def _whole(settings: Settings) -> Path:
    """The report of a demo from its data to its last stage."""
    began = time.time()
    from lora_jax import runtime

    runtime.prepare()
    from scripts.demo import report, stages

    demo = stages.fetch(settings.base, settings.out, settings.train, settings.test, settings.seed)
    modules = stages.train_modules(demo)
    addition = stages.addition(demo, modules)
    negation = stages.negation(demo, modules)
    routing = stages.routing(demo, modules)
    stages.heading("6/6 report")
    return report.write(demo, modules, addition, negation, routing, time.time() - began)


if __name__ == "__main__":
    main()
