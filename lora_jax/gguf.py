"""GGUF files of the Llama and Gemma 3 families, converted once into Hugging Face folders.

llama.cpp stores Llama's query and key kernels with each head's rotary pairs interleaved; left so,
the model still runs, a third worse, without any error. They are put back in halves here. Gemma's
are in halves already; its norms hold their gain, of which Hugging Face stores one less.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import models
from lora_jax.errors import InputError, refuse_all
from lora_jax.families import gemma3, llama
from lora_jax.files import save_tensors, write_json
from lora_jax.gguf_tokenizer import write_tokenizer
from lora_jax.rope import Rope

Meta = Mapping[str, Any]
Progress = Callable[[int, int], None]  # tensors done, tensors in all


def convert(source: Path, folder: Path, progress: Progress = lambda done, total: None) -> None:
    """Writes a GGUF file as a Hugging Face folder: config, float32 safetensors, tokenizer."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
    except (ValueError, OSError, IndexError) as error:
        raise InputError(f"{source} is truncated or not a GGUF file ({error})") from None
    meta = {name: field.contents() for name, field in reader.fields.items()}
    name = meta.get("general.architecture")
    if name not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise InputError(f"{source}: architecture {name!r} is not supported ({known} are)")
    kind = _ARCHITECTURES[name]
    try:
        tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
        config = kind.config(meta, _shape(meta, name) | {"tied": tied})
        write_tokenizer(meta, folder, source)
    except KeyError as error:
        raise InputError(f"{source}: its metadata lacks {error}") from None
    tensors = dict(_tensors(reader, kind, config, progress))
    write_json(folder / "config.json", models.config_to_huggingface(config) | _special_ids(meta))
    save_tensors(folder / "model.safetensors", tensors)


def _shape(meta: Meta, name: str) -> dict[str, Any]:
    """What every architecture's metadata has and every family's config needs."""
    heads = meta[f"{name}.attention.head_count"]
    return {
        "vocabulary": len(meta["tokenizer.ggml.tokens"]),
        "width": meta[f"{name}.embedding_length"],
        "hidden": meta[f"{name}.feed_forward_length"],
        "layers": meta[f"{name}.block_count"],
        "heads": heads,
        "kv_heads": meta.get(f"{name}.attention.head_count_kv", heads),
        "context": meta[f"{name}.context_length"],
        "eps": _shortest(meta[f"{name}.attention.layer_norm_rms_epsilon"]),
    }


def _llama(meta: Meta, shape: dict[str, Any]) -> llama.Config:
    """The config of a Llama in a GGUF file."""
    size = meta.get("llama.rope.dimension_count", shape["width"] // shape["heads"])
    base = meta.get("llama.rope.freq_base", 10_000.0)
    return llama.Config(
        kind="llama", head_width=size, rope=_rope(meta, "llama", size, base), **shape
    )


def _gemma3(meta: Meta, shape: dict[str, Any]) -> gemma3.Config:
    """The config of a Gemma 3 in a GGUF file, with llama.cpp's defaults where that is silent."""
    caps = [f"{k} = {meta[k]} is not supported" for k in meta if k.endswith("logit_softcapping")]
    refuse_all(caps, "GGUF metadata")
    size, every = meta["gemma3.attention.key_length"], meta.get(_PATTERN, 6)
    largest = shape["layers"] == 62  # the 27B model alone divides queries by another root
    return gemma3.Config(
        head_width=size,
        local=tuple(bool((n + 1) % every) for n in range(shape["layers"])),
        rope=_rope(meta, "gemma3", size, meta.get("gemma3.rope.freq_base", 1e6)),
        local_rope=Rope(size, _shortest(meta.get("gemma3.rope.freq_base_swa", 1e4))),
        window=meta["gemma3.attention.sliding_window"],
        query_scalar=shape["width"] // shape["heads"] if largest else size,
        **shape,
    )


_PATTERN = "gemma3.attention.sliding_window_pattern"


def _rope(meta: Meta, name: str, size: int, base: float) -> Rope:
    """The rotary positions, scaled linearly if a factor says so."""
    kind = meta.get(f"{name}.rope.scaling.type", "linear")  # llama.cpp's default
    factor = _shortest(meta.get(f"{name}.rope.scaling.factor", 1.0))
    if kind not in ("none", "linear"):
        raise InputError(f"GGUF metadata: {name}.rope.scaling.type {kind!r} is not supported")
    if kind == "none" or factor in (0, 1):
        return Rope(size, _shortest(base))
    return Rope(size, _shortest(base), "linear", factor)


def _shortest(value: float) -> float:
    """A float32 as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _special_ids(meta: Meta) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id")
    return {k: meta[f"tokenizer.ggml.{k}"] for k in keys if f"tokenizer.ggml.{k}" in meta}


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp stores a family's weights."""

    config: Callable[[Meta, dict[str, Any]], llama.Config | gemma3.Config]
    layer: Mapping[str, str]  # its names in a layer, and Hugging Face's
    interleaved: bool = False  # whether queries' and keys' rotary pairs are
    norm_offset: float = 0.0  # what its norms' weights are more than Hugging Face's


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_KERNELS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ARCHITECTURES = {
    "llama": _Architecture(_llama, _KERNELS | _LLAMA_NORMS, interleaved=True),
    "gemma3": _Architecture(_gemma3, _KERNELS | _GEMMA_NORMS, norm_offset=1.0),
}


def _tensors(
    reader: Any, kind: _Architecture, config: llama.Config | gemma3.Config, progress: Progress
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in float32 under its Hugging Face name."""
    from gguf.quants import dequantize

    heads = {"q_proj.weight": config.heads, "k_proj.weight": config.kv_heads}
    for index, tensor in enumerate(reader.tensors):
        name = _rename(tensor.name, kind.layer)
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        last = ".".join(name.split(".")[-2:])
        if kind.interleaved and last in heads:
            value = _halves(value, heads[last])
        if last.endswith("norm.weight"):
            value = value - np.float32(kind.norm_offset)
        yield name, np.ascontiguousarray(value)
        progress(index + 1, len(reader.tensors))


def _rename(name: str, layers: Mapping[str, str]) -> str:
    """What Hugging Face calls the tensor that llama.cpp calls `name`."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    prefix, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if prefix != "blk" or part not in layers:
        raise InputError(f"GGUF tensor {name!r} has no place in a model of its architecture")
    return f"model.layers.{layer}.{layers[part]}.{kind}"


def _halves(kernel: np.ndarray, heads: int) -> np.ndarray:
    """A (out, in) kernel with each head's interleaved rotary pairs put back in halves."""
    out, width = kernel.shape
    return kernel.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)
