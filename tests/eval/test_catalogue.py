"""Every built-in task puts a row of its hub data set as its protocol does."""

from pathlib import Path

import pytest

from eval import hub, rows
from eval.catalogue import TASKS
from eval.prompts import Question, frame, pose
from eval.tasks import Task

STORY = {
    "activity_label": "Cooking",
    "ctx": "She cuts it. Then",
    "endings": ["it rains.", "she sings.", "she fries it.", "he runs."],
    "label": "2",
}
OPTIONS = {
    "id": "physics/val/1",
    "instruction": "What is hot?",
    "option_a": "ice",
    "option_b": "fire",
    "option_c": "a stone",
    "option_e": None,
    "answer": "B",
}
LETTERS = {"choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
BLANK = {"option1": "Ann", "option2": "Bob", "answer": "2"}

# For each hub data set a row of it, what a prompt must hold of that row, and the right answer.
SAMPLES = {
    "google/boolq": (
        {"passage": "Fire is hot.", "question": "is fire hot", "answer": True},
        ("Fire is hot.", "is fire hot"),
        "yes",
    ),
    "baber/piqa": (
        {"goal": "Warm up.", "sol1": "Take ice.", "sol2": "Light a fire.", "label": 1},
        ("Warm up.",),
        "Light a fire.",
    ),
    "Rowan/hellaswag": (STORY, ("Cooking: She cuts it. Then",), "she fries it."),
    "allenai/swag": (
        {"startphrase": STORY["ctx"], "label": 2}
        | {f"ending{n}": text for n, text in enumerate(STORY["endings"])},
        ("She cuts it. Then",),
        "she fries it.",
    ),
    "allenai/ai2_arc": ({"question": "What is hot?", **LETTERS}, ("What is hot?",), "fire"),
    "allenai/openbookqa": (
        {"question_stem": "What is hot?", **LETTERS},
        ("What is hot?",),
        "fire",
    ),
    "allenai/winogrande": (
        {"sentence": "Ann thanked Bob, for _ had helped.", **BLANK},
        ("Ann thanked Bob, for ", " had helped."),
        "Bob",
    ),
    "SaylorTwift/bbh": (
        {"input": "Which?\n(A) ice\n(B) fire", "target": "(B)"},
        ("Which?\n(A) ice\n(B) fire",),
        "(B)",
    ),
    "facebook/xnli": (
        {"premise": "It rains.", "hypothesis": "It may be wet.", "label": 1},
        ("It rains.", "It may be wet."),
        "neutral",
    ),
    "alexandrainst/m_arc": (OPTIONS, ("What is hot?",), "fire"),
    "alexandrainst/m_hellaswag": (STORY, ("Cooking: She cuts it. Then",), "she fries it."),
    "alexandrainst/m_mmlu": (OPTIONS, ("What is hot?",), "fire"),
}
CHOICE = [name for name, task in TASKS.items() if isinstance(task, Task)]
each_task = pytest.mark.parametrize("name", CHOICE)


@pytest.fixture
def put(monkeypatch, tokenizer):
    """A function to a task's question in a format, from the sample row of its hub data set."""

    def question(name: str, style: str) -> Question:
        task = TASKS[name]
        sample = SAMPLES[task.hub.path][0]
        monkeypatch.setattr(rows, "load_split", lambda *names, **options: [sample])
        form = task.form(style)
        row = rows.load_rows(task, form, limit=1)[0]
        return pose(task, form, row, frame(style, tokenizer))

    return question


def whole(question: Question) -> list[str]:
    return [p + a for p, a in zip(question.prompts, question.answers, strict=True)]


def test_there_is_a_sample_of_every_data_set():
    assert {TASKS[name].hub.path for name in CHOICE} == SAMPLES.keys()


@each_task
def test_a_plain_text_is_the_row_and_nothing_else(put, name):
    _, asked, answer = SAMPLES[TASKS[name].hub.path]
    found = put(name, "plain")
    texts = whole(found)
    assert all(part in texts[found.label] for part in (*asked, answer))
    assert len(set(texts)) == len(texts) >= 2
    for text in texts:
        assert text == text.strip() and "  " not in text
        assert not any(mark in text for mark in ("{", "}", "None"))


@each_task
def test_in_chat_the_row_is_a_turn_and_the_right_choice_a_reply(put, name):
    _, asked, answer = SAMPLES[TASKS[name].hub.path]
    found = put(name, "chat")
    assert len(set(found.prompts)) == 1 < len(set(found.answers)) == len(found.answers)
    assert found.prompts[0].startswith("<|im_start|>user\n")
    assert all(part in found.prompts[0] for part in asked)
    reply = {"yes": "true"}.get(answer, answer)  # GenKnowSub's words for BoolQ
    assert found.answers[found.label] == f"{reply}<|im_end|>\n"


@pytest.mark.parametrize("name", TASKS)
def test_a_file_is_of_the_hubs_split_and_the_tasks_language(name):
    task, same = TASKS[name], {"val": "validation", "dev": "validation"}
    stem = Path(task.file).stem
    held = [same.get(word, word) for word in stem.split("_")]
    assert same.get(task.hub.split, task.hub.split) in (*held, stem)
    if name.endswith(("_de", "_fr")):
        assert task.language == held[0] == task.hub.configs[0] == name[-2:]


def test_translations_ask_in_their_language(put):
    opening = {"m_arc_de": "Frage: What", "m_mmlu_fr": "Question : What"}
    assert all(put(name, "plain").prompts[0].startswith(text) for name, text in opening.items())


def test_only_subjects_and_subtasks_make_groups(put):
    groups = {name: put(name, "plain").group for name in CHOICE}
    assert {name for name, group in groups.items() if group} == {"m_mmlu_de", "m_mmlu_fr", "bbh"}
    assert groups["m_mmlu_de"] == "physics" and groups["bbh"] in hub.BBH
