"""Rows as the Hugging Face hub has them, made into {question, choices, label}."""

import re
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]

# BIG-Bench Hard's subtasks whose answer is one of a few; the other four are free-form.
BBH_WORDS = {
    "boolean_expressions": ("True", "False"),
    "causal_judgement": ("Yes", "No"),
    "formal_fallacies": ("valid", "invalid"),
    "navigate": ("Yes", "No"),
    "sports_understanding": ("yes", "no"),
    "web_of_lies": ("Yes", "No"),
}
BBH = (
    *BBH_WORDS,
    "date_understanding",
    "disambiguation_qa",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
)


def boolq(row: Row) -> dict[str, Any]:
    """google/boolq: the answer is a boolean, "no" comes first."""
    kept = {key: row[key] for key in ("passage", "question")}
    return kept | {"choices": ["no", "yes"], "label": int(row["answer"])}


def piqa(row: Row) -> dict[str, Any]:
    """baber/piqa, the parquet copy of PIQA."""
    choices = [row["sol1"], row["sol2"]]
    return {"question": row["goal"], "choices": choices, "label": int(row["label"])}


def swag(row: Row) -> dict[str, Any]:
    """allenai/swag."""
    choices = [row[f"ending{n}"] for n in range(4)]
    return {"question": row["startphrase"], "choices": choices, "label": int(row["label"])}


def hellaswag(row: Row) -> dict[str, Any]:
    """Rowan/hellaswag and its translations, without the marks of WikiHow."""
    question = _clean(f"{row['activity_label']}: {row['ctx']}")
    choices = [_clean(ending) for ending in row["endings"]]
    return {"question": question, "choices": choices, "label": int(row["label"])}


def _clean(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))
    return re.sub(r" {2,}", " ", text).strip()


def lettered(row: Row) -> dict[str, Any]:
    """ARC and OpenBookQA: choices with letters or numbers, of which one is the key."""
    choices = row["choices"]
    label = list(choices["label"]).index(row["answerKey"])
    question = row["question_stem"] if "question_stem" in row else row["question"]
    return {"question": question, "choices": list(choices["text"]), "label": label}


def options(row: Row) -> dict[str, Any]:
    """alexandrainst's m_arc and m_mmlu: one field an option; ARC's fifth may be empty."""
    letters = [letter for letter in "abcde" if row.get(f"option_{letter}")]
    choices = [row[f"option_{letter}"] for letter in letters]
    subject = str(row.get("id", "")).split("/")[0]
    label = letters.index(row["answer"].lower())
    return {"question": row["instruction"], "choices": choices, "label": label, "subject": subject}


def winogrande(row: Row) -> dict[str, Any]:
    """allenai/winogrande: a sentence with a blank, and what may fill it."""
    choices = [row["option1"], row["option2"]]
    return {"question": row["sentence"], "choices": choices, "label": int(row["answer"]) - 1}


def bbh(row: Row) -> dict[str, Any]:
    """A BIG-Bench Hard row; the choices are fixed words or the lettered options in its text."""
    fixed = BBH_WORDS.get(row["config"])
    choices = list(fixed or dict.fromkeys(re.findall(r"\([A-Z]\)", row["input"])))
    label = choices.index(row["target"]) if row["target"] in choices else None
    return {"task": row["config"], "input": row["input"], "choices": choices, "label": label}
