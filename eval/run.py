"""A whole evaluation: from the command's settings to results on disk and tables on screen."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from compose.inputs import located, named_folders
from eval import bench as benches
from eval import columns, report, results, sweep_figures, tasks
from eval.bench import Bench
from eval.classify import common_labels
from eval.config import Evaluation, checked
from eval.results import Answers, Line, Perplexity, Replies
from eval.sweep import read_sweep
from eval.tasks import Classification, Corpus, Measured
from lora_jax import bases
from lora_jax.errors import InputError
from lora_jax.files import new_folder, refuse_existing, write_json
from lora_jax.hub import local
from lora_jax.provenance import environment, hashed
from lora_jax.tokens import load_tokenizer


def run(settings: Evaluation) -> None:
    """Measures every task for every column, writes the results and prints the tables."""
    began = time.perf_counter()
    checked(settings)
    benches.sampling(settings)  # refuses what cannot be, before anything is measured
    refuse_existing(settings.out, settings.overwrite)
    swept = read_sweep(settings.sweep)
    wanted, named = _wanted(settings), named_folders(settings.adapters, taken={columns.BASE})
    folders = {name: located(folder) for name, folder in named.items()}
    base = bases.load_base(
        settings.base, labels=common_labels(wanted), quantization=settings.quantize
    )
    built = columns.build(settings.compare, folders, base.config, settings.space, swept)
    bench = Bench(settings, base, load_tokenizer(base.folder), built)
    benches.refuse_misfits(bench, wanted)
    benches.refuse_beyond_context(bench, wanted)
    outcomes = [_measured(bench, task) for task in wanted]
    replies = benches.replies(bench) if settings.generate else None
    numbers = [line for outcome in outcomes for line in results.lines(outcome, settings.seed)]
    provenance = _provenance(bench, folders) | {"seconds": round(time.perf_counter() - began, 2)}
    _write(bench, results.document(outcomes, numbers, replies, provenance), numbers)
    _print(outcomes, numbers, replies)
    print(settings.out / "results.json")


def _wanted(settings: Evaluation) -> list[Measured]:
    """Everything to measure, each name once."""
    found: list[Measured] = [tasks.find(name) for name in settings.tasks]
    found += [tasks.read_any(path) for path in map(local, settings.task_file)]
    found += [Corpus(path.stem, str(path.absolute())) for path in map(local, settings.text)]
    names = [task.name for task in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"task {twice[0]!r} is given twice; name each once")
    if not found and not settings.generate:
        raise InputError("nothing to measure; name a task (such as arc_easy), --text or --generate")
    return found


def _measured(bench: Bench, task: Measured) -> Answers | Perplexity:
    if isinstance(task, Corpus):
        return benches.text_perplexity(bench, task)
    if isinstance(task, Classification):
        return benches.labels(bench, task)
    return benches.answers(bench, task)


def _write(bench: Bench, document: dict[str, Any], numbers: Sequence[Line]) -> None:
    """Writes results.json, the chart of accuracies if there are any, and the sweep's figures."""
    with new_folder(bench.settings.out, bench.settings.overwrite) as scratch:
        write_json(scratch / "results.json", document)
        sweep_figures.draw(numbers, bench.columns, scratch)
        if any(line.metric == "accuracy" for line in numbers):
            report.chart(numbers, scratch / "accuracy.png")


def _provenance(bench: Bench, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Everything needed to run this again and get the same numbers."""
    return environment() | {
        "base": {"name": bench.settings.base, "sha256": bench.base.digest},
        "adapters": hashed(folders),
        "columns": {column.name: column.recipe for column in bench.columns},
        "sweep": {c.name: dict(c.setting) for c in bench.columns if c.setting},
        "settings": {key: _plain(value) for key, value in asdict(bench.settings).items()},
    }


def _plain(value: Any) -> Any:
    """Paths as strings, for JSON."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _print(
    outcomes: Sequence[Answers | Perplexity], numbers: Sequence[Line], replies: Replies | None
) -> None:
    console = Console(highlight=False)
    if numbers:
        console.print(report.table(numbers))
    for outcome in outcomes:
        groups = results.by_group(outcome) if isinstance(outcome, Answers) else {}
        if 0 < len(groups) <= 30:
            console.print(report.group_table(outcome.task, groups))
    if replies:
        console.print(report.reply_table(replies))
