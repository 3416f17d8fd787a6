"""lm-evaluation-harness asks the model what its definitions say, and gets it."""

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from eval import generation
from eval.bench import Bench
from eval.columns import Column
from eval.config import Evaluation
from eval.generation import Sampling
from lora_jax import bases, peft
from lora_jax.errors import InputError
from lora_jax.tokens import encode

TEXT = "The quick brown fox jumps over the lazy dog."
PAIRS = [
    ("What is red? A:", " a rose"),
    ("What is red? A:", " the deep sea"),
    ("What is red? A: ", "grass"),  # the space goes to the answer
    ("Où ?", " là-bas"),
    ("", TEXT),
    (TEXT * 4, " no end"),  # longer than the model reads
]


@pytest.fixture(scope="module")
def harness():
    """The module under test, where lm-eval is installed."""
    pytest.importorskip("lm_eval")
    return importlib.import_module("eval.harness")


@pytest.fixture(scope="module")
def adapter(config, random_lora):
    return random_lora(config, 3)


@pytest.fixture(scope="module")
def model(harness, base_folder, tokenizer, adapter):
    """A function from arguments to the model under a module in memory."""
    base = bases.load_base(str(base_folder))

    def make(module=adapter, **given):
        bench = Bench(Evaluation(), base, tokenizer, [Column("it", "it", module)])
        return harness.LoraJax(bench, **given)

    return make


def asked(*args):
    return [SimpleNamespace(args=arg) for arg in args]


def expected(nll, weights, adapter, tokenizer, context, answer, room=128):
    """The log-likelihood of an answer, by a plain forward pass of one text."""
    before = context.rstrip()
    start = encode(tokenizer, [before])[0] if before else [tokenizer.bos_token_id]
    tokens = [*start, *encode(tokenizer, [context[len(before) :] + answer])[0]]
    nats = nll(weights, adapter, tokens[-room - 1 :])
    return -nats[-(len(tokens) - len(start)) :].sum()


def test_a_tokenizer_without_a_token_to_begin_with_is_refused(harness, base_folder):
    bare = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    bench = Bench(Evaluation(), bases.load_base(str(base_folder)), bare, [])
    with pytest.raises(InputError, match="has neither a first nor a last token to begin a text"):
        _ = harness.LoraJax(bench).prefix_token_id


@pytest.mark.parametrize("seeded", [True, False])
def test_log_likelihoods_are_those_of_the_plain_model(
    model, nll, weights, tokenizer, adapter, seeded
):
    module = adapter if seeded else {}
    found = model(module, max_length=127).loglikelihood(asked(*PAIRS))
    # The reference has room for 128 tokens, of which the last is read too.
    wanted = [expected(nll, weights, module, tokenizer, *pair, room=127) for pair in PAIRS]
    np.testing.assert_allclose([value for value, _ in found], wanted, rtol=1e-4)
    assert not any(greedy for _, greedy in found)


def test_what_greedy_decoding_writes_is_greedy(model, config, weights, adapter):
    prompts = [[5, 6, 7], [80, 81]]
    how = {"stop": -1, "sampling": Sampling(max_new_tokens=6)}
    written = generation.generate(config, weights, adapter, prompts, **how)
    other = [*written[0][:3], (written[0][3] + 1) % 256, *written[0][4:]]
    lm = model()
    requests = [(None, p, w) for p, w in zip(prompts, written, strict=True)]
    requests[1:1] = [(None, prompts[0], other), (None, prompts[0], written[0][:2])]
    found = lm._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in found] == [True, False, True, True]


def test_no_request_is_no_answer(model):
    lm = model()
    assert lm.loglikelihood([]) == lm.loglikelihood_rolling([]) == lm.generate_until([]) == []


def test_weights_that_overflow_are_told(model, adapter):
    broken = {path: m.replace(b=m.b * np.nan) for path, m in adapter.items()}
    with pytest.raises(InputError, match="a log-likelihood is not finite"):
        model(broken).loglikelihood(asked(PAIRS[0]))


def test_a_text_is_read_in_windows_that_score_each_token_once(
    model, nll, weights, tokenizer, adapter
):
    bos, texts = tokenizer.bos_token_id, (TEXT, "Short.", "")
    whole, cut = (
        model(max_length=room).loglikelihood_rolling(asked(*zip(texts))) for room in (128, 16)
    )
    tokens = [bos, *encode(tokenizer, [TEXT])[0]]
    assert whole[0] == pytest.approx(-nll(weights, adapter, tokens).sum(), rel=1e-4)
    assert whole[1] == cut[1] and whole[2] == cut[2] == 0
    total, done = 0.0, 1
    while done < len(tokens):
        stop = min(done + 16, len(tokens))
        total -= nll(weights, adapter, tokens[max(stop - 17, 0) : stop])[-(stop - done) :].sum()
        done = stop
    assert cut[0] == pytest.approx(total, rel=1e-4)


PROMPTS = [f"Hello {letter}" for letter in "abcdefgh"]
REPLIES = 40  # tokens


@pytest.fixture(scope="module")
def replies(config, weights, adapter, tokenizer):
    """What the model writes after the prompts, in tokens."""
    how = {"stop": tokenizer.eos_token_id, "sampling": Sampling(max_new_tokens=REPLIES)}
    return generation.generate(config, weights, adapter, encode(tokenizer, PROMPTS), **how)


def test_replies_are_what_the_model_writes_up_to_a_stop(model, replies, tokenizer):
    plain = tokenizer.batch_decode(replies)
    stops = [next((c for c in text[2:] if c.isascii()), "absent") for text in plain]
    kinds = [{"until": ["absent", stop]} for stop in stops]
    lm = model(max_gen_toks=REPLIES)
    assert lm.generate_until(asked(*((prompt, {}) for prompt in PROMPTS))) == plain
    found = lm.generate_until(asked(*zip(PROMPTS, kinds, strict=True)))
    wanted = [text.partition(stop)[0] for text, stop in zip(plain, stops, strict=True)]
    assert found == wanted != plain


def test_writing_stops_soon_after_every_reply_has_ended(model, replies, tokenizer, monkeypatch):
    steps, advance = [], generation._advance
    monkeypatch.setattr(
        generation, "_advance", lambda *a, **k: steps.append(a[-1]) or advance(*a, **k)
    )
    kinds = [{"until": text[:4][-1:] or "absent"} for text in tokenizer.batch_decode(replies)]
    requests = asked(*zip(PROMPTS, kinds, strict=True))
    model(max_gen_toks=REPLIES).generate_until(requests)
    assert steps == [16]


def test_the_tokens_of_generation_config_end_a_reply(model, replies, tokenizer, base_folder):
    end = max(replies, key=len)[7]
    path = base_folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [end, 3]}))
    try:
        lm = model(max_gen_toks=REPLIES)
        found = lm.generate_until(asked(*((prompt, {}) for prompt in PROMPTS)))
    finally:
        path.unlink()
    cut = [
        reply[: next((n for n, t in enumerate(reply) if t in (end, 3)), None)] for reply in replies
    ]
    assert found == tokenizer.batch_decode(cut) != tokenizer.batch_decode(replies)


def test_a_special_token_may_be_a_stop(model, tokenizer):
    lm = model()
    reply = encode(tokenizer, ["One<|im_start|>two"])[0]
    assert lm._cut(reply, ["<|im_start|>"]) == ("One", True)
    assert lm._cut(reply, []) == ("Onetwo", False)
    assert lm._cut(reply, ["", "wo", "n"]) == ("O", True)


def test_sampled_replies_go_by_the_seed(model):
    kind = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}
    requests = asked(("Hello", kind), ("Hello", kind))
    one, two = (model(seed=seed).generate_until(requests) for seed in (0, 1))
    assert one == model(seed=0).generate_until(requests) != two
    assert one[0] != one[1]


def test_a_long_prompt_loses_its_beginning(model, monkeypatch):
    seen = []
    monkeypatch.setattr("eval.harness.generate", lambda *a, **_: seen.extend(a[3]) or [[]])
    lm = model(max_length=32, max_gen_toks=8)
    assert lm.generate_until(asked((TEXT, {}))) == [""]
    assert seen == [lm.tok_encode(TEXT)[-24:]]
    with pytest.raises(InputError, match="max_gen_toks=32 leaves no room for a prompt; the model"):
        model(max_length=32, max_gen_toks=32).generate_until(asked((TEXT, {})))


def test_chat_templates_open_a_reply_or_go_on_with_one(model, tokenizer):
    lm = model()
    turns = [{"role": "user", "content": "Hi"}]
    opened = lm.apply_chat_template(turns)
    assert opened == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    begun = [*turns, {"role": "assistant", "content": "Ye"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False).endswith("assistant\nYe")
    assert lm.chat_template(True) == tokenizer.chat_template
    assert "/" not in lm.tokenizer_name
    assert lm.tok_encode(opened)[:2] == [tokenizer.bos_token_id, *encode(tokenizer, ["u"])[0]]


def test_a_template_without_system_turns_is_given_none(model, tokenizer, monkeypatch):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", strict + "{{ messages[0].content }}")
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert model().apply_chat_template(turns) == "Hi"


def test_the_harness_evaluates_an_instance(harness, harness_tasks, base_folder, config, adapter):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    peft.save_adapter(harness_tasks / "mood", adapter, config, overwrite=True)
    lm = harness.LoraJax(base=str(base_folder), adapter=f"mood={harness_tasks / 'mood'}")
    found = simple_evaluate(
        lm,
        tasks=["tiny_choice", "tiny_reply", "tiny_text"],
        task_manager=TaskManager(include_path=str(harness_tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = found["samples"]["tiny_choice"]
    for sample, row in zip(samples, (0, 1), strict=True):
        likely = [value for (value, _), *_ in sample["resps"]]
        assert likely == pytest.approx(
            [
                v
                for v, _ in lm.loglikelihood(
                    asked(
                        *(
                            (f"Q: {sample['doc']['q']}\nA:", f" {choice}")
                            for choice in sample["doc"]["choices"]
                        )
                    )
                )
            ]
        )
        assert sample["acc"] == (int(np.argmax(likely)) == row)
    total = sum(lm.loglikelihood_rolling(asked((TEXT,), ("Short.",))))
    perplexity = found["results"]["tiny_text"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(np.exp(-total / (len(TEXT) + 6)))
    assert found["config"]["base"]["sha256"] and found["config"]["adapters"]["mood"]["sha256"]
    json.dumps(found["config"])


@pytest.mark.slow
def test_the_command_runs_without_torch(harness, harness_tasks, base_folder, tmp_path):
    code = """
import importlib.machinery, runpy, sys
find = importlib.machinery.PathFinder.find_spec
hide = classmethod(lambda _, name, *rest: None if name == "torch" else find(name, *rest))
importlib.machinery.PathFinder.find_spec = hide
sys.argv[0] = "eval.harness"
runpy.run_module("eval.harness", run_name="__main__")
"""
    words = ["--model_args", f"base={base_folder}", "--tasks", "tiny_choice,tiny_reply"]
    words += ["--include_path", str(harness_tasks), "--output_path", str(tmp_path / "out")]
    words += ["--apply_chat_template", "--limit", "1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout and list((tmp_path / "out").rglob("results_*.json"))


def test_the_command_names_the_model(harness):
    run = ["--tasks", "a"]
    assert harness.command(run) == harness.command(["run", *run])
    assert harness.command(run) == ["run", "--model", "lora_jax", "--tasks", "a"]
    for named in (["--model=hf"], ["-M", "hf"], ["--config", "c.yaml"]):
        assert harness.command(named) == ["run", *named]
    for other in ([], ["-h"], ["ls", "tasks"], ["validate", "--tasks", "a"]):
        assert harness.command(other) == other


def test_without_lm_eval_one_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "eval.harness", raising=False)
    words = r"needs lm_eval; pip install '\.\[harness\]' in the checkout"
    with pytest.raises(InputError, match=words):
        importlib.import_module("eval.harness")
