"""An encoder-decoder's training: what is read, what is written, and runs on the tiny T5."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from lora_jax import bases, models, peft, tokens
from lora_jax.errors import InputError
from train.batches import assemble, count_tokens, epoch_batches
from train.data import plan_data
from train.loss import batch_loss
from train.record import read_metrics
from train.run import train
from train.sourced import load_sourced

START = 263
END = "<|im_end|>"


@pytest.fixture(scope="module")
def base(t5_folder):
    """The tiny T5 in memory."""
    return bases.load_base(str(t5_folder))


@pytest.fixture(scope="module")
def tokenizer(t5_folder):
    return tokens.load_tokenizer(t5_folder)


@pytest.fixture
def load(config_of, write_rows, tokenizer):
    """A function from rows and settings to what is loaded of them."""

    def read(rows, **settings):
        config = config_of(**settings)
        return load_sourced(config, (write_rows(rows),), tokenizer, START)

    return read


@pytest.fixture
def t5_config_of(config_of, t5_folder):
    """A function from changes to the config of a short run on the tiny T5."""
    return lambda **changes: config_of(base=str(t5_folder), **changes)


def test_the_prompt_is_read_and_the_completion_written(load, tokenizer):
    (example,) = load([{"prompt": "Zwölf: ", "completion": "12 €"}]).examples
    assert tokenizer.decode(example.source) == "Zwölf: " + END
    assert example.tokens[0] == START
    assert tokenizer.decode(example.tokens[1:]) == "12 €" + END
    assert example.learned.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_both_sides_are_cut_and_a_source_keeps_its_end(load, tokenizer):
    rows = [{"prompt": "p" * 9, "completion": "c"}, {"prompt": "p", "completion": "c" * 9}]
    loaded = load(rows, length=8)
    assert [len(e.source) for e in loaded.examples] == [8, 2]
    assert [len(e.tokens) for e in loaded.examples] == [3, 8]
    assert tokenizer.decode(loaded.examples[0].source) == "p" * 7 + END
    assert loaded.cut == 2


def test_next_tokens_reads_each_context_and_writes_the_few_after_it(load, tokenizer):
    texts = [{"text": "abcdefg"}, {"text": "hijkl"}, {"text": "mnopqrs"}]
    loaded = load(texts, objective="next-tokens", context=5, predict=2)
    assert [tokenizer.decode(e.source) for e in loaded.examples] == ["abcde", f"{END}hijk", "mnopq"]
    assert [tokenizer.decode(e.tokens[1:]) for e in loaded.examples] == ["fg", f"l{END}", "rs"]
    assert all(e.tokens[0] == START for e in loaded.examples)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"pack": True}, "--pack would mix sources"),
        ({"loss_on": "all"}, "--loss-on all would learn prompts"),
        ({"objective": "language-model"}, "--objective language-model has nothing to read"),
    ],
)
def test_what_it_cannot_be_asked_is_refused_by_name(t5_config_of, base, settings, told):
    with pytest.raises(InputError, match=f"the base model is an encoder-decoder: {told}"):
        plan_data(t5_config_of(**settings), base, None)


def test_an_empty_source_is_refused_by_its_place(config_of, write_rows, base_folder):
    bare = tokens.load_tokenizer(base_folder)  # puts no end after a text
    path = write_rows([{"prompt": "", "completion": "c"}])
    with pytest.raises(InputError, match="line 1: the prompt is empty"):
        load_sourced(config_of(), (path,), bare, START)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> str:
    """Rows whose two sides vary in length, one against the other."""
    path = tmp_path_factory.mktemp("uneven") / "rows.jsonl"
    rows = [{"prompt": "p" * (1 + 3 * n), "completion": "c" * (12 - n)} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def plan(t5_config_of, base, uneven):
    return plan_data(t5_config_of(data=(uneven,), batch=3, validation=0.0), base, None)[0]


def test_batches_hold_both_sides_in_few_shapes(plan):
    shapes, seen = set(), []
    for rows in epoch_batches(plan, 0, 0):
        batch = assemble(plan, rows)
        flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
        wanted = [plan.examples[row] for row in rows]
        real = np.concatenate([e.source for e in wanted])
        np.testing.assert_array_equal(flat.source.tokens[flat.source.segments > 0], real)
        written = np.concatenate([e.tokens[1:] for e in wanted])
        np.testing.assert_array_equal(flat.targets[flat.weights > 0], written)
        assert count_tokens(batch) == len(real) + len(written) + len(wanted)
        shapes.add((flat.tokens.shape, flat.source.tokens.shape))
        seen += rows.tolist()
    assert sorted(seen) == list(range(12))
    assert len(shapes) == len(plan.shapes) <= 4


def test_the_loss_is_that_of_each_row_alone(plan, base):
    """By a plain pass over one row at a time, without padding."""

    @jax.jit
    def chances(source, tokens):
        memory = models.encode(base.config, base.weights, {}, source)
        states = models.forward(base.config, base.weights, {}, tokens, memory=memory).hidden
        return jax.nn.log_softmax(models.unembed(base.config, base.weights, {}, states))[0]

    def alone(example):
        logs = chances(example.source[None], example.tokens[None, :-1])
        return -logs[np.arange(len(logs)), example.tokens[1:]].sum()

    rows = epoch_batches(plan, 0, 0)[0]
    batch = jax.tree.map(lambda x: x[0], assemble(plan, rows))
    found = jax.jit(lambda b: batch_loss(base.config, base.weights, {}, b))(batch)
    wanted = sum(alone(plan.examples[row]) for row in rows)
    assert len(rows) > 1
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.fixture(scope="module")
def finished(config_of, t5_folder, base):
    """A finished run on the sums."""
    config = config_of(
        base=str(t5_folder), steps=40, checkpoint_every=10, evaluate_every=20, dropout=0.1
    )
    train(config, base)
    return config


def test_the_loss_falls_and_the_adapter_is_of_both_stacks(finished, base):
    course = [row["loss"] for row in read_metrics(finished.out / "metrics.jsonl") if "loss" in row]
    assert np.mean(course[-5:]) < 0.6 * np.mean(course[:3])
    adapter = peft.load_adapter(finished.out, base.config)
    assert len(adapter) == 12 and all(np.any(module.b) for module in adapter.values())
    assert json.loads((finished.out / peft.CONFIG).read_text())["task_type"] == "SEQ_2_SEQ_LM"


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(finished, base, monkeypatch):
    from train import loop

    pause, config = loop._pause, replace(finished, out=finished.out.parent / "again")

    def stopping(run, state):
        state = pause(run, state)
        if int(state.step) == 20:
            run.saver.wait()
            raise KeyboardInterrupt
        return state

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_pause", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(config, base)
    train(replace(config, resume=True), base)
    one, other = ((c.out / peft.WEIGHTS).read_bytes() for c in (config, finished))
    assert one == other


@pytest.mark.slow
def test_a_mesh_trains_what_one_device_does(t5_config_of, base, run_on_devices):
    one = t5_config_of(steps=2, learning_rate=1e-2, validation=0.0, checkpoint_every=0)
    train(one, base)
    many = replace(one, out=one.out.parent / "many", mesh_data=2, mesh_fsdp=2, mesh_tensor=2)
    run_on_devices(
        f"from pathlib import PosixPath; from train.config import *; from train.run import train;"
        f"train({many!r})"
    )
    alone, meshed = (peft.load_adapter(c.out, base.config) for c in (one, many))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), meshed, alone)
    assert all(np.any(module.b) for module in alone.values())
