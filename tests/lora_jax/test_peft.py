import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import files, models, peft
from lora_jax.errors import InputError
from lora_jax.modules import LoRA


def equal(one, other):
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), one, other)
    return jax.tree.all(same)


@pytest.fixture
def saved(tmp_path, config, random_lora):
    """A LoRA on q and down in a PEFT folder, to be spoiled."""
    adapter = random_lora(config, targets=["q_proj", "down_proj"])
    peft.save_adapter(tmp_path / "adapter", adapter, config, base_name="tiny")
    return tmp_path / "adapter"


def edit(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def store(folder, tensors):
    save_file(tensors, folder / "adapter_model.safetensors")


def refusal(folder, config) -> str:
    with pytest.raises(InputError) as caught:
        peft.load_adapter(folder, config)
    return str(caught.value)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_comes_back_bit_for_bit(tmp_path, config, random_lora, rank, rslora):
    adapter = random_lora(config, rank=rank, alpha=7.0, rslora=rslora)
    peft.save_adapter(tmp_path / "a", adapter, config)
    loaded = peft.load_adapter(tmp_path / "a", config)
    assert list(loaded) == list(adapter)
    assert equal(loaded, adapter)  # the scales are part of the trees' structure


@pytest.mark.parametrize("layout", ["peft", "pem"])
def test_ia3_comes_back_with_its_scales_bit_for_bit(tmp_path, config, random_ia3, layout):
    adapter = random_ia3(config, layout=layout)
    peft.save_adapter(tmp_path / "a", adapter, config)
    loaded = peft.load_adapter(tmp_path / "a", config)
    scales = lambda adapter: jax.tree.map(lambda x: 1 + x, adapter)  # noqa: E731
    assert equal(scales(loaded), scales(adapter))


def test_projections_may_differ_in_rank_and_scale(tmp_path, config, random_lora):
    adapter = random_lora(config, targets=["q_proj"], rank=2, alpha=3.0)
    adapter |= random_lora(config, targets=["v_proj"], rank=5, alpha=4.0)
    adapter |= random_lora(config, targets=["up_proj"], rank=2, alpha=1.0)
    peft.save_adapter(tmp_path / "a", adapter, config)
    assert equal(peft.load_adapter(tmp_path / "a", config), adapter)
    settings = files.read_json(tmp_path / "a" / "adapter_config.json")
    assert settings["rank_pattern"] == {"self_attn.v_proj": 5}
    assert settings["alpha_pattern"] == {"self_attn.v_proj": 4, "mlp.up_proj": 1}


def test_the_files_are_as_peft_names_and_orients_them(saved, config):
    tensors = tensors_of(saved)
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (3, 32)
    assert tensors[f"{prefix}.lora_B.weight"].shape == (32, 3)
    assert len(tensors) == 2 * 2 * config.layers
    settings = files.read_json(saved / "adapter_config.json")
    assert (settings["r"], settings["lora_alpha"]) == (3, 6)
    assert settings["target_modules"] == ["down_proj", "q_proj"]
    assert settings["base_model_name_or_path"] == "tiny"


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
)
def test_other_spellings_of_the_keys_are_read(saved, config, rename):
    before = peft.load_adapter(saved, config)
    store(saved, {rename(name): t for name, t in tensors_of(saved).items()})
    assert equal(peft.load_adapter(saved, config), before)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_read_into_float32(saved, config, dtype):
    before = peft.load_adapter(saved, config)
    store(saved, {name: np.asarray(t, dtype) for name, t in tensors_of(saved).items()})
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), before)
    assert equal(peft.load_adapter(saved, config), rounded)


def test_rslora_divides_by_the_root_of_the_rank(saved, config):
    edit(saved, use_rslora=True)
    assert {m.scale for m in peft.load_adapter(saved, config).values()} == {6 / math.sqrt(3)}


def test_a_pattern_names_modules_by_suffix_and_the_first_wins(saved, config):
    edit(saved, alpha_pattern={"self_attn.q_proj": 9, "q_proj": 1, "own_proj": 5})
    loaded = peft.load_adapter(saved, config)
    assert loaded["self_attn.q_proj"].scale == 3
    assert loaded["mlp.down_proj"].scale == 2  # "own_proj" ends the name but names no module


def test_layers_that_differ_are_padded_and_folded(saved, config):
    tensors, name = tensors_of(saved), "model.layers.1.self_attn.q_proj"
    a, b = (f"base_model.model.{name}.lora_{x}.weight" for x in "AB")
    tensors[a], tensors[b] = tensors[a][:2].copy(), tensors[b][:, :2].copy()
    store(saved, tensors)
    edit(saved, rank_pattern={name: 2}, alpha_pattern={name: 8})
    module = peft.load_adapter(saved, config)["self_attn.q_proj"]
    assert module.scale == 1.0
    for layer, scale in enumerate((6 / 3, 8 / 2)):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        want = scale * (tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]).T
        np.testing.assert_allclose(module.a[layer] @ module.b[layer], want, atol=1e-5)


def test_an_old_pattern_key_that_is_a_regular_expression_is_refused(saved, config):
    edit(saved, alpha_pattern={"(a+)+$": 3})
    assert "alpha_pattern key '(a+)+$' is not a plain name" in refusal(saved, config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("arrow_config", {"top_k": 2}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("lora_bias", True),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_key(saved, config, key, value):
    edit(saved, **{key: value})
    assert f"{key} = {value!r} is not supported" in refusal(saved, config)


def test_several_unsupported_keys_are_told_at_once(saved, config):
    edit(saved, use_dora=True, bias="all")
    assert "use_dora" in refusal(saved, config) and "bias" in refusal(saved, config)


@pytest.mark.parametrize("value", [True, False, "gaussian", None])
def test_a_start_that_left_the_base_alone_is_read(saved, config, value):
    edit(saved, init_lora_weights=value)
    assert peft.load_adapter(saved, config)


@pytest.mark.parametrize("kind", ["LOHA", None])
def test_another_kind_of_adapter_is_refused(saved, config, kind):
    edit(saved, peft_type=kind)
    assert f"peft_type {kind!r} is not supported (LORA, IA3 are)" in refusal(saved, config)


def test_the_ranks_must_be_those_of_the_config(saved, config):
    edit(saved, r=4)
    assert "layer 0 self_attn.q_proj has rank 3, the config says 4" in refusal(saved, config)
    edit(saved, r=None)
    assert "r is None, not a number" in refusal(saved, config)
    edit(saved, r=3, lora_alpha=None)
    assert "lora_alpha is None, not a number" in refusal(saved, config)


def test_a_target_without_tensors_is_refused(saved, config):
    edit(saved, target_modules=["q_proj", "down_proj", "v_proj"])
    assert "target 'v_proj' has no tensor" in refusal(saved, config)


def test_an_adapter_for_another_model_is_refused(saved, config, tmp_path, random_lora):
    from dataclasses import replace

    wider = replace(config, width=48)
    assert "layer 0 self_attn.q_proj maps 32 to 32, the base (48, 32)" in refusal(saved, wider)
    shallow, deep = replace(config, layers=1), replace(config, layers=3)
    assert "fits no projection of this base model" in refusal(saved, shallow)
    assert "self_attn.q_proj has lora_A on 2 of 3 layers" in refusal(saved, deep)


def test_a_projection_that_the_base_lacks_is_refused(saved, config):
    tensors = tensors_of(saved)
    tensors = {name.replace("q_proj", "qkv_proj"): t for name, t in tensors.items()}
    store(saved, tensors)
    message = refusal(saved, config)
    assert "layers.0.self_attn.qkv_proj.lora_A.weight fits no projection" in message


def test_a_lonely_factor_and_factors_that_do_not_meet_are_refused(saved, config):
    tensors = tensors_of(saved)
    lonely = {n: t for n, t in tensors.items() if not ("q_proj" in n and "lora_B" in n)}
    store(saved, lonely)
    assert "self_attn.q_proj lacks one of its factors" in refusal(saved, config)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    store(saved, tensors | {name: tensors[name][:2].copy()})
    assert "layer 1 self_attn.q_proj: factors (2, 32) and (32, 3)" in refusal(saved, config)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nan_is_refused_in_reading_and_in_writing(saved, tmp_path, config, value):
    tensors = tensors_of(saved)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    adapter = peft.load_adapter(saved, config)
    tensors[name][0, 0] = value
    store(saved, tensors)
    assert refusal(saved, config).endswith(f"{name} holds NaN or infinite values")
    m = adapter["self_attn.q_proj"]
    adapter["self_attn.q_proj"] = m.replace(a=m.a.at[1, 0, 0].set(value))
    with pytest.raises(InputError, match="cannot save to"):
        peft.save_adapter(tmp_path / "b", adapter, config)
    assert not (tmp_path / "b").exists()


def test_a_pickle_is_never_opened(saved, config):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    assert "is a pickle, which can run code" in refusal(saved, config)


def test_missing_and_truncated_files_are_refused(saved, config):
    path = saved / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert "adapter_model.safetensors is truncated" in refusal(saved, config)
    path.unlink()
    assert "adapter_model.safetensors does not exist" in refusal(saved, config)
    (saved / "adapter_config.json").unlink()
    assert "adapter_config.json does not exist" in refusal(saved, config)


def test_an_adapter_without_a_module_is_refused(saved, config):
    store(saved, {})
    assert "holds no module" in refusal(saved, config)


def test_ia3_of_another_size_is_refused(tmp_path, config, random_ia3):
    peft.save_adapter(tmp_path / "a", random_ia3(config), config)
    tensors = tensors_of(tmp_path / "a")
    name = "base_model.model.model.layers.0.mlp.down_proj.ia3_l"
    assert tensors[name].shape == (1, 64)
    store(tmp_path / "a", tensors | {name: tensors[name][:, :5].copy()})
    assert "mlp.down_proj has ia3_l of shape (1, 5)" in refusal(tmp_path / "a", config)


def test_the_side_of_a_square_ia3_is_told_by_its_shape(tmp_path, config):
    """PEFT's feedforward_modules may be a pattern; a row rescales the input whatever it says."""
    tensors = {
        f"base_model.model.model.layers.{n}.self_attn.o_proj.ia3_l": np.full((1, 32), 2, np.float32)
        for n in range(config.layers)
    }
    store(tmp_path, tensors)
    settings = {"peft_type": "IA3", "feedforward_modules": r".*\.(o|down)_proj"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert peft.load_adapter(tmp_path, config)["self_attn.o_proj"].on == "input"


def test_a_loaded_adapter_changes_the_model_as_the_saved_one(
    saved, config, weights, hidden, random_lora, random_tokens
):
    tokens = random_tokens(1, 5)
    loaded = hidden(config, weights, peft.load_adapter(saved, config), tokens)
    made = hidden(config, weights, random_lora(config, targets=["q_proj", "down_proj"]), tokens)
    assert (loaded == made).all()


def test_an_adapter_lists_projections_in_the_models_order(tmp_path, config, random_lora):
    adapter = dict(reversed(random_lora(config).items()))
    peft.save_adapter(tmp_path / "a", adapter, config)
    order = [path for path in models.projections(config) if path in adapter]
    assert list(peft.load_adapter(tmp_path / "a", config)) == order
    assert all(isinstance(m, LoRA) for m in adapter.values())
