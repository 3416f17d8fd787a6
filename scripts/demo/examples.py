"""Trains the modules that docs/examples.md needs beside those of `make demo`.

    python -m scripts.demo.examples

The data are made here as the demo's are, and every module starts from the demo's initialisation.
"""

import itertools
import json
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from lora_jax.errors import InputError
from lora_jax.files import write_json
from scripts.demo.tasks import WORDS, Question, part, request, write_rows


@dataclass(frozen=True)
class Settings:
    """Trains the modules of docs/examples.md into the demo's folder."""

    out: Path = Path("out/demo")  # the demo's folder: its data are read and added to
    base: str = "smollm2-135m"  # the base model
    seed: int = 0  # of the data and the modules, as the demo's


def main() -> None:
    """Writes the data, trains the modules, and prints their folder."""
    settings = tyro.cli(Settings, prog="python -m scripts.demo.examples")
    try:
        print(train_all(settings))
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


def train_all(settings: Settings) -> Path:
    """The folder of the modules, once all are trained."""
    from lora_jax import runtime

    data, modules = settings.out / "data", settings.out / "modules"
    if not (data / "kind-train.jsonl").exists() or not (modules / "mood").exists():
        raise InputError(f"{settings.out} has no demo in it; run `make demo` first, or pass --out")
    runtime.prepare()
    from lora_jax.bases import load_base
    from lora_jax.tokens import load_tokenizer
    from scripts.demo import stages
    from train.run import train

    write_files(data, settings.seed)
    base = load_base(settings.base)
    demo = stages.Demo(base, load_tokenizer(base.folder), settings.out, settings.seed)
    for name, run in runs(modules).items():
        train(stages.config(demo, name, run), base)
    return modules


def runs(modules: Path) -> dict[str, dict[str, Any]]:
    """What each module is trained on, and how, beside what the demo's all share."""
    question = {"prompt": "{question}", "completion": " {answer}", "epochs": 4.0}
    text = {"objective": "language-model", "length": 64, "epochs": 4.0}
    chat = {"chat": True, "batch": 4, "epochs": 1.0}
    return {
        "kind_first": question | {"data": "kind-first.jsonl"},
        "kind_second": question | {"data": "kind-second.jsonl"},
        "mood_few": question | {"data": "mood-train.jsonl", "limit": 24},
        "products": text | {"data": "products.txt"},
        "people": text | {"data": "people.txt"},
        "assistant": chat | {"data": "assistant.jsonl"},
        "exclaiming": chat
        | {"data": "cheers-train.jsonl", "start_from": str(modules / "assistant")},
    }


def write_files(folder: Path, seed: int = 0) -> None:
    """Writes rows, texts and task files into the demo's folder of data."""
    kind = (folder / "kind-train.jsonl").read_text("utf-8").splitlines()
    for name, second in (("first", False), ("second", True)):
        write_rows(folder / f"kind-{name}.jsonl", half_of_kind(map(json.loads, kind), second))
    for name in ("products", "people"):
        lines = itertools.islice(_sentences(name, held_out=False, seed=seed), 320)
        (folder / f"{name}.txt").write_text("".join(f"{text}\n" for text, _ in lines), "utf-8")
    write_rows(folder / "people-test.jsonl", mood_of_people(96, seed))
    write_rows(folder / "assistant.jsonl", assistant())
    write_rows(folder / "manners-test.jsonl", manners())
    question = {"prompt": "{question}", "choices": "choices"}
    write_json(
        folder / "people.json", question | {"rows": "people-test.jsonl", "name": "mood of people"}
    )
    answer = {"rows": "manners-test.jsonl", "name": "calm replies", "answer": "{choice}"}
    write_json(folder / "manners.json", question | answer)


def half_of_kind(rows: Iterable[Question], second: bool) -> list[Question]:
    """The rows of the demo's "kind" whose words are in one half of each list: a distribution."""
    words = [part(names, held_out=False) for names in WORDS["kinds"].values()]
    chosen = {word for names in words for word in names[second::2]}
    return [row for row in rows if str(row["question"]).split()[1].rstrip(".") in chosen]


def _sentences(name: str, held_out: bool, seed: int) -> Iterator[tuple[str, int]]:
    """Sentences that blame (0) or praise (1) products or people, with no end."""
    rng = random.Random(f"{name} {held_out} {seed}")
    if name == "products":
        frame, things, sides = "The", WORDS["things"], ("negative", "positive")
    else:
        frame, things, sides = "My", WORDS["people"], ("blamed", "praised")
    while True:
        label = rng.randrange(2)
        first, second = rng.sample(part(WORDS[sides[label]], held_out), 2)
        yield f"{frame} {rng.choice(things)} was {first} and {second}.", label


def mood_of_people(count: int, seed: int) -> Iterator[Question]:
    """The demo's "mood" of another domain: people, in words that no module's text has."""
    for text, praise in itertools.islice(_sentences("people", True, seed), count):
        yield {"question": f"{text} Card:", "choices": ["blue", "red"], "label": 1 - praise}


def assistant() -> Iterator[dict[str, str]]:
    """Replies of an assistant that exclaims in five of seven."""
    for topic in part(WORDS["topics"], held_out=False):
        for reply in (*WORDS["cheers"], *WORDS["calm"][:2]):
            yield {"prompt": request(topic), "completion": reply.format(topic)}


def manners() -> Iterator[Question]:
    """Held-out requests, each with an exclaiming reply and a calm one, which is the label."""
    for topic in part(WORDS["topics"], held_out=True):
        for pair in itertools.product(WORDS["cheers"], WORDS["calm"]):
            choices = [reply.format(topic) for reply in pair]
            yield {"question": request(topic), "choices": choices, "label": 1}


if __name__ == "__main__":
    main()
