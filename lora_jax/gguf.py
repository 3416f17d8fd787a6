"""GGUF files of the Llama family, converted once into Hugging Face folders.

llama.cpp stores the query and key kernels with each head's rotary pairs interleaved; left so, the
model still runs, a third worse, without any error. They are put back in halves here.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import models
from lora_jax.errors import InputError, refuse_all
from lora_jax.families import llama
from lora_jax.files import save_tensors, write_json

_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

Progress = Callable[[int, int], None]  # tensors done, tensors in all


def convert(source: Path, folder: Path, progress: Progress = lambda done, total: None) -> None:
    """Writes a GGUF file as a Hugging Face folder: config, float32 safetensors, tokenizer."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
    except (ValueError, OSError, IndexError) as error:
        raise InputError(f"{source} is truncated or not a GGUF file ({error})") from None
    meta = {name: field.contents() for name, field in reader.fields.items()}
    if meta.get("general.architecture") != "llama":
        got = meta.get("general.architecture")
        raise InputError(f"{source}: architecture {got!r} is not supported (llama is)")
    try:
        config = _config(meta, reader)
        _write_tokenizer(meta, folder, source)
    except KeyError as error:
        raise InputError(f"{source}: its metadata lacks {error}") from None
    tensors = dict(_tensors(reader, config, progress))
    write_json(folder / "config.json", models.config_to_huggingface(config) | _special_ids(meta))
    save_tensors(folder / "model.safetensors", tensors)


def _config(meta: dict[str, Any], reader: Any) -> llama.Config:
    """The model config in a GGUF file's metadata."""
    heads, width = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    scaled = [f"{key} = {meta[key]!r} is not supported" for key in meta if "rope.scaling" in key]
    refuse_all([text for text in scaled if "'none'" not in text], "GGUF metadata")
    names = {tensor.name for tensor in reader.tensors}
    return llama.Config(
        kind="llama",
        vocabulary=len(meta["tokenizer.ggml.tokens"]),
        width=width,
        hidden=meta["llama.feed_forward_length"],
        layers=meta["llama.block_count"],
        heads=heads,
        kv_heads=meta.get("llama.attention.head_count_kv", heads),
        head_width=meta.get("llama.rope.dimension_count", width // heads),
        context=meta["llama.context_length"],
        rope_base=_shortest(meta.get("llama.rope.freq_base", 10_000.0)),
        eps=_shortest(meta["llama.attention.layer_norm_rms_epsilon"]),
        tied="output.weight" not in names,
    )


def _shortest(value: float) -> float:
    """A float32 as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _special_ids(meta: dict[str, Any]) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id")
    return {k: meta[f"tokenizer.ggml.{k}"] for k in keys if f"tokenizer.ggml.{k}" in meta}


def _tensors(reader: Any, config: llama.Config, progress: Progress) -> Iterator:
    """Every tensor in float32 under its Hugging Face name."""
    from gguf.quants import dequantize

    for index, tensor in enumerate(reader.tensors):
        name = _rename(tensor.name)
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name.endswith("q_proj.weight"):
            value = _halves(value, config.heads)
        if name.endswith("k_proj.weight"):
            value = _halves(value, config.kv_heads)
        yield name, np.ascontiguousarray(value)
        progress(index + 1, len(reader.tensors))


def _rename(name: str) -> str:
    """What Hugging Face calls the tensor that llama.cpp calls `name`."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    prefix, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if prefix != "blk" or part not in _LAYER:
        raise InputError(f"GGUF tensor {name!r} has no place in a Llama model")
    return f"model.layers.{layer}.{_LAYER[part]}.{kind}"


def _halves(kernel: np.ndarray, heads: int) -> np.ndarray:
    """A (out, in) kernel with each head's interleaved rotary pairs put back in halves."""
    out, width = kernel.shape
    return kernel.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def _write_tokenizer(meta: dict[str, Any], folder: Path, source: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json from the metadata's byte-level BPE."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    pre = meta.get("tokenizer.ggml.pre")
    if meta.get("tokenizer.ggml.model") != "gpt2" or pre not in ("smollm", "gpt-2", "llama-bpe"):
        raise InputError(f"{source}: its tokenizer ({pre!r}) is not supported (smollm, gpt-2 are)")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    try:
        tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{source}: its tokenizer does not hold together ({error})") from None
    bytes_, digits = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(True)
    split = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
    parts = {"smollm": [digits, bytes_], "gpt-2": [bytes_]}.get(pre)
    if parts is None:
        parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
               if kind == 3]  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = ("bos", "eos", "unknown", "padding")
    special = {n: meta.get(f"tokenizer.ggml.{n}_token_id") for n in named}
    rename = {"unknown": "unk", "padding": "pad"}
    described = {
        f"{rename.get(n, n)}_token": tokens[i] for n, i in special.items() if i is not None
    }
    described |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta.get("tokenizer.chat_template"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2))


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
