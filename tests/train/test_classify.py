"""A classifier trained with its head: examples, loss, accuracy, and whole runs."""

import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lora_jax import bases, models, peft
from lora_jax.errors import InputError
from lora_jax.modules import IA3, LoRA, Saved
from lora_jax.tokens import load_tokenizer
from train import run as run_file
from train.batches import assemble, epoch_batches
from train.classify import first_head, load_labelled, refuse_misfits
from train.data import plan_data
from train.loss import batch_loss, batch_sums
from train.record import read_metrics
from train.run import first_adapter, train


@pytest.fixture(scope="session")
def base(classifier_folder):
    """The tiny classifier, with a new head of two labels."""
    return bases.load_base(str(classifier_folder))


@pytest.fixture(scope="session")
def tokenizer(classifier_folder):
    return load_tokenizer(classifier_folder)


@pytest.fixture(scope="session")
def letters(tmp_path_factory) -> str:
    """Forty texts of a's and b's; the label says of which there are more."""
    random, path = np.random.default_rng(0), tmp_path_factory.mktemp("letters") / "rows.jsonl"
    rows = []
    for n in range(40):
        most, least = "ab"[n % 2], "ab"[1 - n % 2]
        text = random.permutation(list(most * int(random.integers(5, 8)) + least))
        rows.append({"text": "".join(text), "label": n % 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def config_of(config_of, classifier_folder, letters):
    """A function from changes to the config of a short run on the letters."""
    settings = {"data": (letters,), "base": str(classifier_folder), "length": 16}
    settings |= {"learning_rate": 1e-2, "checkpoint_every": 0}
    return lambda **changes: config_of(**settings | changes)


def test_examples_are_scored_at_their_first_token(config_of, tokenizer, write_rows):
    path = write_rows([{"q": "a", "r": "bc", "gold": "yes"}, {"q": "b", "r": "", "gold": 0}])
    config = config_of(prompt="{q}", second="{r}", label="gold", length=6)
    loaded = load_labelled(config, (path,), tokenizer, ("no", "yes"))
    one, other = loaded.examples
    assert one.label == 1 and other.label == 0 and loaded.cut == 1 and loaded.lost == 0
    assert one.tokens.tolist() == tokenizer("a", "b")["input_ids"]
    assert one.learned.tolist() == [True] + [False] * 5
    limited = load_labelled(replace(config, limit=1), (path,), tokenizer, ("no", "yes"), 1)
    assert len(limited.examples) == 1


def test_a_batch_has_labels_where_the_texts_begin(config_of, base):
    for pack in (False, True):
        plan, _ = plan_data(config_of(pack=pack, batch=40, validation=0.0), base, None)
        rows = np.concatenate(epoch_batches(plan, 0, 0))
        batch = jax.tree.map(lambda x: x[0], assemble(plan, rows))
        scored = batch.weights > 0
        assert scored.sum() == 40
        tokens = np.take_along_axis(batch.tokens, batch.scored, axis=1)
        assert (tokens[scored] == 0).all()  # <s>
        assert np.bincount(batch.targets[scored]).tolist() == [20, 20]
    assert len(batch.tokens) == 40 > np.any(batch.weights > 0, axis=1).sum()


@pytest.fixture
def adapter(base, random_lora):
    """A LoRA with a head of its own, neither of them zero."""
    head = {path: Saved(m.value + 0.2) for path, m in first_head(base.config, base.weights).items()}
    return random_lora(base.config, targets=["query", "value"]) | head


@partial(jax.jit, static_argnums=0)
def logits_of(config, weights, adapter, tokens, segments):
    hidden = models.forward(config, weights, adapter, tokens, segments=segments).hidden
    return models.classify(config, weights, adapter, hidden, segments)[0]


def plain_sums(base, adapter, examples):
    """The definitions, text by text."""
    losses, right = 0.0, 0
    for example in examples:
        around = ((0, 0), (0, 16 - len(example.tokens)))
        tokens, ones = (np.pad(f(example.tokens[None]), around) for f in (np.array, np.ones_like))
        logits = logits_of(base.config, base.weights, adapter, tokens, ones)
        losses -= jax.nn.log_softmax(logits)[example.label]
        right += int(np.argmax(logits) == example.label)
    return losses, right


@pytest.mark.parametrize("pack", [False, True])
def test_a_batchs_sums_are_those_of_its_texts(config_of, base, adapter, pack):
    plan, _ = plan_data(config_of(pack=pack, limit=9, batch=9, validation=0.0), base, None)
    batch = jax.tree.map(lambda x: x[0], assemble(plan, epoch_batches(plan, 0, 0)[0]))
    sums = jax.jit(lambda b: batch_sums(base.config, base.weights, adapter, b))(batch)
    rows = {i for row in epoch_batches(plan, 0, 0)[0] for i in plan.rows[row]}
    losses, right = plain_sums(base, adapter, [plan.examples[i] for i in rows])
    np.testing.assert_allclose(sums["loss"], losses, rtol=1e-4)
    assert sums["labels"] == len(rows) and sums["accuracy"] == right


def test_the_module_and_every_weight_of_the_head_are_trained(config_of, base, adapter):
    plan, _ = plan_data(config_of(batch=8, validation=0.0), base, None)
    batch = jax.tree.map(lambda x: x[0], assemble(plan, epoch_batches(plan, 0, 0)[0]))
    loss = jax.jit(jax.grad(lambda a: batch_loss(base.config, base.weights, a, batch)))
    gradients = loss(adapter)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(("kind", "module"), [("lora", LoRA), ("ia3", IA3)])
def test_a_run_begins_with_the_bases_head(config_of, base, kind, module):
    first = first_adapter(config_of(kind=kind, ia3_layout="pem"), base)
    assert {path for path, m in first.items() if isinstance(m, Saved)} == {
        "classifier.dense",
        "classifier.dense.bias",
        "classifier.out_proj",
        "classifier.out_proj.bias",
    }
    assert {type(m) for m in first.values()} == {module, Saved}
    for path in models.head_paths(base.config):
        np.testing.assert_array_equal(first[path].value, base.weights[path])
    targets = {"attention.self.query", "attention.self.value"}
    assert kind == "ia3" or targets == {path for path in first if "classifier" not in path}


def test_a_run_learns_and_leaves_its_head_and_its_accuracy(config_of, base):
    config = config_of(steps=60, evaluate_every=20, validation=0.3)
    train(config, base)
    rows = read_metrics(config.out / "metrics.jsonl")
    held = [row for row in rows if "validation_accuracy" in row]
    assert [row["step"] for row in held] == [20, 40, 60]
    assert all("validation_loss" in row and row["validation_accuracy"] <= 1 for row in held)
    assert held[-1]["validation_accuracy"] == 1
    adapter = peft.load_adapter(config.out, base.config)
    for path in models.head_paths(base.config):
        assert np.abs(adapter[path].value - base.weights[path]).max() > 1e-3
    record = json.loads((config.out / "training.json").read_text())
    assert record["finished"] and record["validation_loss"] < 0.3
    settings = json.loads((config.out / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["classifier"]


def test_labels_are_named_for_a_new_head(config_of, write_rows, classifier_folder):
    path = write_rows([{"text": t, "label": name} for t, name in zip("abc", "xyz", strict=True)])
    config = config_of(data=(path,), labels=("x", "y", "z"), validation=0.0, steps=1)
    three = bases.load_base(str(classifier_folder), labels=("x", "y", "z"))
    adapter = peft.load_adapter(train(config), three.config)
    assert adapter["classifier.out_proj"].value.shape == (32, 3)
    two = peft.load_adapter(config.out, bases.load_config(str(classifier_folder)))
    np.testing.assert_array_equal(*(a["classifier.out_proj"].value for a in (two, adapter)))
    again = first_adapter(config_of(start_from=str(config.out), labels=("x", "y", "z")), three)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_an_interrupted_run_goes_on_to_the_same_bits(config_of, base, monkeypatch):
    whole = config_of(checkpoint_every=3, evaluate_every=4)
    train(whole, base)

    @contextmanager
    def at_the_fifth_step():
        steps = count(1)
        yield SimpleNamespace(is_set=lambda: next(steps) == 5)

    config = replace(whole, out=whole.out.with_name("again"))
    with monkeypatch.context() as patch:
        patch.setattr(run_file, "stop_asked", at_the_fifth_step)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 5"):
            train(config, base)
    train(replace(config, resume=True), base)
    one, other = ((c.out / "adapter_model.safetensors").read_bytes() for c in (whole, config))
    assert one == other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "language-model"}, "--objective language-model has no labels; take task"),
        ({"prompt": "{q}", "completion": "{a}"}, "--completion is not read; name .* --label"),
        ({"chat": True}, "--chat is for models that reply"),
        ({"loss_on": "all"}, "--loss-on all is for models of tokens"),
        ({"second": "{b}"}, "--second is the text after --prompt's"),
        ({"labels": ("a", "b")}, "--labels a b: it has LABEL_0, LABEL_1"),
    ],
)
def test_what_a_classifier_cannot_use_is_refused(config_of, base, settings, message):
    with pytest.raises(InputError, match=f"of the kind classifier: {message}"):
        plan_data(config_of(**settings), base, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": ("a",), "second": "x"}, "--labels is a classifier's.*; --second is a class"),
        ({"prompt": "{q}"}, "--prompt needs --completion"),
    ],
)
def test_what_only_a_classifier_can_use_is_refused(config_of, config, settings, message):
    with pytest.raises(InputError, match=f"of the kind causal: {message}"):
        refuse_misfits(config_of(**settings), config)


def test_a_label_that_is_none_of_the_bases_is_refused_with_its_row(config_of, base, write_rows):
    path = write_rows([{"text": "a", "label": 0}, {"text": "b", "label": 2}])
    with pytest.raises(InputError, match=r"line 2: 'label' must be one of LABEL_0, LABEL_1 or"):
        plan_data(config_of(data=(path,)), base, None)


def test_names_of_a_head_that_has_them_are_kept(classifier_folder, tmp_path, base):
    from lora_jax import checkpoint

    named = models.with_labels(base.config, ("no", "yes"))
    folder = tmp_path / "named"
    checkpoint.save_model(folder, named, base.weights)
    assert bases.load_base(str(folder), labels=("No", "Yes")).config.labels == ("No", "Yes")
    with pytest.raises(InputError, match="gives the labels no, yes, in this order, not yes, no"):
        bases.load_base(str(folder), labels=("yes", "no"))


MESHES = """
from pathlib import Path
from train.config import Config
from train.record import read_metrics
from train.run import train

settings = dict(data=({data!r},), base={base!r}, length=16, rank=4, steps=4, learning_rate=1e-2,
                checkpoint_every=0, validation=0.2)
for name, mesh in dict(one=(1, 1, 1), mixed=(2, 2, 2)).items():
    sizes = dict(zip(("mesh_data", "mesh_fsdp", "mesh_tensor"), mesh))
    out = train(Config(out=Path({out!r}) / name, **settings, **sizes))
    rows = read_metrics(out / "metrics.jsonl")
    print([row["loss"] for row in rows if "loss" in row] + [rows[-1]["validation_loss"]])
"""


@pytest.mark.slow
def test_eight_devices_train_as_one_does(run_on_devices, letters, classifier_folder, tmp_path):
    code = MESHES.format(data=letters, base=str(classifier_folder), out=str(tmp_path))
    one, mixed = (json.loads(line) for line in run_on_devices(code).splitlines())
    np.testing.assert_allclose(mixed, one, rtol=1e-3)
