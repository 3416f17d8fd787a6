import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
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


def test_layers_that_differ_are_padded_and_folded(saved):
    tensors, name = saved.tensors, "model.layers.1.self_attn.q_proj"
    a, b = (f"base_model.model.{name}.lora_{x}.weight" for x in "AB")
    tensors[a], tensors[b] = tensors[a][:2].copy(), tensors[b][:, :2].copy()
    saved.store(tensors)
    saved.edit(rank_pattern={name: 2}, alpha_pattern={name: 8})
    module = saved.load()["self_attn.q_proj"]
    assert module.scale == 1.0
    for layer, scale in enumerate((6 / 3, 8 / 2)):
        stem = f"{STEM}.{layer}.self_attn.q_proj"
        want = scale * (tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]).T
        np.testing.assert_allclose(module.a[layer] @ module.b[layer], want, atol=1e-5)


def test_layers_without_a_module_get_zeros(saved):
    before = saved.load()
    saved.store({name: t for name, t in saved.tensors.items() if ".layers.1." in name})
    saved.edit(layers_to_transform=[1])
    for path, module in saved.load().items():
        assert (module.b[1] == before[path].b[1]).all() and module.scale == before[path].scale
        assert not module.a[0].any() and not module.b[0].any()


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


def test_the_ranks_must_be_those_of_the_config(saved):
    saved.edit(r=4)
    assert f"{Q1[17:]} has rank 3, the config says 4" in saved.refusal()


def test_a_target_without_tensors_is_refused(saved):
    saved.edit(target_modules=["q_proj", "down_proj", "v_proj"])
    message = saved.refusal()
    assert "model.layers.0.self_attn.v_proj is among the targets of" in message
    assert "adapter_config.json and has no tensor" in message


def test_tensors_of_what_is_no_target_are_refused(saved):
    saved.edit(target_modules=["q_proj"])
    assert "layers.1.mlp.down_proj has tensors and is not among the targets" in saved.refusal()
    saved.edit(target_modules=["q_proj", "down_proj"], exclude_modules=["layers.1.mlp.down_proj"])
    assert "layers.1.mlp.down_proj has tensors and is not among the targets" in saved.refusal()
    saved.edit(target_modules=None, exclude_modules=None)
    assert saved.load()  # what was trained is not said


def test_an_adapter_for_another_model_is_refused(saved):
    wider = replace(saved.config, width=48)
    assert "q_proj maps 32 to 32, the base 48 to 32" in saved.refusal(wider)
    shallow, deep = replace(saved.config, layers=1), replace(saved.config, layers=3)
    assert "fits no projection of this base model" in saved.refusal(shallow)
    assert "model.layers.2.mlp.down_proj is among the targets" in saved.refusal(deep)


def test_an_adapter_of_another_vocabulary_is_refused(folder, config):
    key = jax.random.key(0)
    a, b = jax.random.normal(key, (264, 2)), jax.random.normal(key, (2, 32))
    made = folder({"embed": LoRA(a, b)})
    message = made.refusal(replace(config, vocabulary=300))
    assert "model.embed_tokens maps 264 to 32, the base 300 to 32" in message
    assert "if the adapter's vocabulary was resized, give the resized model as the base" in message


def test_a_copy_of_the_embedding_shows_that_the_base_is_the_right_one(folder, config, equal):
    made = folder({"embed": LoRA(jnp.ones((264, 2)), jnp.ones((2, 32)))})
    before = made.load()
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    made.store(made.tensors | {name: np.ones((264, 32), np.float32)})
    assert equal(made.load(), before)
    made.store(made.tensors | {name: np.ones((265, 32), np.float32)})
    assert "embed_tokens.weight has shape (265, 32), the base (264, 32); if" in made.refusal()


def test_a_module_that_the_base_lacks_is_refused(saved):
    saved.store({name.replace("q_proj", "c_attn"): t for name, t in saved.tensors.items()})
    assert "model.layers.0.self_attn.c_attn fits no projection" in saved.refusal()
    saved.store(saved.tensors | {"what.is.this": np.ones(3, np.float32)})
    assert "what.is.this fits no projection or weight of this base model" in saved.refusal()


def test_a_lonely_factor_and_factors_that_do_not_meet_are_refused(saved):
    tensors = saved.tensors
    saved.store({n: t for n, t in tensors.items() if not ("q_proj" in n and "lora_B" in n)})
    assert "model.layers.1.self_attn.q_proj lacks lora_B" in saved.refusal()
    name = f"{Q1}.lora_A.weight"
    saved.store(tensors | {name: tensors[name][:2].copy()})
    assert f"{Q1[17:]}: factors (2, 32) and (32, 3) do not meet" in saved.refusal()


@pytest.mark.parametrize(
    ("key", "tensor"), [("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")]
)
def test_what_the_config_asks_for_must_be_there_and_the_other_way_round(saved, key, tensor):
    saved.edit(**{key: True})
    assert f"model.layers.0.mlp.down_proj lacks {tensor}" in saved.refusal()
    saved.edit(**{key: False})
    saved.store(saved.tensors | {f"{Q1}.{tensor}": np.ones(32, np.float32)})
    assert f"{Q1[17:]} has {tensor}, for which {key} does not ask" in saved.refusal()


def test_magnitudes_of_another_size_and_of_zero_are_refused(saved):
    saved.edit(use_dora=True)
    sizes = {n: len(t) for n, t in saved.tensors.items() if "lora_B" in n}
    rows = {n.replace("lora_B.weight", "lora_magnitude_vector"): size for n, size in sizes.items()}
    whole = saved.tensors | {n: np.ones(size, np.float32) for n, size in rows.items()}
    saved.store(whole)
    assert isinstance(saved.load()["self_attn.q_proj"], DoRA)
    name = f"{Q1}.lora_magnitude_vector"
    saved.store(whole | {name: np.ones(5, np.float32)})
    assert "q_proj has lora_magnitude_vector of shape (5,), not (32,)" in saved.refusal()
    saved.store(whole | {name: np.zeros(32, np.float32)})
    assert "q_proj has a lora_magnitude_vector with a 0" in saved.refusal()


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
    assert "adapter_model.safetensors does not exist" in saved.refusal()
    (saved.path / "adapter_config.json").unlink()
    assert "adapter_config.json does not exist" in saved.refusal()


def test_an_adapter_without_a_module_is_refused(saved):
    saved.store({})
    assert "holds no module" in saved.refusal()


def test_ia3_of_another_size_is_refused(folder, config, random_ia3):
    made = folder(random_ia3(config))
    name = f"{STEM}.0.mlp.down_proj.ia3_l"
    assert made.tensors[name].shape == (1, 64)
    made.store(made.tensors | {name: made.tensors[name][:, :5].copy()})
    assert "mlp.down_proj has ia3_l of shape (1, 5), not (1, 64)" in made.refusal()


def test_the_side_of_ia3_is_what_the_config_says(folder, config, random_ia3, equal):
    made = folder(random_ia3(config))
    before = made.load()
    made.edit(feedforward_modules=r".*\.mlp\..*")
    assert equal(made.load(), before)
    made.edit(feedforward_modules=["k_proj"])
    assert "k_proj has ia3_l of shape (16, 1), not (1, 32)" in made.refusal()


def test_the_side_of_ia3_is_told_by_its_shape_where_the_config_is_silent(tmp_path, config, folder):
    made = folder({"self_attn.o_proj": _ia3(config, 32)})
    made.edit(feedforward_modules=None)
    assert made.load()["self_attn.o_proj"].on == "input"


def _ia3(config, size):
    from lora_jax.modules import IA3

    return IA3(jnp.ones((config.layers, size)), "input")


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
