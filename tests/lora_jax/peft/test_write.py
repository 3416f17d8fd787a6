from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import files, peft
from lora_jax.errors import InputError
from lora_jax.families import gpt2
from lora_jax.modules import IA3, DoRA, Experts, LoRA, Saved

WHOLE = Saved(jnp.ones((264, 32)))
STEM = "base_model.model.model.layers"


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_comes_back_bit_for_bit(folder, config, random_lora, equal, rank, rslora):
    adapter = random_lora(config, rank=rank, alpha=7.0, rslora=rslora)
    made = folder(adapter)
    assert list(made.load()) == list(adapter)
    assert equal(made.load(), adapter)  # the scales are part of the trees' structure
    assert made.settings["lora_alpha"] == 7
    assert made.settings["use_rslora"] == (rslora and rank > 1)


@pytest.mark.parametrize("layout", ["peft", "pem"])
def test_ia3_comes_back_with_its_scales_bit_for_bit(folder, config, random_ia3, equal, layout):
    adapter = random_ia3(config, layout=layout)
    scales = lambda adapter: jax.tree.map(lambda x: 1 + x, adapter)  # noqa: E731
    assert equal(scales(folder(adapter).load()), scales(adapter))


def test_dora_and_lora_bias_come_back(folder, config, random_lora, equal):
    adapter = random_lora(config)
    row = lambda m: 0.5 + jax.random.uniform(jax.random.key(0), m.b[:, 0].shape)  # noqa: E731
    doras = {path: DoRA(m.a, m.b, row(m), m.scale) for path, m in adapter.items()}
    made = folder(doras)
    assert made.settings["use_dora"] and equal(made.load(), doras)
    biased = {path: replace(m, bias=row(m)) for path, m in adapter.items()}
    made = folder(biased)
    assert made.settings["lora_bias"] and equal(made.load(), biased)


def test_embedding_and_head_come_back(folder, config, equal):
    a = jax.random.normal(jax.random.key(0), (264, 2))
    b = jax.random.normal(jax.random.key(1), (2, 32))
    adapter = {"embed": LoRA(a, b, 2.0), "unembed": LoRA(b.T, a.T, 2.0)}
    made = folder(adapter)
    assert equal(made.load(), adapter)
    assert made.settings["target_modules"] == ["embed_tokens", "lm_head"]
    shapes = {name.split(".", 2)[2]: t.shape for name, t in made.tensors.items()}
    assert shapes == {
        "model.embed_tokens.lora_embedding_A": (2, 264),
        "model.embed_tokens.lora_embedding_B": (32, 2),
        "lm_head.lora_A.weight": (2, 32),
        "lm_head.lora_B.weight": (264, 2),
    }
    with pytest.raises(InputError, match="no lora_bias where an embedding has a LoRA"):
        folder(adapter | {"unembed": LoRA(b.T, a.T, 2.0, jnp.ones(264))})


def test_projections_may_differ_in_rank_and_scale(folder, config, random_lora, equal):
    adapter = random_lora(config, targets=["q_proj"], rank=2, alpha=3.0)
    adapter |= random_lora(config, targets=["v_proj"], rank=5, alpha=4.0)
    adapter |= random_lora(config, targets=["up_proj"], rank=2, alpha=1.0)
    made = folder(adapter)
    assert equal(made.load(), adapter)
    assert made.settings["rank_pattern"] == {"v_proj": 5}
    assert made.settings["alpha_pattern"] == {"v_proj": 4, "up_proj": 1}


def test_what_padding_added_is_left_out_again(folder, config, random_lora, equal):
    """Ranks of zeros in one layer, and a layer of zeros."""
    module = random_lora(config, targets=["q_proj"], rank=4, alpha=4.0)["self_attn.q_proj"]
    thin = replace(module, a=module.a.at[0, :, 2:].set(0), b=module.b.at[0, 2:].set(0))
    made = folder({"self_attn.q_proj": thin})
    assert made.settings["r"] == 2
    assert made.settings["rank_pattern"] == {"layers.1.self_attn.q_proj": 4}
    assert equal(made.load()["self_attn.q_proj"], thin)
    lone = jax.tree.map(lambda x: x.at[0].set(0), module)
    made = folder({"self_attn.q_proj": lone})
    assert made.settings["target_modules"] == ["layers.1.self_attn.q_proj"]
    assert equal(made.load()["self_attn.q_proj"], lone)


def test_targets_are_endings_that_no_other_module_has(folder, random_weights):
    """GPT-2 has a c_proj in the attention and one in the feed-forward."""
    config = gpt2.Config(
        vocabulary=40, width=8, hidden=16, layers=2, heads=2, context=8, tied=False
    )
    key = jax.random.key(0)
    module = LoRA(jax.random.normal(key, (2, 8, 1)), jax.random.normal(key, (2, 1, 8)))
    made = folder({"attn.c_proj": module}, config)
    assert made.settings["target_modules"] == ["attn.c_proj"]
    assert made.settings["fan_in_fan_out"] is True
    assert made.tensors["base_model.model.transformer.h.0.attn.c_proj.lora_A.weight"].shape == (
        1,
        8,
    )
    both = {"attn.c_proj": module, "mlp.c_proj": replace(module, a=jnp.ones((2, 16, 1)))}
    assert folder(both, config).settings["target_modules"] == ["c_proj"]


def test_the_config_says_what_peft_needs(saved, config):
    settings = saved.settings
    assert (settings["r"], settings["lora_alpha"]) == (3, 6)
    assert settings["target_modules"] == ["down_proj", "q_proj"]
    assert settings["base_model_name_or_path"] == "tiny"
    assert settings["task_type"] == "CAUSAL_LM"
    assert settings["fan_in_fan_out"] is False and settings["inference_mode"] is True


def test_extra_files_lie_beside_the_adapter(tmp_path, config, random_lora):
    peft.save_adapter(tmp_path / "a", random_lora(config), config, extra={"from.json": {"x": 1}})
    assert files.read_json(tmp_path / "a" / "from.json") == {"x": 1}
    assert peft.load_adapter(tmp_path / "a", config)


def test_what_peft_has_no_format_for_is_refused(tmp_path, config, random_lora, random_ia3):
    expert = Experts(*(jnp.ones((2, 3, 4, 4)),) * 2, prototypes=jnp.ones((2, 3, 4)))
    mixed = random_lora(config) | random_ia3(config)
    for adapter in ({"self_attn.q_proj": expert}, mixed, {}):
        with pytest.raises(InputError, match="PEFT's format holds LoRA, DoRA or IA3"):
            peft.save_adapter(tmp_path / "a", adapter, config)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("module", [LoRA(jnp.ones((264, 1)), jnp.ones((1, 32))), WHOLE])
def test_an_encoder_decoders_embedding_is_refused(tmp_path, t5_config, random_lora, module):
    """PEFT's would reach neither stack, as either holds an embed_tokens of its own."""
    adapter = random_lora(t5_config, targets=["q"]) | {"embed": module}
    with pytest.raises(InputError, match="shared: an encoder-decoder's embedding changes no"):
        peft.save_adapter(tmp_path / "a", adapter, t5_config)


def test_ia3_of_an_embedding_is_refused(tmp_path, config):
    with pytest.raises(InputError, match="embed: PEFT's IA3 takes no embedding"):
        peft.save_adapter(tmp_path / "a", {"embed": IA3(jnp.ones(32))}, config)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nan_is_refused(tmp_path, config, random_lora, value):
    adapter = random_lora(config)
    m = adapter["self_attn.q_proj"]
    adapter["self_attn.q_proj"] = replace(m, a=m.a.at[1, 0, 0].set(value))
    with pytest.raises(InputError, match=r"cannot save as PEFT does: .*lora_A\.weight holds NaN"):
        peft.save_adapter(tmp_path / "b", adapter, config)
    assert not (tmp_path / "b").exists()
