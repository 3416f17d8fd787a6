import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from compose.arithmetic import weighted_sum
from compose.arrow import applied
from compose.cli import Command
from compose.command import run
from compose.inputs import load_input
from compose.library import Library
from compose.merging.merge import merge
from lora_jax import checkpoint, peft
from lora_jax.dora import with_magnitudes
from lora_jax.errors import InputError

Q = "self_attn.q_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, config, random_lora, base_folder):
    """Two adapters on disk that name the tiny base model."""
    root = tmp_path_factory.mktemp("adapters")
    for name, seed in (("chat", 0), ("toxic", 1)):
        adapter = random_lora(config, seed, targets=("q_proj",))
        peft.save_adapter(root / name, adapter, config, base_name=str(base_folder))
    return root


@pytest.fixture
def compose(folders, tmp_path, monkeypatch):
    """A function that runs the command on both adapters and gives the folder it wrote."""
    monkeypatch.setattr("compose.command.prepare", lambda: None)

    def go(expression, **options):
        inputs = (f"chat={folders / 'chat'}", f"toxic={folders / 'toxic'}")
        given = {"inputs": inputs, "out": tmp_path / "out"} | options
        command = Command(expression, **given)
        run(command)
        return command.out

    return go


@pytest.mark.parametrize("space", ["delta", "factor"])
def test_an_expression_becomes_an_adapter_with_its_provenance(
    compose, folders, config, base_folder, capsys, space
):
    out = compose("chat - 0.4*toxic", space=space)
    chat, toxic = (load_input(folders / name, config) for name in ("chat", "toxic"))
    want = weighted_sum([chat, toxic], [1, -0.4], space=space)[Q]
    found = load_input(out, config)[Q]
    np.testing.assert_array_equal(found.a, want.a)
    np.testing.assert_allclose(found.scale * found.b, want.scale * want.b, rtol=1e-6)
    record = json.loads((out / "provenance.json").read_text())
    assert record["expression"] == "chat - 0.4*toxic" and record["space"] == space
    assert record["inputs"].keys() == {"chat", "toxic"}
    assert record["base_model_name_or_path"] == str(base_folder)
    assert "chat - 0.4*toxic" in (out / "lineage.svg").read_text()
    assert capsys.readouterr().out.splitlines()[-1] == str(out)


def test_rank_is_kept_and_its_error_recorded(compose, config):
    out = compose("chat + toxic", rank=2)
    assert load_input(out, config)[Q].a.shape[-1] == 2
    errors = json.loads((out / "provenance.json").read_text())["truncation_error"]
    assert len(errors[""][Q]) == 2 and all(0 < error < 1 for error in errors[""][Q])


def test_fisher_information_on_disk_weighs_the_factors(compose, folders, tmp_path, config, capsys):
    inputs, adapters, squares = [], [], []
    for name in ("chat", "toxic"):
        adapters.append(peft.load_adapter(folders / name, config))
        squares.append(jax.tree.map(np.square, adapters[-1]))
        peft.save_adapter(tmp_path / f"{name}-information", squares[-1], config)
        inputs += [f"{name}={folders / name}", f"f{name}={tmp_path / f'{name}-information'}"]
    text = "fisher(chat, toxic, fishers=[fchat, ftoxic])"
    out = compose(text, inputs=tuple(inputs), space="factor")
    wanted, _ = merge(adapters, "fisher", space="factor", fishers=squares)
    found = peft.load_adapter(out, config)[Q]
    for side in ("a", "b"):
        factor = getattr(wanted[Q], side)
        np.testing.assert_allclose(getattr(found, side), factor, rtol=1e-5, atol=1e-6)
    shown = "".join(capsys.readouterr().out.replace("│", "").split())
    assert "fishers=[fchat,ftoxic])" in shown


def test_a_routed_result_is_a_library_with_its_settings(compose, config):
    out = compose("arrow(chat, toxic, top_k=1)")
    library = load_input(out, config)
    assert isinstance(library, Library)
    assert library.names == ("chat", "toxic") and library.routing.top_k == 1
    assert (out / "provenance.json").exists()


def test_an_existing_folder_is_refused_before_any_work(compose, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").touch()
    monkeypatch.setattr("compose.command.load_input", lambda *_: pytest.fail("worked"))
    with pytest.raises(InputError, match="exists; choose another --out or pass --overwrite"):
        compose("chat")
    monkeypatch.undo()
    assert (compose("chat", overwrite=True) / "adapter_config.json").exists()


def test_only_the_inputs_in_use_are_read(folders, tmp_path, compose):
    (folders / "toxic").rename(folders / "away")
    try:
        record = json.loads((compose("2*chat") / "provenance.json").read_text())
    finally:
        (folders / "away").rename(folders / "toxic")
    assert record["inputs"].keys() == {"chat"}


def test_the_base_may_be_named(compose, base_folder):
    out = compose("chat", base=str(base_folder))
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_of_a_base_on_the_hub_only_the_config_is_fetched(compose, base_folder, config, hub):
    fetched = hub(base_folder)
    assert load_input(compose("chat", base="some/model"), config)
    assert fetched == [["config.json"]]


def test_a_base_out_of_reach_is_refused_and_may_be_given(
    tmp_path, config, random_lora, base_folder, monkeypatch
):
    monkeypatch.setattr("compose.command.prepare", lambda: None)
    peft.save_adapter(tmp_path / "x", random_lora(config), config, base_name="./gone")
    command = Command("x", (f"x={tmp_path / 'x'}",), tmp_path / "out")
    words = r"^x: the base model \./gone is out of reach \(.*say where it is by --base"
    with pytest.raises(InputError, match=words):
        run(command)
    assert not (tmp_path / "out").exists()
    run(replace(command, base=str(base_folder)))
    assert load_input(tmp_path / "out", config)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (("chat",), "'chat' is not NAME=FOLDER"),
        (("x=a", "x=b"), "the name 'x' is taken"),
        (("y=a",), "unknown name 'x'; the inputs are y"),
        (("x=nowhere",), "nowhere is not a folder"),
    ],
)
def test_bad_inputs_are_named(tmp_path, monkeypatch, inputs, words):
    monkeypatch.setattr("compose.command.prepare", lambda: None)
    with pytest.raises(InputError, match=words):
        run(Command("x", inputs, tmp_path / "out"))


def test_nan_is_refused_by_name(tmp_path, config, base_folder, random_lora, compose):
    from safetensors.numpy import load_file, save_file

    peft.save_adapter(
        tmp_path / "bad", random_lora(config, targets=("q_proj",)), config, base_name="tiny"
    )
    path = tmp_path / "bad" / peft.WEIGHTS
    tensors = load_file(path)
    tensors[sorted(tensors)[0]][0, 0] = np.nan
    save_file(tensors, path)
    command = Command("x", (f"x={path.parent}",), tmp_path / "out", base=str(base_folder))
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj\.lora_A.* holds NaN"):
        run(command)
    assert not (tmp_path / "out").exists()


def test_rank_and_space_must_agree(compose):
    with pytest.raises(InputError, match="factor space keeps its ranks"):
        compose("chat - toxic", space="factor", rank=2)


def test_a_merged_result_is_the_whole_model(
    compose, folders, config, weights, base_folder, random_tokens, hidden
):
    out = compose("chat - 0.4*toxic", merged=True)
    chat, toxic = (load_input(folders / name, config) for name in ("chat", "toxic"))
    found = checkpoint.read_config(out)
    assert found == config
    held, tokens = checkpoint.load_weights(out, found), random_tokens(1, 5)
    adapter = weighted_sum([chat, toxic], [1, -0.4], space="delta")
    want = hidden(config, weights, adapter, tokens)
    np.testing.assert_allclose(hidden(found, held, {}, tokens), want, atol=1e-4)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base_folder / name).read_bytes()
    assert json.loads((out / "provenance.json").read_text())["expression"] == "chat - 0.4*toxic"
    assert not (out / "adapter_config.json").exists()


def test_a_library_is_not_merged(compose, tmp_path):
    with pytest.raises(InputError, match="--merged takes one module, not a library"):
        compose("library(chat, toxic)", merged=True)
    assert not (tmp_path / "out").exists()


def test_a_dora_is_merged_and_not_added(
    compose, folders, config, weights, base_folder, random_lora, random_tokens, hidden, capsys
):
    lora = random_lora(config, 2, targets=("q_proj",))
    dora = with_magnitudes(lora, weights)
    peft.save_adapter(folders / "dora", dora, config, base_name=str(base_folder))
    inputs = (f"dora={folders / 'dora'}", f"chat={folders / 'chat'}")
    with pytest.raises(InputError, match=r"q_proj: what a DoRA adds .* merge it into the base"):
        compose("dora + chat", inputs=inputs)
    with pytest.raises(InputError, match=r"q_proj: Arrow routes LoRA modules; .* holds DoRA"):
        applied(load_input(compose("arrow(dora, dora, top_k=1)", inputs=inputs), config))
    out = compose("dora", inputs=inputs, merged=True, overwrite=True)
    held, tokens = checkpoint.load_weights(out, config), random_tokens(1, 5)
    want = hidden(config, weights, dora, tokens)
    np.testing.assert_allclose(hidden(config, held, {}, tokens), want, atol=1e-4)


def test_what_is_composed_on_a_packaged_base_names_its_hub_id(compose, config, monkeypatch):
    monkeypatch.setattr("compose.inputs.bases.load_config", lambda name: config)
    for expression in ("chat", "library(chat, toxic)"):
        out = compose(expression, base="smollm2-135m", overwrite=True)
        for path in out.rglob("adapter_config.json"):
            named = json.loads(path.read_text())["base_model_name_or_path"]
            assert named == "HuggingFaceTB/SmolLM2-135M-Instruct"
