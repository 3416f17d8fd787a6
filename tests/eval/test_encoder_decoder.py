"""An encoder-decoder measured: what is read once, and what is written after it."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose import cli as compose_cli
from compose.expression import evaluate
from compose.library import Library
from eval import batches, cli, compare, devices, items, scoring
from eval.generation import Sampling, generate
from eval.prompts import Question
from lora_jax import bases, checkpoint, models, peft, runtime
from lora_jax.errors import InputError
from lora_jax.tokens import load_tokenizer


@pytest.fixture(scope="module")
def base(t5_folder):
    """The tiny T5 in memory."""
    return bases.load_base(str(t5_folder))


@pytest.fixture(scope="module")
def closing(t5_folder):
    """Its tokenizer, which puts an end after a text."""
    return load_tokenizer(t5_folder)


@pytest.fixture(scope="module")
def adapters(base, random_lora):
    """No module, a LoRA, and two LoRA that are routed."""
    one, other = (random_lora(base.config, seed, targets=["q", "v", "wo"]) for seed in (0, 1))
    library = Library(("a", "b"), (one, other))
    return [{}, one, evaluate("arrow(library, top_k=1)", {"library": library})]


@pytest.fixture(scope="module")
def logits(base):
    """A function to the logits (T, V) of what follows one source, in one pass of one row."""

    @jax.jit
    def whole(adapter, read, real, fed):
        memory = models.encode(base.config, base.weights, adapter, read, real.astype(jnp.int32))
        states = models.forward(base.config, base.weights, adapter, fed, memory=memory).hidden
        return models.unembed(base.config, base.weights, adapter, states)[0]

    def padded(adapter, source, written):
        """Both sides are brought to one length, so that it compiles once."""
        read, fed = np.zeros((1, 72), np.int32), np.zeros((1, 32), np.int32)
        read[0, : len(source)], fed[0, : len(written) + 1] = source, [263, *written]
        return np.asarray(whole(adapter, read, np.arange(72)[None] < len(source), fed))

    return padded


@pytest.fixture(scope="module")
def reference(questions, closing, logits):
    """A function to every choice's score, text by text: the definitions, word for word."""

    def one(adapter, prompt, answer, score):
        tokens = closing(answer, add_special_tokens=False)["input_ids"]
        chances = jax.nn.log_softmax(logits(adapter, closing(prompt)["input_ids"], tokens))
        nats = -np.asarray(chances)[np.arange(len(tokens)), tokens]
        divisors = {"answer_mean": len(nats), "sum": 1, "char": len(answer.strip())}
        return nats.sum() / divisors[score]

    return lambda adapter, score: [
        [one(adapter, p, a, score) for p, a in zip(q.prompts, q.answers, strict=True)]
        for q in questions
    ]


@pytest.fixture(scope="module")
def encoded(questions, closing):
    return lambda score: items.sourced_items(questions, closing, score=score, style="plain")


def close(found, expected):
    for scores, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(scores[: len(right)], right, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("score", ["answer_mean", "sum", "char"])
def test_scores_are_those_of_each_choice_alone(base, adapters, encoded, reference, score):
    """Of the base and a LoRA in one stack, and of a routed library, prompts apart or not."""
    run = devices.spread(scoring.score, base.config, base.weights, "one")
    planned = batches.plan(encoded(score), tokens=10_000, program=10_000)
    measured = compare.measure(run, compare.stacks(adapters), planned, "test")
    for adapter, found in zip(adapters, measured, strict=True):
        close(found, reference(adapter, score))


def test_batches_and_padding_change_nothing(base, adapters, encoded, reference):
    run = devices.spread(scoring.score, base.config, base.weights, "one")
    planned = batches.plan(encoded("sum"), tokens=300, program=60, multiple=2)
    assert len(planned) > 1
    [found] = compare.measure(run, compare.stacks(adapters[1:2]), planned, "test")
    close(found, reference(adapters[1], "sum"))


def one(tokenizer, prompts, answers, score="answer_mean"):
    question = Question(tuple(prompts), answers, tuple(map(len, answers)), 0, "", "f line 3")
    return items.sourced_items([question], tokenizer, score=score, style="plain")[0]


def test_a_prompt_is_read_once_with_its_end_and_answers_have_none(closing):
    item = one(closing, ("ab", "ab"), ("xy", "xyz"))
    assert closing.decode(item.prefix.tokens) == "ab<|im_end|>" and item.owners is None
    assert not item.prefix.counted.any() and item.shared == 0
    assert [closing.decode(span.tokens) for span in item.rest] == ["xy", "xyz"]
    assert item.divisors == (2.0, 3.0)


def test_prompts_of_their_own_are_each_their_choices(closing):
    item = one(closing, ("a", "bc", "a"), ("x", "x", "y"))
    assert closing.decode(item.prefix.tokens) == "a<|im_end|>bc<|im_end|>a<|im_end|>"
    assert item.owners.tolist() == [1, 1, 2, 2, 2, 3, 3]


def test_nothing_to_read_or_to_score_is_refused_by_its_place(closing, tokenizer):
    with pytest.raises(InputError, match="f line 3: a choice has no token to score"):
        one(closing, ("a", "a"), ("", "x"))
    with pytest.raises(InputError, match="f line 3: a prompt is empty"):
        one(tokenizer, ("", ""), ("x", "y"))


PROMPTS = [[1, 2, 3], [70, 71, 72, 73, 74, 75, 76, 77], [5], [9, 8, 7, 6]]


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["base", "lora", "routed"])
def test_greedy_equals_whole_forwards(base, adapters, logits, kind):
    given = (base.config, base.weights, adapters[kind], PROMPTS)
    written = generate(*given, stop=-1, sampling=Sampling(max_new_tokens=8))
    for prompt, found in zip(PROMPTS, written, strict=True):
        text: list[int] = []
        for _ in range(8):
            text.append(int(np.argmax(logits(adapters[kind], prompt, text)[len(text)])))
        assert found == text


def test_a_sample_does_not_depend_on_its_batch_and_nothing_follows_nothing(base):
    sampling = Sampling(max_new_tokens=6, temperature=1.0, top_p=0.9, top_k=50)
    run = partial(generate, base.config, base.weights, {}, [*PROMPTS, []], stop=-1)
    found = run(sampling=sampling)
    assert found == run(sampling=sampling, tokens=1)
    assert found != run(sampling=Sampling(6, 1.0, 0.9, 50, seed=1))
    assert found[-1] == [] and len(found[0]) == 6


@pytest.fixture(scope="module")
def root(tmp_path_factory, base, random_lora):
    """A data root, two adapters of the T5, and a task whose prompts are the choices' own."""
    root = tmp_path_factory.mktemp("root")
    row = {"question": "Ann met _ there.", "choices": ["Bob", "Zoe", "a cat"], "label": 1}
    (root / "rows.jsonl").write_text((json.dumps(row) + "\n") * 5)
    for name, prompt, answer in (
        ("plain", "{question}", " {choice}"),
        ("partial", "{before}{choice}", "{after}"),
    ):
        task = {"rows": "rows.jsonl", "prompt": prompt, "answer": answer, "choices": "choices"}
        (root / f"{name}.json").write_text(json.dumps(task))
    (root / "some.txt").write_text("A text that is long enough to be read.")
    for seed, name in enumerate("ab"):
        adapter = random_lora(base.config, seed, targets=["q", "v"])
        peft.save_adapter(root / name, adapter, base.config)
    return root


@pytest.fixture
def command(monkeypatch, t5_folder):
    """A function that runs a command's `main`; the compilation cache is left alone."""
    monkeypatch.setattr(runtime, "prepare", lambda: None)

    def run(main, *arguments) -> None:
        given = [*map(str, arguments), "--base", str(t5_folder)]
        monkeypatch.setattr(sys, "argv", ["command", *given])
        main()

    return run


def test_what_the_commands_compose_they_measure(command, root, base, tmp_path):
    expression, inputs = "library(a - 0.5*b, b)", (f"a={root}/a", f"b={root}/b")
    command(compose_cli.main, expression, *inputs, "--out", tmp_path / "lib")
    member = peft.load_adapter(tmp_path / "lib" / "b", base.config)
    assert len(member) == 6
    command(
        *(cli.main, "--task-file", root / "plain.json", root / "partial.json"),
        *("--adapters", f"lib={tmp_path}/lib", "--compare", "base", "mean(lib)"),
        *("routed=arrow(lib, top_k=1)", "--generate", "Hello", "--max-new-tokens", "4"),
        *("--out", tmp_path / "out"),
    )
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [task["task"] for task in found["tasks"]] == ["plain", "partial"]
    scores = found["tasks"][1]["examples"][0]["scores"]
    assert len({tuple(x) for x in scores.values()}) == 3 and len(scores["base"]) == 3
    assert found["replies"]["prompts"] == ["Hello"]


def test_a_merged_model_computes_what_base_and_module_do(command, root, base, tmp_path):
    command(compose_cli.main, "a", f"a={root}/a", "--merged", "--out", tmp_path / "whole")
    merged = bases.load_base(str(tmp_path / "whole"))
    assert checkpoint.read_config(tmp_path / "whole") == base.config
    adapter, source = peft.load_adapter(root / "a", base.config), np.arange(6)[None]
    ours, theirs = (
        models.encode(model.config, model.weights, module, source).keys
        for model, module in ((base, adapter), (merged, {}))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--text some.txt", "some has no perplexity; take a causal base model"),
        ("--task-file plain.json --score text_mean", "--score text_mean counts prompts"),
    ],
)
def test_what_it_cannot_be_asked_is_refused_by_name(
    command, root, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit) as left:
        command(cli.main, *arguments.split(), "--out", tmp_path / "out")
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert left.value.code == 2 and len(told) == 1
    assert message in told[0] and "is an encoder-decoder" in told[0]
