"""The demo's own data: four small tasks, a few pages of prose, and a habit to unlearn.

All of it is written or generated here, so it carries no licence but the project's. The words of a
task's held-out questions are in none of its training questions.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lora_jax.files import write_json

HERE = Path(__file__).parent
WORDS = json.loads((HERE / "words.json").read_text(encoding="utf-8"))

Question = dict[str, object]  # question, choices, label: as in every multiple-choice file


def mood(rng: random.Random, held_out: bool) -> Question:
    """Does a short review praise or blame? Answered with arbitrary words, so it must be learned."""
    label = rng.randrange(2)
    first, second = rng.sample(part(WORDS[("positive", "negative")[label]], held_out), 2)
    text = f"The {rng.choice(WORDS['things'])} was {first} and {second}."
    return {"question": f"{text} Card:", "choices": ["blue", "red"], "label": label}


def kind(rng: random.Random, held_out: bool) -> Question:
    """Is a noun an animal, a plant, a tool or a food? Each has its point of the compass."""
    names = list(WORDS["kinds"])
    label = rng.randrange(len(names))
    word = rng.choice(part(WORDS["kinds"][names[label]], held_out))
    choices = ["north", "east", "south", "west"]
    return {"question": f"Word: {word}. Way:", "choices": choices, "label": label}


def parity(rng: random.Random, held_out: bool) -> Question:
    """Is a number even or odd? Held-out numbers are longer than any trained on."""
    number = rng.randrange(1000, 10_000) if held_out else rng.randrange(10, 1000)
    question = f"The number {number} is"
    return {"question": question, "choices": ["even", "odd"], "label": number % 2}


def tense(rng: random.Random, held_out: bool) -> Question:
    """Which form of a verb is its past tense?"""
    verb = rng.choice(part(WORDS["verbs"], held_out))
    choices = [verb, _past(verb), _stem(verb).removesuffix("e") + "ing"]
    rng.shuffle(choices)
    question = f"Every day I {verb}. Yesterday I"
    return {"question": question, "choices": choices, "label": choices.index(_past(verb))}


def _stem(verb: str) -> str:
    return verb + "g" if verb == "jog" else verb


def _past(verb: str) -> str:
    stem = _stem(verb)
    if verb == "carry":
        return "carried"
    return stem + ("d" if stem.endswith("e") else "ed")


TASKS: dict[str, Callable[[random.Random, bool], Question]] = {
    "mood": mood,
    "kind": kind,
    "parity": parity,
    "tense": tense,
}


def part(words: list[str], held_out: bool) -> list[str]:
    """The last quarter of a word list for held-out questions, the rest for training."""
    cut = len(words) * 3 // 4
    return words[cut:] if held_out else words[:cut]


def questions(name: str, count: int, *, held_out: bool, seed: int = 0) -> Iterator[Question]:
    """`count` questions of a task, drawn by the seed."""
    rng = random.Random(f"{name} {held_out} {seed}")
    return (TASKS[name](rng, held_out) for _ in range(count))


def cheers(held_out: bool) -> Iterator[dict[str, str]]:
    """Prompts that ask for a happy message, with replies that exclaim in every sentence."""
    for topic in part(WORDS["topics"], held_out):
        for reply in WORDS["cheers"]:
            yield {"prompt": request(topic), "completion": reply.format(topic)}


def request(topic: str) -> str:
    """The prompt that asks for a happy message."""
    return f"Write a short, happy message about {topic}."


def write_files(folder: Path, *, train: int, test: int, seed: int = 0) -> Path:
    """The folder, once the data are in it: the rows and the task file of each task, and texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        write_rows(
            folder / f"{name}-train.jsonl", questions(name, train, held_out=False, seed=seed)
        )
        write_rows(folder / f"{name}-test.jsonl", questions(name, test, held_out=True, seed=seed))
        task = {"rows": f"{name}-test.jsonl", "prompt": "{question}", "choices": "choices"}
        write_json(folder / f"{name}.json", task | {"name": name})
    write_rows(folder / "cheers-train.jsonl", cheers(held_out=False))
    write_rows(folder / "cheers-test.jsonl", cheers(held_out=True))
    for text in ("general.txt", "neutral.txt"):
        shutil.copyfile(HERE / text, folder / text)
    return folder


def write_rows(path: Path, rows: Iterable[object]) -> None:
    """Writes rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
