import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import bases, checkpoint, files, gguf, models, tokens
from lora_jax.errors import InputError

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_cpp_name(name):
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def permuted(kernel, heads):
    """llama.cpp's order of a query or key kernel (out, in): each head's rotary pairs side by side.

    The pair of row i is i + half within its head.
    """
    half = kernel.shape[0] // heads // 2
    rows = [
        head * 2 * half + i + side * half
        for head in range(heads)
        for i in range(half)
        for side in (0, 1)
    ]
    return kernel[rows]


@pytest.fixture(scope="session")
def write_gguf(config, base_folder, gguf_file):
    """A function that writes the tiny model as llama.cpp's converter does, less what is left out.

    `leave` names metadata keys to leave out; `spare` adds tensors; `permute` may be turned off.
    """
    tensors = load_file(base_folder / "model.safetensors")
    vocabulary = files.read_json(base_folder / "tokenizer.json")["model"]["vocab"]
    template = files.read_json(base_folder / "tokenizer_config.json")["chat_template"]

    names = [*sorted(vocabulary, key=vocabulary.get), "<|im_start|>", "<|im_end|>", "he", "ll"]
    names += [f"<spare{n}>" for n in range(config.vocabulary - len(names))]

    def stored(permute):
        for name, value in tensors.items():
            heads = {"q": config.heads, "k": config.kv_heads}.get(name[-13:-12])
            if permute and name.endswith(("q_proj.weight", "k_proj.weight")):
                value = permuted(value, heads)
            yield llama_cpp_name(name), value

    def write(path, *, leave=(), spare=None, permute=True, kind="llama", pre="gpt-2", merges=()):
        def add(writer):
            writer.add_rope_dimension_count(config.head_width)
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(pre)
            writer.add_token_list(names)
            writer.add_token_types([1] * 256 + [3, 3] + [1] * (len(names) - 258))
            writer.add_token_merges(["h e", "l l", *merges])
            writer.add_bos_token_id(256)
            writer.add_eos_token_id(257)
            writer.add_chat_template(template)

        listed = [*stored(permute), *(spare or {}).items()]
        return gguf_file(path, kind, config, listed, add=add, leave=leave)

    return write


def test_a_converted_model_is_the_model(tmp_path, write_gguf, convert, config, weights, hidden):
    done = []
    folder = convert(write_gguf(tmp_path / "m.gguf"), lambda *step: done.append(step))
    assert checkpoint.read_config(folder) == config
    loaded = checkpoint.load_weights(folder, config)
    tokens_ = np.arange(20).reshape(2, 10)
    np.testing.assert_array_equal(
        models.unembed(config, loaded, {}, hidden(config, loaded, {}, tokens_)),
        models.unembed(config, weights, {}, hidden(config, weights, {}, tokens_)),
    )
    assert done[-1] == (len(done), len(done)) == (20, 20)


def test_without_the_permutation_the_model_would_differ(
    tmp_path, write_gguf, convert, config, weights, hidden
):
    """The test above tells: a file whose kernels are not permuted converts to another model."""
    folder = convert(write_gguf(tmp_path / "m.gguf", permute=False))
    loaded = checkpoint.load_weights(folder, config)
    tokens_ = np.arange(20).reshape(2, 10)
    wrong, right = (hidden(config, w, {}, tokens_) for w in (loaded, weights))
    assert not np.allclose(wrong, right, atol=0.05)


def test_the_tokenizer_and_its_chat_template_come_along(tmp_path, write_gguf, convert):
    folder = convert(write_gguf(tmp_path / "m.gguf"))
    tokenizer = tokens.load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    text = "hello, wörld 1234\n"
    ids = tokens.encode(tokenizer, [text])[0]
    assert tokenizer.decode(ids) == text
    chat = tokens.chat(tokenizer, [{"role": "user", "content": "hi"}], open_reply=True)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokens.encode(tokenizer, [chat])[0][0] == 256


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Ġ", "1", "2", "3", "4"]),
        ("smollm", ["Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["Ġ", "1", "2", "3", "4"]),
    ],
)
def test_every_pre_tokenizer_splits_bytes_and_decodes_back(
    tmp_path, write_gguf, convert, pre, pieces
):
    folder = convert(write_gguf(tmp_path / "m.gguf", pre=pre))
    tokenizer = tokens.load_tokenizer(folder)
    assert tokenizer.tokenize(" 1234") == pieces
    assert tokenizer.decode(tokens.encode(tokenizer, ["Où est-ce?"])[0]) == "Où est-ce?"


def test_a_base_may_be_a_gguf_file_converted_once(tmp_path, write_gguf, config, monkeypatch):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    source = write_gguf(tmp_path / "m.gguf")
    base = bases.load_base(str(source))
    assert base.config == config
    assert base.folder.parent == tmp_path / "cache" / "models"
    monkeypatch.setattr(gguf, "convert", None)
    assert bases.load_base(str(source)).digest == base.digest


@pytest.fixture
def refusal(convert):
    """A function to what is said of a GGUF file that cannot be converted."""

    def told(source) -> str:
        with pytest.raises(InputError) as caught:
            convert(source)
        return str(caught.value)

    return told


@pytest.mark.parametrize("left", [0, 3, 100, 9000, -100])
def test_a_truncated_file_is_refused(tmp_path, write_gguf, refusal, left):
    source = write_gguf(tmp_path / "m.gguf")
    source.write_bytes(source.read_bytes()[:left])
    assert "m.gguf is truncated or not a GGUF file" in refusal(source)


def test_a_file_of_another_format_is_refused(tmp_path, refusal):
    source = tmp_path / "m.gguf"
    source.write_bytes(b"PK\x03\x04" * 100)
    assert "is truncated or not a GGUF file" in refusal(source)


def test_another_architecture_is_refused(tmp_path, write_gguf, refusal):
    source = write_gguf(tmp_path / "m.gguf", kind="mamba")
    message = refusal(source)
    assert "architecture 'mamba' is not supported (llama, gemma3 are)" in message


@pytest.mark.parametrize("key", ["llama.block_count", "tokenizer.ggml.merges"])
def test_metadata_that_lacks_a_key_is_refused_by_its_name(tmp_path, write_gguf, refusal, key):
    message = refusal(write_gguf(tmp_path / "m.gguf", leave=(key,)))
    assert message.endswith(f"m.gguf: its metadata lacks '{key}'")


def test_a_tensor_without_a_place_is_refused(tmp_path, write_gguf, refusal):
    source = write_gguf(tmp_path / "m.gguf", spare={"rope_freqs.weight": np.ones(4, np.float32)})
    message = refusal(source)
    assert "'rope_freqs.weight' has no place in a model of its architecture" in message


def test_an_unknown_tokenizer_is_refused(tmp_path, write_gguf, refusal):
    message = refusal(write_gguf(tmp_path / "m.gguf", pre="tekken"))
    assert "its tokenizer ('gpt2', 'tekken') is not supported" in message


def test_merges_of_tokens_that_there_are_not_are_refused(tmp_path, write_gguf, refusal):
    message = refusal(write_gguf(tmp_path / "m.gguf", merges=["he ll"]))
    assert "its tokenizer does not hold together" in message
