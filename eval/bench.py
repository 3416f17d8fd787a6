"""A base model on its devices, and what each kind of task measures of its columns."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from eval import batches, classify, compare, items, perplexity, prompts, rows
from eval.columns import Column
from eval.compare import Stack
from eval.config import Evaluation
from eval.devices import Run, place, row_multiple, spread
from eval.generation import Sampling, generate
from eval.items import Item
from eval.prompts import Question
from eval.results import Answers, Perplexity, Replies
from eval.scoring import score
from eval.tasks import Classification, Corpus, Measured, Task
from lora_jax import models
from lora_jax.bases import Base
from lora_jax.errors import InputError, refuse_all
from lora_jax.labelled import encode_texts
from lora_jax.progress import say
from lora_jax.tokens import Tokenizer, opening_tokens

# Tokens in a batch, and how many could be run in the time that one compilation takes.
_CPU, _ACCELERATOR = (4_096, 512), (32_768, 131_072)


@dataclass(frozen=True)
class Bench:
    """A base model, and the columns to measure on it."""

    settings: Evaluation
    base: Base
    tokenizer: Tokenizer
    columns: list[Column]

    @cached_property
    def stacks(self) -> list[Stack]:
        """The columns' modules, stacked."""
        return compare.stacks([column.adapter for column in self.columns])

    @cached_property
    def score(self) -> Run:
        """Multiple-choice scoring, compiled."""
        return spread(score, self.base.config, self.placed, self.settings.devices)

    @cached_property
    def read(self) -> Run:
        """The reading of windows of text, compiled."""
        return spread(perplexity.window_nll, self.base.config, self.placed, self.settings.devices)

    @cached_property
    def classify(self) -> Run:
        """The labels of texts, compiled."""
        return spread(classify.label_nll, self.base.config, self.placed, self.settings.devices)

    @cached_property
    def placed(self) -> object:
        """The weights on every device."""
        return place(self.base.weights, self.settings.devices)

    @cached_property
    def budget(self) -> dict[str, int]:
        """Sizes for `batches.plan`, shared by the columns of the largest stack."""
        tokens, program = _CPU if jax.default_backend() == "cpu" else _ACCELERATOR
        most = max(len(stack.columns) for stack in self.stacks)
        return {
            "tokens": (self.settings.batch_tokens or tokens) // most,
            "program": program // most,
            "multiple": row_multiple(self.settings.devices),
        }

    @cached_property
    def prompts(self) -> list[list[int]]:
        """The prompts of `--generate` in tokens."""
        if not self.settings.generate:
            return []
        style = self.settings.format
        surround = prompts.frame(style, self.tokenizer)
        texts = [surround(prompt)[0] for prompt in self.settings.generate]
        encoded = self.tokenizer(texts, add_special_tokens=style == "plain", verbose=False)
        return encoded["input_ids"]


def sampling(settings: Evaluation) -> Sampling:
    """How replies are sampled."""
    return Sampling(
        settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k, settings.seed
    )


def refuse_beyond_context(bench: Bench, wanted: Iterable[Measured]) -> None:
    """Refuses the windows and replies that the base's context has no room for."""
    settings, context = bench.settings, bench.base.config.context
    problems = []
    if settings.stride >= context and any(isinstance(task, Corpus) for task in wanted):
        problems.append(f"--stride {settings.stride} must be smaller")
    new = settings.max_new_tokens
    problems += [
        f"prompt {prompt[:40]!r} has {len(tokens)} tokens and --max-new-tokens adds {new}; "
        f"shorten either"
        for prompt, tokens in zip(settings.generate, bench.prompts, strict=True)
        if len(tokens) + new > context
    ]
    refuse_all(problems, f"the base model reads {context} tokens")


def refuse_misfits(bench: Bench, wanted: Sequence[Measured]) -> None:
    """Refuses tasks that the base model is not of the kind for."""
    kind = models.kind(bench.base.config)
    problems = classify.misfits(kind, wanted, generate=bool(bench.settings.generate))
    refuse_all(problems, f"the base model is of the kind {kind}")
    if kind == "encoder-decoder":
        _refuse_unread(bench, wanted)


def _refuse_unread(bench: Bench, wanted: Iterable[Measured]) -> None:
    """Refuses the chances of a text that an encoder-decoder reads but does not write."""
    texts = [task.name for task in wanted if isinstance(task, Corpus)]
    problems = [f"{name} has no perplexity; take a causal base model for texts" for name in texts]
    if bench.settings.score == "text_mean":
        problems.append("--score text_mean counts prompts, which are only read; take answer_mean")
    refuse_all(problems, "the base model is an encoder-decoder")


def answers(bench: Bench, task: Task) -> Answers:
    """A multiple-choice task's outcome."""
    settings, form = bench.settings, task.form(bench.settings.format)
    found = rows.load_rows(task, form, settings.data_root, limit=settings.limit, seed=settings.seed)
    surround = prompts.frame(settings.format, bench.tokenizer)
    questions = [prompts.pose(task, form, row, surround) for row in found]
    planned = batches.plan(_items(bench, questions), **bench.budget)
    measured = compare.measure(bench.score, bench.stacks, planned, task.name)
    scores = {
        column.name: [s[: len(q.prompts)] for s, q in zip(values, questions, strict=True)]
        for column, values in zip(bench.columns, measured, strict=True)
    }
    _refuse_non_finite(scores, [question.where for question in questions])
    return Answers(task.name, rows.source(task, settings.data_root), questions, scores)


def labels(bench: Bench, task: Classification) -> Answers:
    """A classification task's outcome: the scores of a text are the nats of each label."""
    settings, config = bench.settings, bench.base.config
    names = task.labels or models.label_names(config)
    found = rows.draw_rows(task, settings.data_root, limit=settings.limit, seed=settings.seed)
    texts, questions = zip(*(classify.labelled(task, row, names) for row in found), strict=True)
    ids, cut = encode_texts(bench.tokenizer, texts, config.context)
    if any(cut):
        say(f"{task.name}: {sum(cut)} of {len(cut)} texts are cut to {config.context} tokens")
    size = {key: bench.budget[key] for key in ("tokens", "multiple")}
    measured = compare.measure(bench.classify, bench.stacks, classify.plan(ids, **size), task.name)
    scores = {column.name: values for column, values in zip(bench.columns, measured, strict=True)}
    for column, (first, *_) in scores.items():
        if len(first) != len(names):
            told = f"{column} tells {len(first)} labels apart and {task.name} has {len(names)}"
            raise InputError(f"{told} ({', '.join(names)}); leave it out of --compare")
    _refuse_non_finite(scores, [question.where for question in questions])
    return Answers(task.name, rows.source(task, settings.data_root), questions, scores)


def _items(bench: Bench, questions: Sequence[Question]) -> list[Item]:
    """Questions in tokens, as the base model takes them."""
    how = {"score": bench.settings.score, "style": bench.settings.format}
    if models.kind(bench.base.config) == "encoder-decoder":
        return items.sourced_items(questions, bench.tokenizer, **how)
    return items.items(questions, bench.tokenizer, **how, context=bench.base.config.context)


def text_perplexity(bench: Bench, corpus: Corpus) -> Perplexity:
    """A text's outcome."""
    settings = bench.settings
    text = rows.load_text(corpus, settings.data_root)
    tokens = np.array(bench.tokenizer(text, verbose=False)["input_ids"], np.int32)
    window = min(settings.window, bench.base.config.context)
    opening = opening_tokens(bench.tokenizer)
    whole = perplexity.windows(tokens, window, settings.stride, *opening)
    whole = jax.tree.map(lambda x: x[: settings.limit], whole)
    size = {key: bench.budget[key] for key in ("tokens", "multiple")}
    planned = perplexity.batches(whole, **size)
    measured = compare.measure(bench.read, bench.stacks, planned, corpus.name)
    nats = {c.name: np.array(v, float) for c, v in zip(bench.columns, measured, strict=True)}
    source = rows.source(corpus, settings.data_root)
    _refuse_non_finite(nats, [f"{source} window {n}" for n in range(len(whole.tokens))])
    return Perplexity(corpus.name, source, nats, whole.scored.sum(axis=1))


def _refuse_non_finite(scores: Mapping[str, Iterable[Any]], places: Sequence[str]) -> None:
    """Refuses scores, by column, that cannot be ranked or averaged."""
    for column, values in scores.items():
        for value, where in zip(values, places, strict=True):
            if not np.isfinite(value).all():
                raise InputError(
                    f"{column}: non-finite score on {where}; its weights hold NaN or overflow, "
                    f"so mend it, scale it down or leave it out"
                )


def replies(bench: Bench) -> Replies:
    """What every column writes after the prompts of `--generate`."""
    tokenizer, how = bench.tokenizer, sampling(bench.settings)
    stop = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id  # -1 never occurs

    def write(column: Column) -> list[str]:
        """A column's reply to every prompt."""
        written = generate(
            bench.base.config,
            bench.base.weights,
            column.adapter,
            bench.prompts,
            stop=stop,
            sampling=how,
            told=f"the replies of {column.name}",
        )
        return tokenizer.batch_decode(written, skip_special_tokens=True)

    return Replies(bench.settings.generate, {c.name: write(c) for c in bench.columns})
