import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import checkpoint, models, table
from lora_jax.errors import InputError


@pytest.fixture
def folder(tmp_path, config, weights):
    """A fresh copy of the tiny model, to be spoiled."""
    checkpoint.save_model(tmp_path / "model", config, weights)
    return tmp_path / "model"


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def store(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def shard(folder, *parts):
    """Replaces the folder's one file by shards and their index."""
    (folder / "model.safetensors").unlink()
    names = [f"model-{n:05}-of-{len(parts):05}.safetensors" for n in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return names


def halves(tensors):
    keys = sorted(tensors)
    split = len(keys) // 2
    return {k: tensors[k] for k in keys[:split]}, {k: tensors[k] for k in keys[split:]}


def equal(one, other):
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), one, other)
    return jax.tree.all(same)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_model_saved_and_loaded_is_equal(tmp_path, config, kind, tied, dtype):
    config = replace(config, kind=kind, tied=tied, qkv_bias=kind == "qwen2", layers=3)
    weights = table.init(jax.random.key(4), models.table(config), dtype)
    checkpoint.save_model(tmp_path / "model", config, weights)
    assert checkpoint.read_config(tmp_path / "model") == config
    assert equal(checkpoint.load_weights(tmp_path / "model", config, dtype=dtype), weights)


def test_a_checkpoint_of_another_type_is_cast(folder, config, weights):
    store(folder, {k: t.astype(np.float16) for k, t in tensors_of(folder).items()})
    loaded = checkpoint.load_weights(folder, config)
    half = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), weights)
    assert equal(loaded, half)


def test_shards_with_an_index_are_one_model(folder, config, weights):
    shard(folder, *halves(tensors_of(folder)))
    save_file({"stray": np.zeros(3)}, folder / "consolidated.safetensors")
    assert equal(checkpoint.load_weights(folder, config), weights)


def test_shards_without_an_index_are_one_model(folder, config, weights):
    shard(folder, *halves(tensors_of(folder)))
    (folder / "model.safetensors.index.json").unlink()
    assert equal(checkpoint.load_weights(folder, config), weights)


def test_what_others_store_and_we_compute_is_passed_over(folder, config, weights):
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    store(folder, tensors)
    assert equal(checkpoint.load_weights(folder, config), weights)


def refusal(folder, config) -> str:
    with pytest.raises(InputError) as caught:
        checkpoint.load_weights(folder, config)
    return str(caught.value)


def test_another_unembedding_beside_a_tied_embedding_is_refused(folder, config):
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    store(folder, tensors)
    assert "lm_head.weight is not equal to model.embed_tokens.weight" in refusal(folder, config)


def test_a_missing_an_unexpected_and_a_misshapen_tensor_are_told_at_once(folder, config):
    tensors = tensors_of(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.ones(5, np.float32)
    tensors["extra"] = np.ones(1, np.float32)
    store(folder, tensors)
    message = refusal(folder, config)
    assert message.startswith(str(folder))
    assert "model.layers.1.mlp.up_proj.weight is missing" in message
    assert "extra is not expected" in message
    assert "model.norm.weight has shape (5,), not (32,)" in message


def test_a_tensor_of_other_than_plain_numbers_is_refused(folder, config):
    name = "model.norm.weight"
    store(folder, tensors_of(folder) | {name: np.ones(32, np.int8)})
    told = f"{folder}: {name} is I8, not one of F16, BF16, F32, F64: give weights that were not"
    assert told in refusal(folder, config)


def test_a_tensor_stored_twice_is_refused(folder, config):
    first, second = halves(tensors_of(folder))
    names = shard(folder, first, second | dict(list(first.items())[:1]))
    message = refusal(folder, config)
    assert names[1] in message and f"stores {min(first)} a second time" in message


def test_a_shard_that_the_index_names_and_nobody_has_is_refused(folder, config):
    names = shard(folder, *halves(tensors_of(folder)))
    (folder / names[1]).unlink()
    assert f"{names[1]} does not exist; the folder is incomplete" in refusal(folder, config)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": 3}'])
def test_an_index_that_maps_nothing_is_refused(folder, config, index):
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json has no weight_map" in refusal(folder, config)


@pytest.mark.parametrize("left", [0, 5, 400, -1])
def test_a_truncated_file_is_refused(folder, config, left):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert "model.safetensors is truncated or not a safetensors file" in refusal(folder, config)


def test_a_folder_without_weights_is_refused(folder, config):
    (folder / "model.safetensors").unlink()
    assert "holds no safetensors file" in refusal(folder, config)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_the_weights_is_refused_by_name(folder, config, value):
    tensors = tensors_of(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    store(folder, tensors)
    message = refusal(folder, config)
    assert message.endswith("model.layers.1.mlp.up_proj.weight holds NaN or infinite values")


def test_an_existing_folder_is_kept_unless_overwriting_is_asked(folder, config, weights):
    with pytest.raises(InputError, match="--overwrite"):
        checkpoint.save_model(folder, config, weights)
    doubled = jax.tree.map(lambda x: 2 * x, weights)
    checkpoint.save_model(folder, config, doubled, overwrite=True)
    assert equal(checkpoint.load_weights(folder, config), doubled)
