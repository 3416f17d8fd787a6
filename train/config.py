"""What a training run is asked to do: this dataclass is the command line of `lora-train`."""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lora_jax.errors import InputError, refuse_all
from train.presets import PRESETS

Data = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE ...")]
Preset = Annotated[str, tyro.conf.arg(help=f"a paper's settings as defaults: {', '.join(PRESETS)}")]


@dataclass(frozen=True)
class Mixing:
    """Learns the weights of a sum of modules instead of a module."""

    of: tuple[str, ...] = ()  # NAME=FOLDER of every adapter or library to mix
    per: Literal["module", "layer", "projection"] = "module"  # what has a weight of its own
    space: Literal["delta", "factor"] = "delta"  # what is summed; factor is LoRAHub's sum
    start: float | None = None  # every weight before the first step (default: their sum is 1)
    bound: float = 0.0  # weights stay within plus and minus this (0: any; LoRAHub: 1.5)
    penalty: float = 0.0  # times the mean size of the weights, added to the loss (LoRAHub: 0.05)
    search: int = 0  # evaluations of a gradient-free search, as LoRAHub's (0: by gradient)
    rank: int = 0  # recompress the result to this rank (0: leave the sum of the ranks)


@dataclass(frozen=True)
class Config:
    """Trains a LoRA or IA3 module on a frozen base model and writes it in PEFT's format."""

    data: Data  # .jsonl and .txt files, hf://datasets/USER/REPO/FILE, hub:NAME[:SPLIT]
    out: Path  # folder of the adapter, its metrics, its loss curve and its checkpoints
    base: str = "smollm2-135m"  # "smollm2-135m", a Hugging Face folder, a GGUF file, hf://USER/REPO
    accept: Literal["", "gemma"] = ""  # the terms of a base model, once you have read them: gemma
    quantize: Literal["none", "int8", "nf4"] = "none"  # holds the frozen projections in few bits
    preset: Preset = ""

    kind: Literal["lora", "dora", "ia3"] = "lora"  # kind of module; DoRA takes LoRA's settings
    targets: tuple[str, ...] = ()  # LoRA's projections; all-linear (default: the attention's)
    rank: int = 8  # LoRA's rank
    alpha: float = 16.0  # LoRA's scale is alpha / rank
    rslora: bool = False  # LoRA's scale is alpha / sqrt(rank) instead
    dropout: float = 0.0  # on a LoRA's input, while training
    ia3_layout: Literal["peft", "pem"] = "peft"  # which activations IA3 rescales
    init_seed: int = 0  # modules to be composed should share their initialisation
    start_from: str | None = None  # an adapter to go on training instead of a new one
    fisher: bool = False  # writes that adapter's Fisher information on the rows; trains nothing

    mix: Mixing = Mixing()

    # task: rows; language-model, next-tokens: plain text; entropy: plain text, for --mix alone
    objective: Literal["task", "language-model", "next-tokens", "entropy"] = "task"
    prompt: str = ""  # template over a row's fields, such as "Question: {question}\nAnswer:"
    completion: str = ""  # template of what follows the prompt, such as " {answer}"
    second: str = ""  # classifiers: template of the second text of a pair; --prompt is the first
    label: str = "label"  # classifiers: the field of a row's label, its name or its number
    labels: tuple[str, ...] = ()  # classifiers: the labels' names, by number (default: the base's)
    loss_on: Literal["completion", "all"] = "completion"  # which tokens of a row are learned
    chat: bool = False  # put {prompt, completion} rows into the base's chat template
    context: int = 507  # next-tokens: tokens given (GenKnowSub, section 3)
    predict: int = 5  # next-tokens: tokens learned
    length: int = 512  # longest row in tokens; longer rows are cut at their end
    pack: bool = False  # fill rows with several texts, kept apart by segment
    limit: int = 0  # use this many rows, or segments of plain text, drawn by the seed (0: all)

    epochs: float = 1.0  # passes over the data, unless steps says how far
    steps: int = 0  # optimiser steps (0: by epochs)
    batch: int = 8  # rows a forward pass
    accumulate: int = 1  # forward passes an optimiser step
    seed: int = 0  # order of the rows, split, dropout
    optimizer_beta1: float = 0.9  # AdamW
    optimizer_beta2: float = 0.999  # AdamW
    optimizer_eps: float = 1e-8  # AdamW
    learning_rate: float = 3e-4  # highest rate of the schedule
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    warmup: float = 0.03  # share of the steps over which the rate rises
    weight_decay: float = 0.0  # AdamW's
    clip: float = 1.0  # largest global norm of the gradient (0: any)
    remat: bool = False  # recompute activations in the backward pass to save memory

    validation: float = 0.1  # share of the rows held out to choose the best state (0: none)
    validation_data: tuple[str, ...] = ()  # held-out files instead of a share
    evaluate_every: int = 0  # steps between validations (0: ten in the run)
    checkpoint_every: int = 100  # steps between checkpoints
    resume: bool = False  # go on from the last checkpoint in the output folder
    overwrite: bool = False  # replace an existing output folder

    mesh_data: int = 1  # devices along the data axis (-1: all that the others leave)
    mesh_fsdp: int = 1  # devices along which rows and weights are cut
    mesh_tensor: int = 1  # devices along which heads and hidden features are cut


def checked(config: Config) -> Config:
    """The config, if every number in it makes sense; one error names all that do not."""
    positive = ("rank", "length", "batch", "accumulate", "context", "predict", "alpha")
    shares = ("dropout", "warmup", "validation", "optimizer_beta1", "optimizer_beta2")
    whole = ("steps", "epochs", "limit", "learning_rate", "clip", "weight_decay")
    value = {field.name: getattr(config, field.name) for field in fields(config)}
    rules = [(n, value[n] > 0, "be positive") for n in positive]
    rules += [(n, 0 <= value[n] < 1, "lie in [0, 1)") for n in shares]
    rules += [
        (n, value[n] >= 0, "not be negative")
        for n in (*whole, "evaluate_every", "checkpoint_every", "optimizer_eps")
    ]
    rules += [(n, 0 <= value[n] < 2**32, "lie in [0, 2**32)") for n in ("seed", "init_seed")]
    numbers = [n for n in value if isinstance(value[n], float)]
    rules += [(n, value[n] != math.inf, "be finite") for n in numbers]
    problems = [f"--{_flag(n)} must {rule}; got {value[n]}" for n, good, rule in rules if not good]
    if not config.data:
        problems.append("give at least one data file, or hub:NAME")
    if config.resume and config.overwrite:
        problems.append("--resume and --overwrite exclude each other")
    if config.completion and not config.prompt:
        problems.append("--completion is the template of what follows --prompt; give both")
    refuse_all(problems + _mixing_problems(config) + _fisher_problems(config), "lora-train")
    return replace(config, validation=0.0) if config.fisher else config


def _fisher_problems(config: Config) -> list[str]:
    """What makes no sense of a measurement of Fisher information."""
    if not config.fisher:
        return []
    problems = []
    if config.start_from is None:
        problems.append("--fisher measures an adapter; give it by --start-from")
    if config.pack:
        problems.append("--fisher squares each row's gradient, and --pack puts rows together")
    if config.mix.of or config.resume:
        problems.append("--fisher goes with neither --mix.of nor --resume")
    if config.validation_data:
        problems.append("--fisher takes every row; leave --validation-data out")
    return problems


def _mixing_problems(config: Config) -> list[str]:
    """What makes no sense of the settings of a learned mixture."""
    mix = config.mix
    numbers = {name: getattr(mix, name) for name in ("bound", "penalty", "search", "rank")}
    problems = [
        f"--mix.{name} must not be negative, and finite; got {value}"
        for name, value in numbers.items()
        if not 0 <= value < math.inf
    ]
    if mix.start is not None and not math.isfinite(mix.start):
        problems.append(f"--mix.start must be finite; got {mix.start}")
    if mix != Mixing() and not mix.of:
        problems.append("--mix.of names what is mixed: NAME=FOLDER ...")
    if config.objective == "entropy" and not mix.of:
        problems.append("--objective entropy is for --mix.of: a module would learn to say one word")
    if mix.search and mix.per != "module":
        problems.append(f"--mix.search is for few weights; leave --mix.per {mix.per} out")
    if mix.of and config.start_from is not None:
        problems.append("--start-from is a module's; --mix.start is where the weights begin")
    return problems


def _flag(name: str) -> str:
    return name.replace("_", "-")


# What a resumed run may change without becoming another run.
_FREE = {"resume", "overwrite", "checkpoint_every", "out", "mesh_data", "mesh_fsdp", "mesh_tensor"}
_FREE |= {"learning_rate", "clip"}  # what a run that diverged needs
_FREE |= {"accept"}  # what lets a base be fetched, and is not asked for twice


def as_json(config: Config) -> dict[str, Any]:
    """The config as JSON values."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def _plain(value: Any) -> Any:
    """Paths as strings and tuples as lists, within dicts too."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def refuse_other_run(config: Config, saved: dict[str, Any]) -> None:
    """Refuses to resume a run whose settings are not this one's, naming what differs."""
    ours = as_json(config)
    differ = [
        f"--{_flag(k)} was {saved.get(k)!r}, is {v!r}"
        for k, v in ours.items()
        if k not in _FREE and saved.get(k) != v
    ]
    if differ:
        raise InputError(f"{config.out} holds another run: " + "; ".join(differ))
