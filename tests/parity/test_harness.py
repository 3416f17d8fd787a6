"""The harness's own model on torch and ours answer alike, request by request."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lora_jax import checkpoint, peft

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from eval.harness import LoraJax

TEXT = "The quick brown fox jumps over the lazy dog, and the dog lets it. "
PAIRS = [
    ("What is red? A:", " a rose"),
    ("What is red? A:", " the deep sea"),
    ("What is red? A:", " t"),
    ("What is red? A: ", "grass"),
    ("Où ?", " là-bas"),
    ("", TEXT),
    (TEXT * 3, "no end"),
]
KINDS = [
    {"until": ["\n"], "max_gen_toks": 24},
    {"until": [" ", "e"], "max_gen_toks": 24, "do_sample": False},
    {"max_gen_toks": 8, "temperature": 0.0},
]


def asked(*args):
    """Requests as the harness makes them; each model may change its own."""
    return [
        SimpleNamespace(args=tuple(dict(a) if isinstance(a, dict) else a for a in arg))
        for arg in args
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, base_folder, config, random_weights, random_lora):
    """The tiny model without spare tokens, which theirs cuts off under an adapter; an adapter."""
    root = tmp_path_factory.mktemp("harness")
    config = replace(config, vocabulary=258)
    shutil.copytree(base_folder, root / "base")
    checkpoint.write_model(root / "base", config, random_weights(config))
    peft.save_adapter(root / "mood", random_lora(config), config)
    return root


@pytest.fixture(scope="module", params=["base", "adapter", "windows of 32"])
def both(request, folders):
    """Theirs and ours: the tiny model, under an adapter, and with a shorter reach."""
    name, base, mood = request.param, str(folders / "base"), str(folders / "mood")
    theirs, ours = {"device": "cpu", "dtype": "float32", "batch_size": 3}, {}
    if name == "adapter":
        theirs["peft"], ours["adapter"] = mood, f"mood={mood}"
    reach = {"max_length": 32} if name == "windows of 32" else {}
    return name, HFLM(pretrained=base, **theirs, **reach), LoraJax(base=base, **ours, **reach)


def test_log_likelihoods_agree(both, agree):
    name, theirs, ours = both
    pairs = PAIRS if ours.max_length > 32 else [pair for pair in PAIRS if pair[0]]
    theirs, ours = (model.loglikelihood(asked(*pairs)) for model in (theirs, ours))
    agree(f"{name}: log-likelihood", [v for v, _ in ours], [v for v, _ in theirs], 1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_what_is_greedy_agrees(both):
    _, theirs, ours = both
    start = theirs.tokenizer("Hello", return_tensors="pt")
    tokens = start["input_ids"][0].tolist()
    likely = theirs.model.generate(**start, max_new_tokens=6)[0, len(tokens) :].tolist()
    requests = [(("a", "b"), tokens, likely[:n]) for n in (1, 3, 6)]
    requests += [(("a", "b"), tokens, [*likely[:2], (likely[2] + 1) % 256])]
    found = [[g for _, g in model._loglikelihood_tokens(requests)] for model in (theirs, ours)]
    assert found[0] == found[1] == [True, True, True, False]


def test_rolling_log_likelihoods_agree(both, agree):
    name, theirs, ours = both
    texts = asked((TEXT * 5,), (TEXT,), ("Short.",))
    found = [model.loglikelihood_rolling(texts) for model in (ours, theirs)]
    agree(f"{name}: rolling log-likelihood", *found, 1e-2)


def test_greedy_replies_agree(both):
    _, theirs, ours = both
    requests = [(context, kind) for context in ("Hello", TEXT * 3) for kind in KINDS]
    if ours.max_length == 32:
        requests = [(context, kind | {"max_gen_toks": 8}) for context, kind in requests]
    found = [model.generate_until(asked(*requests)) for model in (theirs, ours)]
    assert found[0] == found[1]
    assert len(set(found[1])) > 1


def test_chat_templates_agree(both):
    _, theirs, ours = both
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ye"}]
    for upto, opens in ((1, True), (2, False), (2, True)):
        written = [m.apply_chat_template(turns[:upto], opens) for m in (theirs, ours)]
        assert written[0] == written[1]
        assert theirs.tok_encode(written[0]) == ours.tok_encode(written[1])
    assert theirs.chat_template(True) == ours.chat_template(True)
    assert theirs.tokenizer_name == ours.tokenizer_name
    assert (theirs.eot_token_id, theirs.prefix_token_id) == (
        ours.eot_token_id,
        ours.prefix_token_id,
    )


def test_whole_evaluations_agree(both, harness_tasks, agree):
    """The same tasks through both models: every request's answer, and every number of the tasks."""
    name, theirs, ours = both
    found = [evaluated(model, harness_tasks) for model in (ours, theirs)]
    for task in TASKS:
        answers = [[sample["resps"] for sample in one["samples"][task]] for one in found]
        if task == "tiny_reply":
            assert answers[0] == answers[1]
            continue
        plain = [np.array(jax.tree.leaves(a), float) for a in answers]
        agree(f"{name}: {task} in the harness", *plain, 1e-2)
    numbers = [one["results"] for one in found]
    for task, metric in NUMBERS.items():
        assert numbers[0][task][metric] == pytest.approx(numbers[1][task][metric], rel=1e-3)


TASKS = ("tiny_choice", "tiny_reply", "tiny_text")
NUMBERS = {
    "tiny_choice": "acc,none",
    "tiny_reply": "exact_match,none",
    "tiny_text": "byte_perplexity,none",
}


def evaluated(model, tasks):
    """What the harness finds of a model."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)


def test_a_real_model_agrees(smollm, agree):
    theirs = HFLM(pretrained=str(smollm.folder), device="cpu", dtype="float32", batch_size=3)
    ours = LoraJax(base="smollm2-135m")
    found = [model.loglikelihood(asked(*PAIRS)) for model in (ours, theirs)]
    agree("SmolLM2: log-likelihood", *([v for v, _ in answers] for answers in found), 1e-3)
    assert [g for _, g in found[0]] == [g for _, g in found[1]]
    chat = ours.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    requests = asked((chat, KINDS[0]), ("1, 2, 3, 4,", KINDS[2]))
    found = [model.generate_until(requests) for model in (theirs, ours)]
    assert found[0] == found[1] and "Paris" in found[1][0]
