"""Examples for an encoder-decoder: a source that is read, and what its decoder writes."""

from dataclasses import replace

import numpy as np

from lora_jax.errors import InputError, refuse_all
from lora_jax.tokens import Tokenizer, encode
from train.config import Config
from train.examples import Example, Loaded, drawn, example, learnable, load_examples
from train.pairs import pair
from train.rows import Row, read_rows


def load_sourced(
    config: Config, sources: tuple[str, ...], tokenizer: Tokenizer, start: int, limit: int = 0
) -> Loaded:
    """The examples of some data files, both sides cut to the run's length; at most `limit`.

    Prompts, or contexts, are read; completions, or the tokens after, follow the token `start`.
    """
    _refuse(config)
    if config.objective == "task":
        rows = drawn(read_rows(sources), config, limit)
        return learnable(_tasks(rows, config, tokenizer, start), config, sources)
    plain = load_examples(config, sources, tokenizer, limit)
    return replace(plain, examples=tuple(_split(e, start) for e in plain.examples))


def _refuse(config: Config) -> None:
    """Refuses what cannot be asked of a model that writes nothing of what it reads."""
    problems = []
    if config.pack:
        problems.append("--pack would mix sources; leave it out")
    if config.loss_on == "all":
        problems.append("--loss-on all would learn prompts, which are only read; take completion")
    if config.objective == "language-model":
        problems.append("--objective language-model has nothing to read; take next-tokens")
    refuse_all(problems, "the base model is an encoder-decoder")


def _tasks(rows: list[Row], config: Config, tokenizer: Tokenizer, start: int) -> list[Example]:
    """Each row's prompt, with the special tokens of a text, and its completion."""
    prompts, completions = zip(*(pair(row, config, tokenizer) for row in rows), strict=True)
    read = tokenizer(list(prompts), verbose=False)["input_ids"]
    written = encode(tokenizer, list(completions))
    examples = []
    for row, prompt, source, target in zip(rows, prompts, read, written, strict=True):
        if not source:
            raise InputError(f"{row.place}: the prompt is empty; an encoder has nothing to read")
        long = len(source) > config.length
        if long:  # cut before the special tokens
            source = tokenizer(prompt, truncation=True, max_length=config.length)["input_ids"]
        learned = np.ones(1 + len(target), bool)
        one = example([start, *target], learned, config.length, row.place)
        ids = np.asarray(source, np.int32)
        examples.append(replace(one, source=ids, cut=one.cut or long))
    return examples


def _split(whole: Example, start: int) -> Example:
    """An example that is learned at its end, its beginning as the source."""
    read, written = (whole.tokens[mask] for mask in (~whole.learned, whole.learned))
    tokens = np.r_[np.int32(start), written]
    return replace(whole, tokens=tokens, learned=np.arange(len(tokens)) > 0, source=read)
