"""A run's data: read, limited, split into trained and held out, and planned as batches."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from jax.sharding import Mesh

from lora_jax import models
from lora_jax.bases import Base
from lora_jax.errors import InputError
from lora_jax.mesh import rows_multiple
from lora_jax.progress import say
from lora_jax.tokens import load_tokenizer
from train.batches import Plan, make_plan
from train.classify import load_labelled, refuse_misfits
from train.config import Config
from train.examples import Example, Loaded, load_examples
from train.sourced import load_sourced


def plan_data(config: Config, base: Base, mesh: Mesh | None) -> tuple[Plan, Plan | None]:
    """The batches to train on, and the held-out ones if there are any."""
    config = _within_context(config, base)
    reach = _reach(config, base)
    refuse_misfits(config, base.config)
    load = _loader(config, base)
    loaded = load(config.data, limit=config.limit)
    _tell(loaded, config, ", ".join(config.data))
    if config.validation_data:
        apart = load(config.validation_data)
        _tell(apart, config, ", ".join(config.validation_data))
        examples, held = list(loaded.examples), list(apart.examples)
    else:
        examples, held = split(loaded.examples, config.validation, config.seed)
    size = {
        "batch": config.batch,
        "pack": reach if config.pack else 0,
        "multiple": rows_multiple(mesh),
    }
    plan = make_plan(examples, accumulate=config.accumulate, **size)
    return plan, make_plan(held, accumulate=1, **size) if held else None


def _loader(config: Config, base: Base) -> Callable[..., Loaded]:
    """What turns sources into examples for a base model of this kind."""
    tokenizer, kind = load_tokenizer(base.folder), models.kind(base.config)
    if kind == "classifier":
        labels = models.label_names(base.config)
        return partial(load_labelled, config, tokenizer=tokenizer, labels=labels)
    if kind == "encoder-decoder":
        start = models.start_token(base.config)
        return partial(load_sourced, config, tokenizer=tokenizer, start=start)
    return partial(load_examples, config, tokenizer=tokenizer)


def _within_context(config: Config, base: Base) -> Config:
    """The run with rows of the base model's context, where they are as long as they usually are."""
    if config.length != Config.length or base.config.context >= config.length:
        return config
    if config.objective != "next-tokens":
        say(f"--length is {base.config.context}, the base model's context")
    return replace(config, length=base.config.context)


def _reach(config: Config, base: Base) -> int:
    """The most tokens a row can have; refused if the base model cannot read so many."""
    few = config.objective == "next-tokens"
    reach = config.context + config.predict if few else config.length
    if reach > base.config.context:
        flags = "--context and --predict" if few else "--length"
        raise InputError(
            f"rows of {reach} tokens exceed the base model's context of {base.config.context}; "
            f"lower {flags}"
        )
    return reach


def _tell(loaded: Loaded, config: Config, where: str) -> None:
    """Says how many rows were cut, and how many have nothing to learn."""
    count = len(loaded.examples) + loaded.lost
    if loaded.cut:
        say(f"{where}: {loaded.cut} of {count} rows are cut to --length {config.length}")
    if loaded.lost:
        say(f"{where}: {loaded.lost} of {count} rows are left out, with nothing to learn in reach")


def split(
    examples: tuple[Example, ...], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """The examples without a held-out share, and that share, drawn by the seed."""
    count = round(share * len(examples))
    order = np.random.default_rng((seed, 0)).permutation(len(examples))
    if count == len(examples):
        raise InputError(
            f"{len(examples)} examples are too few to hold out {share:g}; lower --validation"
        )
    return [examples[i] for i in sorted(order[count:])], [examples[i] for i in order[:count]]
