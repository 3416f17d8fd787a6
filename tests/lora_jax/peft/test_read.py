import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models, peft
from lora_jax.modules import DoRA, LoRA

STEM = "base_model.model.model.layers"
Q1 = f"{STEM}.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
)
def test_other_spellings_of_the_keys_are_read(saved, equal, rename):
    before = saved.load()
    saved.store({rename(name): t for name, t in saved.tensors.items()})
    assert equal(saved.load(), before)


def test_two_spellings_of_one_tensor_must_agree(saved):
    name = f"{Q1}.lora_A.weight"
    other = name.replace(".weight", ".default.weight")
    saved.store(saved.tensors | {other: saved.tensors[name]})
    assert saved.load()
    saved.store(saved.tensors | {other: saved.tensors[name] + 1})
    assert "q_proj.lora_A.weight is stored a second time, and otherwise" in saved.refusal()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_read_into_float32(saved, equal, dtype):
    before = saved.load()
    saved.store({name: np.asarray(t, dtype) for name, t in saved.tensors.items()})
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), before)
    assert equal(saved.load(), rounded)


def test_eight_bits_are_refused_by_tensor_type_and_file(saved):
    few = {name: (10 * t).astype(np.int8) for name, t in saved.tensors.items()}
    saved.store(few)
    told = f"adapter_model.safetensors: {min(few)} is I8, not one of F16, BF16, F32, F64"
    assert told in saved.refusal()
    path = saved.path / "adapter_model.safetensors"
    text = json.dumps({Q1: {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    assert f"{Q1} is F8_E4M3, not one of F16" in saved.refusal()


def test_rslora_divides_by_the_root_of_the_rank(saved):
    saved.edit(use_rslora=True)
    assert {m.scale for m in saved.load().values()} == {6 / math.sqrt(3)}


def test_a_pattern_names_modules_by_their_end_and_the_first_wins(saved):
    saved.edit(alpha_pattern={"self_attn.q_proj": 9, "q_proj": 1, "own_proj": 5})
    loaded = saved.load()
    assert loaded["self_attn.q_proj"].scale == 3
    assert loaded["mlp.down_proj"].scale == 2  # "own_proj" ends the name but names no module


def test_a_pattern_may_be_a_regular_expression(saved):
    saved.edit(alpha_pattern={r"layers\.[01]\..*(q|k)_proj": 9, "model.layers.0": 1, "layers.*": 3})
    loaded = saved.load()
    assert loaded["self_attn.q_proj"].scale == 3
    assert loaded["mlp.down_proj"].scale == 1


@pytest.mark.parametrize(
    ("settings", "tensors"),
    [
        ({"target_modules": ["q", "shared"]}, {"lora_embedding_A": (3, 264)}),
        ({"modules_to_save": ["shared"]}, {"weight": (264, 32)}),
    ],
)
def test_an_encoder_decoders_embedding_is_refused(
    folder, t5_config, random_lora, settings, tensors
):
    """In PEFT it reaches neither stack, as either holds an embed_tokens of its own."""
    made = folder(random_lora(t5_config, targets=["q"]), t5_config)
    tensors |= {"lora_embedding_B": (32, 3)} if "lora_embedding_A" in tensors else {}
    extra = {f"base_model.model.shared.{role}": np.ones(x) for role, x in tensors.items()}
    made.store(made.tensors | extra)
    made.edit(**settings)
    assert "shared: an encoder-decoder's embedding changes nothing in PEFT" in made.refusal()


def test_dora_of_some_layers_is_the_identity_in_the_others(saved, weights, random_tokens, hidden):
    tensors = {name: t for name, t in saved.tensors.items() if ".layers.0." in name}
    rows = {n.replace("lora_B.weight", "lora_magnitude_vector"): t for n, t in tensors.items()}
    rows = {n: np.full(len(t), 0.7, np.float32) for n, t in rows.items() if "magnitude" in n}
    saved.store(tensors | rows)
    saved.edit(use_dora=True, layers_to_transform=0)
    adapter = saved.load()
    assert isinstance(adapter["mlp.down_proj"], DoRA)
    assert not adapter["mlp.down_proj"].magnitude[1].any()
    one = replace(saved.config, layers=1)
    first = {**weights, "layers": jax.tree.map(lambda x: x[:1], weights["layers"])}
    cut = jax.tree.map(lambda x: x[:1], adapter)
    tokens = random_tokens(1, 4)
    seen = []
    for config, held, modules in ((saved.config, weights, adapter), (one, first, cut)):
        look = lambda path, module, x: x  # noqa: E731
        out = models.forward(config, held, modules, tokens, observe=look).observed
        seen.append(out["mlp.down_proj"][0])
    np.testing.assert_allclose(seen[0], seen[1], atol=1e-6)
    plain = models.forward(saved.config, weights, {}, tokens, observe=look).observed
    assert not np.allclose(seen[0], plain["mlp.down_proj"][0], atol=1e-3)


def test_an_adapter_for_another_model_is_refused(saved):
    wider = replace(saved.config, width=48)
    assert "q_proj maps 32 to 32, the base 48 to 32" in saved.refusal(wider)
    shallow, deep = replace(saved.config, layers=1), replace(saved.config, layers=3)
    assert "fits no projection of this base model" in saved.refusal(shallow)
    assert "model.layers.2.mlp.down_proj is among the targets" in saved.refusal(deep)


def test_a_copy_of_the_embedding_shows_that_the_base_is_the_right_one(folder, config, equal):
    made = folder({"embed": LoRA(jnp.ones((264, 2)), jnp.ones((2, 32)))})
    before = made.load()
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    made.store(made.tensors | {name: np.ones((264, 32), np.float32)})
    assert equal(made.load(), before)


def test_everything_amiss_is_told_at_once(saved):
    """One thing of each kind that test_audit.py has, and what fits nowhere."""
    tensors, row = saved.tensors, np.ones(5, np.float32)
    del tensors[f"{STEM}.0.mlp.down_proj.lora_B.weight"]
    tensors[f"{Q1}.lora_A.weight"] = tensors[f"{Q1}.lora_A.weight"][:2].copy()
    amiss = ("model.norm.weight", "model.embed_tokens.base_layer.weight", "what.is.this")
    saved.store(tensors | {f"base_model.model.{name}": row for name in amiss})
    saved.edit(target_modules=["q_proj", "down_proj", "v_proj"])
    message = saved.refusal()
    for part in (
        "what.is.this fits no projection or weight of this base model",
        "model.layers.1.self_attn.v_proj is among the targets of",
        "model.layers.0.mlp.down_proj lacks lora_B",
        "model.layers.1.self_attn.q_proj: factors (2, 32) and (32, 3) do not meet",
        "model.norm.weight is stored, though neither",
        "model.embed_tokens.weight has shape (5,), the base (264, 32)",
    ):
        assert part in message


def test_a_module_that_the_base_lacks_is_refused(saved):
    saved.store({name.replace("q_proj", "c_attn"): t for name, t in saved.tensors.items()})
    assert "model.layers.0.self_attn.c_attn fits no projection" in saved.refusal()
    saved.store(saved.tensors | {"what.is.this": np.ones(3, np.float32)})
    assert "what.is.this fits no projection or weight of this base model" in saved.refusal()


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nan_is_refused(saved, value):
    tensors, name = saved.tensors, f"{Q1}.lora_A.weight"
    tensors[name][0, 0] = value
    saved.store(tensors)
    assert saved.refusal().endswith(f"{name} holds NaN or infinite values")


def test_missing_and_truncated_files_are_refused(saved):
    path = saved.path / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert "adapter_model.safetensors is truncated" in saved.refusal()
    path.unlink()
    assert "holds neither adapter_model.safetensors nor adapter_model.bin" in saved.refusal()
    (saved.path / "adapter_config.json").unlink()
    assert "adapter_config.json does not exist" in saved.refusal()


def test_an_adapter_without_a_module_is_refused(saved):
    saved.store({})
    assert "holds no module" in saved.refusal()


def test_the_side_of_ia3_is_what_the_config_says(folder, config, random_ia3, equal):
    made = folder(random_ia3(config))
    before = made.load()
    made.edit(feedforward_modules=r".*\.mlp\..*")
    assert equal(made.load(), before)
    made.edit(feedforward_modules=["k_proj"])
    assert "k_proj has ia3_l of shape (16, 1), not (1, 32)" in made.refusal()
    made.edit(feedforward_modules=None)
    assert equal(made.load(), before)  # its shape tells where the config is silent


def test_a_loaded_adapter_changes_the_model_as_the_saved_one(
    saved, config, weights, hidden, random_lora, random_tokens
):
    tokens = random_tokens(1, 5)
    loaded = hidden(config, weights, saved.load(), tokens)
    made = hidden(config, weights, random_lora(config, targets=["q_proj", "down_proj"]), tokens)
    assert (loaded == made).all()


def test_an_adapter_lists_projections_in_the_models_order(folder, config, random_lora):
    adapter = random_lora(config)
    made = folder(dict(reversed(adapter.items())))
    order = [path for path in models.projections(config) if path in adapter]
    assert list(made.load()) == order


def test_a_pickle_is_refused_by_what_it_names(saved):
    (saved.path / "adapter_model.safetensors").unlink()
    path = saved.path / "adapter_model.bin"
    path.write_bytes(b"cposix\nsystem\n(S'echo no'\ntR.")
    assert "posix.system, which is not a tensor's" in saved.refusal()


def test_the_config_may_be_of_another_kind_of_json(saved):
    (saved.path / "adapter_config.json").write_text(json.dumps(["r", 3]))
    assert "must hold a JSON object" in saved.refusal()


def test_an_adapter_of_another_model_is_told_with_the_one_it_is_of(saved):
    saved.edit(base_model_name_or_path="some/other")
    saved.store(saved.tensors | {f"{STEM}.9.mlp.fc1.weight": np.ones((2, 2), np.float32)})
    assert "adapter_model.safetensors (made for some/other): " in saved.refusal()


def test_a_folder_may_be_a_text(saved, config, equal):
    assert equal(peft.load_adapter(str(saved.path), config), saved.load())
