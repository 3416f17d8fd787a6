"""Gemma 3 as llama.cpp's converter writes it; what all architectures share is in test_gguf.py."""

from dataclasses import replace

import numpy as np
import pytest

from lora_jax import checkpoint, gguf, models, tokens
from lora_jax.errors import InputError
from lora_jax.families import gemma3
from lora_jax.rope import Rope

NAMES = {
    "embed": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LISTED = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", *(f"<0x{n:02X}>" for n in range(256))]
LISTED += ["ab", "▁a", "a", "b", "▁"]


@pytest.fixture(scope="module")
def config():
    return gemma3.Config(
        vocabulary=len(LISTED),
        width=32,
        hidden=48,
        layers=6,
        heads=4,
        kv_heads=2,
        head_width=8,
        context=64,
        local=(True, True, True, True, True, False),
        rope=Rope(8, 1e6),
        local_rope=Rope(8, 1e4),
        window=5,
        query_scalar=8,
    )


@pytest.fixture(scope="module")
def weights(config, random_weights):
    """Random weights; a norm's gain lies anywhere around one."""
    draw = np.random.default_rng(0)

    def shaken(tree):
        return {
            path: shaken(leaf)
            if isinstance(leaf, dict)
            else draw.normal(0, 0.3, leaf.shape).astype(np.float32)
            if path.endswith("norm")
            else leaf
            for path, leaf in tree.items()
        }

    return shaken(random_weights(config))


@pytest.fixture
def write(config, weights, gguf_file):
    """A function that writes the model as GGUF, with other metadata if it is given some."""

    def make(path, *, gain=1.0, extra=()):
        def add(writer):
            writer.add_key_length(config.head_width)
            writer.add_sliding_window(config.window)
            _tokenizer(writer)
            for name, *values in extra:
                getattr(writer, name)(*values)

        return gguf_file(path, "gemma3", config, stored(weights, gain), add=add)

    return make


def stored(weights, gain):
    """Every weight as llama.cpp has it: kernels (out, in), and norms with their gain."""
    yield "token_embd.weight", np.asarray(weights["embed"])
    yield "output_norm.weight", weights["norm"] + np.float32(gain)
    for path, layers in weights["layers"].items():
        for n, value in enumerate(np.asarray(layers)):
            value = value.T if value.ndim == 2 else value + np.float32(gain)
            yield f"blk.{n}.{NAMES[path]}.weight", value


def _tokenizer(writer):
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(LISTED)
    writer.add_token_types([3] * 4 + [4] + [6] * 256 + [1] * 5)
    writer.add_token_scores([-1000.0] * 261 + [0.0, -1.0, -2.0, -3.0, -4.0])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


ROW = np.arange(24).reshape(2, 12)


def test_a_converted_model_is_the_model(tmp_path, write, convert, config, weights, hidden):
    folder = convert(write(tmp_path / "m.gguf"))
    assert checkpoint.read_config(folder) == config
    loaded = checkpoint.load_weights(folder, config)
    np.testing.assert_allclose(
        hidden(config, loaded, {}, ROW), hidden(config, weights, {}, ROW), atol=1e-5
    )
    wrong = convert(write(tmp_path / "n.gguf", gain=0.0))
    other = checkpoint.load_weights(wrong, config)
    assert not np.allclose(hidden(config, other, {}, ROW), hidden(config, weights, {}, ROW), 0.1)


def test_its_tokenizer_comes_along(tmp_path, write, convert):
    tokenizer = tokens.load_tokenizer(convert(write(tmp_path / "m.gguf")))
    assert tokenizer.tokenize("ab ab a\né") == ["ab", "▁", "ab", "▁a", "\n", "<0xC3>", "<0xA9>"]
    assert tokenizer("a")["input_ids"][0] == 2


def test_what_newer_files_say_is_read(tmp_path, write, convert, config):
    from gguf import RopeScalingType

    extra = [
        ("add_sliding_window_pattern", 2),
        ("add_rope_freq_base_swa", 2e4),
        ("add_rope_scaling_type", RopeScalingType.LINEAR),
        ("add_rope_scaling_factor", 8.0),
    ]
    folder = convert(write(tmp_path / "m.gguf", extra=extra))
    assert checkpoint.read_config(folder) == replace(
        config,
        local=(True, False) * 3,
        rope=Rope(8, 1e6, "linear", 8.0),
        local_rope=Rope(8, 2e4),
    )


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (("add_final_logit_softcapping", 30.0), r"gemma3\.final_logit_softcapping = 30\.0 is not"),
        (("add_rope_scaling_type", "yarn"), r"gemma3\.rope\.scaling\.type 'yarn' is not supported"),
    ],
)
def test_what_is_not_implemented_is_refused_by_its_key(tmp_path, write, convert, extra, told):
    from gguf import RopeScalingType

    name, value = extra
    value = RopeScalingType(value) if isinstance(value, str) else value
    source = write(tmp_path / "m.gguf", extra=[(name, value)])
    with pytest.raises(InputError, match=told):
        convert(source)


def test_the_largest_model_alone_divides_its_queries_otherwise():
    """Its head is 128 wide, its query_pre_attn_scalar 5376 / 32 = 168."""
    meta = {
        "gemma3.attention.key_length": 128,
        "gemma3.attention.sliding_window": 1024,
    }
    shape = {
        "vocabulary": 262_208,
        "width": 5376,
        "hidden": 21_504,
        "heads": 32,
        "kv_heads": 16,
        "context": 131_072,
        "eps": 1e-6,
        "tied": True,
    }
    found = [gguf._gemma3(meta, shape | {"layers": n}).query_scalar for n in (62, 48)]
    assert found == [168, 128]
    assert models.config_to_huggingface(gguf._gemma3(meta, shape | {"layers": 62}))
