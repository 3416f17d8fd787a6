"""Hub rows become {question, choices, label}."""

import pytest

from eval import hub

LETTERS = {"text": ["ice", "fire"], "label": ["A", "B"]}


@pytest.mark.parametrize(
    "make, row, expected",
    [
        (
            hub.boolq,
            {"passage": "P", "question": "q", "answer": True},
            {"passage": "P", "question": "q", "choices": ["no", "yes"], "label": 1},
        ),
        (
            hub.piqa,
            {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
            {"question": "g", "choices": ["a", "b"], "label": 1},
        ),
        (
            hub.swag,
            {"startphrase": "s", **{f"ending{n}": str(n) for n in range(4)}, "label": 3},
            {"question": "s", "choices": ["0", "1", "2", "3"], "label": 3},
        ),
        (
            hub.hellaswag,
            {
                "activity_label": "Cooking",
                "ctx": "Cut it [title] Then  fry",
                "endings": ["[step] it.", "them."],
                "label": "1",
            },
            {"question": "Cooking: Cut it. Then fry", "choices": ["it.", "them."], "label": 1},
        ),
        (
            hub.lettered,
            {"question": "q", "choices": LETTERS, "answerKey": "B"},
            {"question": "q", "choices": ["ice", "fire"], "label": 1},
        ),
        (
            hub.lettered,
            {"question_stem": "q", "choices": LETTERS, "answerKey": "A"},
            {"question": "q", "choices": ["ice", "fire"], "label": 0},
        ),
        (
            hub.options,
            {
                "id": "physics/val/7",
                "instruction": "q",
                "option_a": "x",
                "option_b": "y",
                "option_e": None,
                "answer": "B",
            },
            {"question": "q", "choices": ["x", "y"], "label": 1, "subject": "physics"},
        ),
        (
            hub.winogrande,
            {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "2"},
            {"question": "a _ b", "choices": ["x", "y"], "label": 1},
        ),
        (
            hub.bbh,
            {"config": "snarks", "input": "Options:\n(A) x\n(B) y", "target": "(B)"},
            {
                "task": "snarks",
                "input": "Options:\n(A) x\n(B) y",
                "choices": ["(A)", "(B)"],
                "label": 1,
            },
        ),
        (
            hub.bbh,
            {"config": "navigate", "input": "Turn.", "target": "No"},
            {"task": "navigate", "input": "Turn.", "choices": ["Yes", "No"], "label": 1},
        ),
    ],
)
def test_rows(make, row, expected):
    assert make(row) == expected
