"""The demo's stages, each a function from what is there to what it found."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from compose.arithmetic import scale, weighted_sum
from compose.arrow import applied, routing_statistics
from compose.expression import evaluate
from compose.library import Library
from compose.lowrank import norm
from eval import bench as benches
from eval import results, tasks
from eval.columns import Column
from eval.config import Evaluation
from eval.results import Line
from lora_jax import models, peft
from lora_jax.bases import Base, load_base
from lora_jax.modules import Adapter, LoRA, Module, init_lora
from lora_jax.tokens import Tokenizer, encode, load_tokenizer
from scripts.demo import tasks as data
from train.config import Config
from train.run import train

RANK, ALPHA, RATE, TOP_K = 4, 16.0, 1e-3, 2
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Demo:
    """What every stage uses: the base model, and where the data and the modules are."""

    base: Base
    tokenizer: Tokenizer
    out: Path
    seed: int

    @property
    def data(self) -> Path:
        """The folder of the demo's data."""
        return self.out / "data"


@dataclass(frozen=True)
class Trained:
    """The modules by name, and what each cost and reached."""

    modules: Mapping[str, Adapter]
    records: Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Sweep:
    """Accuracy on two tasks along λ·first + (1 - λ)·second, in both spaces."""

    first: str
    second: str
    weights: Sequence[float]
    accuracy: Mapping[str, Mapping[str, Sequence[Line]]]  # by space, by task


@dataclass(frozen=True)
class Unlearning:
    """One module at one strength: how much is exclaimed, and neutral text's perplexity."""

    name: str
    strength: float
    exclaimed: float
    perplexity: float
    sample: str


@dataclass(frozen=True)
class Routing:
    """Every column's accuracy by task, and where Arrow sent each task's tokens."""

    lines: Mapping[str, Sequence[Line]]
    shares: Mapping[str, np.ndarray]  # by task: (layers, modules)
    entropy: Mapping[str, float]  # by task, of a token's weights, over its bound


def heading(text: str) -> None:
    """Announces a stage."""
    Console(stderr=True).rule(f"[bold]{text}", align="left")


def fetch(base: str, out: Path, rows: int, held_out: int, seed: int) -> Demo:
    """Stage 1: the base model in memory, the data on disk."""
    heading("1/6 the base model and the data")
    loaded = load_base(base)
    demo = Demo(loaded, load_tokenizer(loaded.folder), out, seed)
    data.write_files(demo.data, train=rows, test=held_out, seed=seed)
    return demo


def train_modules(demo: Demo) -> Trained:
    """Stage 2: a module a task, one of general knowledge, one of a habit, and an IA3 module."""
    heading("2/6 training the modules")
    question = {"prompt": "{question}", "completion": " {answer}"}
    runs: dict[str, dict[str, Any]] = {
        name: question | {"data": f"{name}-train.jsonl"} for name in data.TASKS
    }
    runs["mood_ia3"] = runs["mood"] | {"kind": "ia3", "learning_rate": 1e-2}
    runs["general"] = {
        "data": "general.txt",
        "objective": "next-tokens",
        "context": 27,
        "predict": 5,
        "steps": 17,
    }
    runs["cheers"] = {"data": "cheers-train.jsonl", "chat": True, "batch": 4, "epochs": 1.0}
    folders = {name: train(config(demo, name, run), demo.base) for name, run in runs.items()}
    modules = {n: peft.load_adapter(folder, demo.base.config) for n, folder in folders.items()}
    records = {name: _record(folder) for name, folder in folders.items()}
    return Trained(modules, records)


def config(demo: Demo, name: str, run: Mapping[str, Any]) -> Config:
    """A module's run: what all share, and what is its own; `data` is a file of the demo's."""
    common: dict[str, Any] = {
        "targets": PROJECTIONS,
        "rank": RANK,
        "alpha": ALPHA,
        "learning_rate": RATE,
        "epochs": 2.0,
        "init_seed": demo.seed,
        "seed": demo.seed,
        "checkpoint_every": 0,
        "overwrite": True,
        "out": demo.out / "modules" / name,
    }
    return Config(**common | dict(run) | {"data": (str(demo.data / run["data"]),)})


def _record(folder: Path) -> dict[str, Any]:
    from lora_jax.files import read_json
    from train.record import read_metrics
    from train.run import RECORD

    return read_json(folder / RECORD) | {"metrics": read_metrics(folder / "metrics.jsonl")}


def _measure(demo: Demo, columns: Mapping[str, Adapter], names: Sequence[str]) -> list:
    """Each task's outcome over the columns, by the library's own evaluation."""
    settings = Evaluation(seed=demo.seed)
    made = [Column(name, name, adapter) for name, adapter in columns.items()]
    bench = benches.Bench(settings, demo.base, demo.tokenizer, made)
    return [benches.answers(bench, tasks.read_task(demo.data / f"{n}.json")) for n in names]


def addition(demo: Demo, trained: Trained) -> Sweep:
    """Stage 3: a λ sweep between two task modules, in factor space (the paper's) and exact."""
    heading("3/6 addition: a λ sweep between two tasks")
    first, second = "mood", "kind"
    pair = [trained.modules[first], trained.modules[second]]
    weights = [round(float(w), 2) for w in np.linspace(0, 1, 6)]
    columns = {
        f"{space} {w}": weighted_sum(pair, [w, 1 - w], space=space)
        for space in ("factor", "delta")
        for w in weights
    }
    found: dict[str, dict[str, list[Line]]] = {"factor": {}, "delta": {}}
    for outcome in _measure(demo, columns, (first, second)):
        for line in results.lines(outcome, demo.seed):
            found[line.column.split()[0]].setdefault(outcome.task, []).append(line)
    return Sweep(first, second, weights, found)


def negation(demo: Demo, trained: Trained) -> list[Unlearning]:
    """Stage 4: the habit's module at several strengths, and a random module of its norm."""
    heading("4/6 negation: unlearning a habit")
    cheers = trained.modules["cheers"]
    random = _random_like(cheers, demo.seed)
    plan = [("cheers", cheers, s) for s in (1.0, 0.0, -0.25, -0.5, -0.75, -1.0)]
    plan += [("random of its norm", random, s) for s in (-0.5, -1.0)]
    columns = {f"{n} {s:+}": scale(m, s, space="delta") for n, m, s in plan}
    perplexity = _perplexity(demo, columns)
    written = _replies(demo, columns)
    return [
        Unlearning(name, strength, _exclaimed(written[key]), perplexity[key], written[key][0])
        for key, (name, _, strength) in zip(columns, plan, strict=True)
    ]


def _random_like(module: Adapter, seed: int) -> Adapter:
    """A module of random directions whose delta has the same norm at every layer and projection."""

    def one(index: int, lora: Module) -> Module:
        assert isinstance(lora, LoRA)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
        a, b = (jax.random.normal(k, x.shape) for k, x in zip(keys, (lora.a, lora.b), strict=True))
        drawn = LoRA(a, b, lora.scale)
        return LoRA(a, b * (norm(lora) / norm(drawn))[:, None, None], lora.scale)

    return {path: one(index, lora) for index, (path, lora) in enumerate(module.items())}


def _perplexity(demo: Demo, columns: Mapping[str, Adapter]) -> dict[str, float]:
    """The perplexity of the neutral text under each column."""
    settings = Evaluation(window=128, stride=64)
    made = [Column(name, name, adapter) for name, adapter in columns.items()]
    bench = benches.Bench(settings, demo.base, demo.tokenizer, made)
    neutral = tasks.Corpus("neutral text", str(demo.data / "neutral.txt"))
    outcome = benches.text_perplexity(bench, neutral)
    total = outcome.counts.sum()
    return {name: float(np.exp(nats.sum() / total)) for name, nats in outcome.nats.items()}


def _replies(demo: Demo, columns: Mapping[str, Adapter]) -> Mapping[str, Sequence[str]]:
    """What each column replies to the held-out prompts, four times each."""
    prompts = sorted({row["prompt"] for row in data.cheers(held_out=True)}) * 4
    settings = Evaluation(
        generate=tuple(prompts), format="chat", temperature=0.7, max_new_tokens=40, seed=demo.seed
    )
    made = [Column(name, name, adapter) for name, adapter in columns.items()]
    return benches.replies(benches.Bench(settings, demo.base, demo.tokenizer, made)).replies


def _exclaimed(texts: Sequence[str]) -> float:
    """The share of sentences that end with an exclamation mark."""
    ends = re.findall(r"[.!?]+", " ".join(texts))
    return sum("!" in end for end in ends) / max(len(ends), 1)


def routing(demo: Demo, trained: Trained) -> Routing:
    """Stage 5: the task modules alone, averaged, routed, and routed with the general taken out."""
    heading("5/6 GenKnowSub and Arrow over the library")
    library = Library(tuple(data.TASKS), tuple(trained.modules[name] for name in data.TASKS))
    inputs = {"tasks": library, "general": trained.modules["general"], "untrained": _start(demo)}
    arrow = f"arrow({{}}, top_k={TOP_K})"
    columns: dict[str, Adapter] = {"base": {}}
    columns |= dict(zip(library.names, library.adapters, strict=True))
    columns["uniform"] = applied(evaluate("mean(tasks)", inputs))
    columns["Arrow"] = applied(evaluate(arrow.format("tasks"), inputs))
    purified = arrow.format("gks(tasks, general)")
    columns["GenKnowSub + Arrow, exact"] = applied(evaluate(purified, inputs))
    factors = evaluate(purified, inputs, space="factor")
    columns["GenKnowSub + Arrow, factors"] = applied(factors)
    control = arrow.format("gks(tasks, untrained)")
    columns["control: untrained + Arrow, factors"] = applied(
        evaluate(control, inputs, space="factor")
    )
    outcomes = _measure(demo, columns, tuple(data.TASKS))
    lines = {outcome.task: results.lines(outcome, demo.seed) for outcome in outcomes}
    shares, entropy = {}, {}
    for name in data.TASKS:
        shares[name], entropy[name] = _routes(demo, columns["Arrow"], name)
    return Routing(lines, shares, entropy)


def _start(demo: Demo) -> Adapter:
    """The initialisation that every module of the demo began from, untrained."""
    return init_lora(
        jax.random.key(demo.seed),
        models.projections(demo.base.config),
        targets=PROJECTIONS,
        rank=RANK,
        alpha=ALPHA,
    )


def _routes(demo: Demo, adapter: Adapter, name: str) -> tuple[np.ndarray, float]:
    """Where Arrow sends the tokens of a task's held-out questions: (layers, modules)."""
    texts = [str(q["question"]) for q in data.questions(name, 16, held_out=True, seed=demo.seed)]
    ids = encode(demo.tokenizer, texts)
    tokens, segments = (np.zeros((len(ids), max(map(len, ids))), np.int32) for _ in range(2))
    for row, sequence in enumerate(ids):
        tokens[row, : len(sequence)], segments[row, : len(sequence)] = sequence, 1
    config, weights = demo.base.config, demo.base.weights
    found = routing_statistics(
        config, weights, adapter, jnp.asarray(tokens), jnp.asarray(segments)
    ).values()
    share = np.mean([part["share"] for part in found], axis=0)
    return share, float(np.mean([part["relative_entropy"] for part in found]))
