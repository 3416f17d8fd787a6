"""A base model on its devices, and what each kind of task measures of its columns."""

from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np

from eval import batches, compare, items, perplexity, prompts, rows
from eval.columns import Column
from eval.compare import Stack
from eval.config import Evaluation
from eval.devices import Run, place, row_multiple, spread
from eval.generation import Sampling, generate
from eval.results import Answers, Replies, Surprise
from eval.scoring import score
from eval.tasks import Corpus, Task
from lora_jax.bases import Base
from lora_jax.tokens import Tokenizer

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


def answers(bench: Bench, task: Task) -> Answers:
    """A multiple-choice task's outcome."""
    settings, form = bench.settings, task.form(bench.settings.format)
    found = rows.load_rows(task, form, settings.data_root, limit=settings.limit, seed=settings.seed)
    surround = prompts.frame(settings.format, bench.tokenizer)
    questions = [prompts.pose(task, form, row, surround) for row in found]
    encoded = items.items(
        questions,
        bench.tokenizer,
        score=settings.score,
        style=settings.format,
        context=bench.base.config.context,
    )
    planned = batches.plan(encoded, **bench.budget)
    measured = compare.measure(bench.score, bench.stacks, planned, task.name)
    scores = {
        column.name: [s[: len(q.prompts)] for s, q in zip(values, questions, strict=True)]
        for column, values in zip(bench.columns, measured, strict=True)
    }
    return Answers(task.name, rows.source(task, settings.data_root), questions, scores)


def surprise(bench: Bench, corpus: Corpus) -> Surprise:
    """A text's outcome."""
    settings = bench.settings
    text = rows.load_text(corpus, settings.data_root)
    tokens = np.array(bench.tokenizer(text, verbose=False)["input_ids"], np.int32)
    window = min(settings.window, bench.base.config.context)
    whole = perplexity.windows(tokens, window, settings.stride)
    whole = jax.tree.map(lambda x: x[: settings.limit], whole)
    size = {key: bench.budget[key] for key in ("tokens", "multiple")}
    planned = perplexity.batches(whole, **size)
    measured = compare.measure(bench.read, bench.stacks, planned, corpus.name)
    nats = {c.name: np.array(v, float) for c, v in zip(bench.columns, measured, strict=True)}
    source = rows.source(corpus, settings.data_root)
    return Surprise(corpus.name, source, nats, whole.scored.sum(axis=1))


def replies(bench: Bench) -> Replies:
    """What every column writes after the prompts of `--generate`."""
    settings, tokenizer = bench.settings, bench.tokenizer
    surround = prompts.frame(settings.format, tokenizer)
    texts = [surround(prompt)[0] for prompt in settings.generate]
    encoded = tokenizer(texts, add_special_tokens=settings.format == "plain")["input_ids"]
    sampling = Sampling(
        settings.most, settings.temperature, settings.top_p, settings.top_k, settings.seed
    )

    def write(column: Column) -> list[str]:
        written = generate(
            bench.base.config,
            bench.base.weights,
            column.adapter,
            encoded,
            stop=tokenizer.eos_token_id,
            sampling=sampling,
        )
        return tokenizer.batch_decode(written, skip_special_tokens=True)

    return Replies(settings.generate, {c.name: write(c) for c in bench.columns})
