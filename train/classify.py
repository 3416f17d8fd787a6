"""Labelled rows to a classifier's examples, and the head that it trains along with a module."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import models
from lora_jax.errors import refuse_all
from lora_jax.labelled import Form, encode_texts, read
from lora_jax.modules import Saved
from lora_jax.tokens import Tokenizer
from train.config import Config
from train.examples import Example, Loaded, drawn
from train.rows import read_rows


def refuse_misfits(config: Config, base: models.Config) -> None:
    """Refuses settings that mean nothing to a base model of this kind."""
    problems, kind = [], models.kind(base)
    if kind == "classifier":
        if config.objective != "task":
            problems.append(f"--objective {config.objective} has no labels; take task")
        if config.completion:
            problems.append("--completion is not read; name the label's field with --label")
        if config.chat:
            problems.append("--chat is for models that reply; leave it out")
        if config.loss_on == "all":
            problems.append("--loss-on all is for models of tokens; leave it out")
        if config.second and not config.prompt:
            problems.append("--second is the text after --prompt's; give both")
        if config.labels and config.labels != models.label_names(base):
            names = ", ".join(models.label_names(base))
            problems.append(f"--labels {' '.join(config.labels)}: it has {names}")
    else:
        given = {"--labels": config.labels, "--second": config.second}
        problems += [f"{flag} is a classifier's; leave it out" for flag, v in given.items() if v]
        if config.prompt and not config.completion:
            problems.append("--prompt needs --completion, the template of what follows it")
    refuse_all(problems, f"the base model is of the kind {kind}")


def load_labelled(
    config: Config,
    sources: tuple[str, ...],
    tokenizer: Tokenizer,
    labels: tuple[str, ...],
    limit: int = 0,
) -> Loaded:
    """The examples of some sources of labelled rows, cut to the run's length."""
    form = Form(config.prompt, config.second, config.label)
    rows = [read(row, form, labels) for row in drawn(read_rows(sources), config, limit)]
    ids, cut = encode_texts(tokenizer, rows, config.length)
    examples = tuple(
        Example(np.asarray(i, np.int32), np.arange(len(i)) == 0, row.place, c, label=row.label)
        for row, i, c in zip(rows, ids, cut, strict=True)
    )
    return Loaded(examples, sum(cut))


def first_head(config: models.Config, weights: Mapping[str, Any]) -> dict[str, Saved]:
    """A classifier's head as the base has it, to be trained with a module; {} of other models."""
    return {p: Saved(jnp.asarray(weights[p], jnp.float32)) for p in models.head_paths(config)}
