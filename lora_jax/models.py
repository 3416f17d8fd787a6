"""The model families behind one door: a config's family is the module that its type comes from."""

import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax import decoder, encoder
from lora_jax import table as tables
from lora_jax.decoder import Observe, Output
from lora_jax.errors import InputError
from lora_jax.families import gemma3, gpt2, llama, phi, phi3, roberta, t5
from lora_jax.fields import shown
from lora_jax.merge import changed_by
from lora_jax.modules import IA3, Adapter, Experts, PerExample
from lora_jax.parts import Cache, Memory, empty_cache
from lora_jax.per_example import refuse_rows
from lora_jax.project import Dropout, project
from lora_jax.table import Table

__all__ = ["Observe", "Output"]

# Hugging Face's model_type to the file that implements it.
FAMILIES = {
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
    "phi3": phi3,
    "gpt2": gpt2,
    "phi": phi,
    "gemma3_text": gemma3,
    "roberta": roberta,
    "t5": t5,
}


class Config(Protocol):
    """What every family's config says."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def tied(self) -> bool: ...


def config_from_huggingface(raw: Mapping[str, Any], where: str = "config.json") -> Config:
    """The config of a Hugging Face `config.json`, whatever its family."""
    kind = raw.get("model_type")
    if kind not in tuple(FAMILIES):
        raise InputError(f"{where}: model_type {shown(kind)} is not one of {', '.join(FAMILIES)}")
    if raw.get("quantization_config") is not None:
        raise InputError(
            f"{where}: quantization_config: the weights are stored in few bits, which is not read; "
            f"take the unquantized folder, with --quantize if memory is short"
        )
    return FAMILIES[kind].config_from_huggingface(raw, where)


def family(config: Config) -> ModuleType:
    """The file that implements a config's family."""
    return sys.modules[type(config).__module__]


def kind(config: Config) -> str:
    """What the model does: "causal", "encoder-decoder" or "classifier"."""
    return family(config).KIND


def start_token(config: Config) -> int:
    """The token that an encoder-decoder's decoder begins a text with."""
    settings: Any = config
    return settings.decoder_start


def config_to_huggingface(config: Config) -> dict[str, Any]:
    """The `config.json` that transformers would write for this model."""
    return family(config).config_to_huggingface(config)


def table(config: Config) -> Table:
    """The weight table of the model."""
    return family(config).table(config)


def projections(config: Config) -> dict[str, tuple[int, ...]]:
    """The projections that a module can change, by path, with their (layers, in, out) sizes."""
    return {path: leaf.shape for path, leaf in tables.kernels(table(config)).items()}


def default_targets(config: Config) -> tuple[str, ...]:
    """The projections that LoRA changes unless told: queries, keys, values and outputs."""
    return family(config).TARGETS


def ia3_layouts(config: Config) -> dict[str, dict[str, str]]:
    """Which projections IA3 rescales, and on which side, by layout: "peft" and "pem".

    Of those that a family's layout names, the ones that this model has.
    """
    layouts, known = family(config).IA3_LAYOUTS, projections(config)
    return {
        name: {path: side for path, side in sides.items() if path in known}
        for name, sides in layouts.items()
    }


def forward(
    config: Config,
    weights: Mapping[str, Any],
    adapter: Adapter,
    tokens: jax.Array,
    *,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    cache: Cache | None = None,
    memory: Memory | None = None,
    dropout: Dropout | None = None,
    observe: Observe | None = None,
    remat: bool = False,
) -> Output:
    """The final hidden states (B, T, D) of tokens (B, T) under a module (an empty dict is none).

    An encoder-decoder's `tokens` are its decoder's, `memory` what `encode` made of the source.

    `segments` (B, T) keeps packed texts apart; 0 marks padding. `positions` (B, T) count within a
    text; by default they do, on from its cached tokens. `observe(path, module, x)` may look
    at every projection's input; what it returns comes back stacked over layers. `remat` recomputes
    a layer in the backward pass instead of keeping its activations.
    """
    check_adapter(config, adapter)
    refuse_rows(adapter, len(tokens))
    if (kind(config) == "encoder-decoder") != (memory is not None):
        need = "need the" if memory is None else "take no"
        raise InputError(f"{kind(config)} models {need} memory of a source (models.encode)")
    return decoder.forward(
        family(config),
        config,
        weights,
        adapter,
        tokens,
        segments=segments,
        positions=positions,
        cache=cache,
        memory=memory,
        dropout=dropout,
        observe=observe,
        remat=remat,
    )


def encode(
    config: Config,
    weights: Mapping[str, Any],
    adapter: Adapter,
    source: jax.Array,
    segments: jax.Array | None = None,
    *,
    dropout: Dropout | None = None,
    observe: Observe | None = None,
    remat: bool = False,
) -> Memory:
    """What an encoder-decoder reads in a source (B, S), for `forward`'s `memory`.

    It holds the decoder's keys and values of the source, so it is made once for however many steps
    or texts. A place of `segments` (B, S) is seen by the decoder's tokens of the same segment; 0
    marks padding, and a negative segment is seen by them all. The options are `forward`'s.
    """
    if kind(config) != "encoder-decoder":
        raise InputError(f"{kind(config)} models have no encoder to read a source with")
    check_adapter(config, adapter)
    refuse_rows(adapter, len(source))
    return encoder.encode(
        family(config),
        config,
        weights,
        adapter,
        source,
        segments,
        dropout=dropout,
        observe=observe,
        remat=remat,
    )


def check_adapter(config: Config, adapter: Adapter) -> None:
    """Refuses an adapter with a module that this model has no place for, or no use."""
    known = {"embed", "unembed", *map(tables.module_path, table(config))}
    known -= {"unembed"} if kind(config) == "classifier" else set()
    lost = [path for path in adapter if path not in known]
    if lost:
        has = ", ".join(projections(config))
        raise InputError(f"no projection {', '.join(lost)} for a module; this model has {has}")
    if isinstance(module := adapter.get("embed"), IA3 | Experts):
        raise InputError(
            f"embed: the embedding takes LoRA, DoRA or a whole weight; "
            f"leave this {type(module).__name__} out"
        )


@struct.dataclass
class Unembedding:
    """What turns hidden states into logits."""

    kernel: jax.Array  # (D, V)
    bias: jax.Array | None = None  # (V,)


def unembedding(config: Config, weights: Mapping[str, Any], adapter: Adapter) -> Unembedding:
    """The kernel and bias from hidden states to logits, with what an adapter makes of them.

    An adapter's "embed" is for the input alone, as in PEFT, also where the base has one for both.
    """
    refuse_classifier(config, "it gives no chances of tokens")
    changed, adapter = decoder.with_saved(weights, adapter)
    kernel = changed["unembed"] if "unembed" in changed else weights["embed"].T
    bias, module = changed.get("unembed.bias"), adapter.get("unembed")
    if isinstance(module, Experts):
        raise InputError("the unembedding cannot be routed; leave lm_head out of the library")
    if isinstance(module, PerExample):
        raise InputError(
            "the unembedding is one for all rows; leave lm_head out of adapters that share a batch"
        )
    if module is not None:
        kernel, bias = changed_by("unembed", module, kernel, bias)
    return Unembedding(kernel, bias)


def trains_unembedding(adapter: Adapter) -> bool:
    """Whether a module changes the unembedding."""
    return not {"unembed", "unembed.bias"}.isdisjoint(adapter)


def unembed(
    config: Config, weights: Mapping[str, Any], adapter: Adapter, hidden: jax.Array
) -> jax.Array:
    """Logits (..., V) of hidden states (..., D), in the compute type."""
    head = unembedding(config, weights, adapter)
    logits = hidden @ head.kernel.astype(hidden.dtype)
    return logits if head.bias is None else logits + head.bias.astype(hidden.dtype)


def new_cache(config: Config, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """An empty key-value cache for `batch` rows of up to `slots` positions."""
    refuse_classifier(config, "it continues no text and has no cache")
    return empty_cache(
        config.layers, batch, slots, config.kv_heads, config.head_width, jnp.dtype(dtype)
    )


def refuse_classifier(config: Config, reason: str) -> None:
    """Refuses a base model that gives texts labels, for what cannot be asked of it."""
    if kind(config) == "classifier":
        name = family(config).__name__.rpartition(".")[2]
        raise InputError(f"{name} is a classifier: {reason}; take a causal base model for that")


def label_names(config: Config) -> tuple[str, ...]:
    """The names of a classifier's labels, by number; none of other models."""
    return getattr(config, "labels", ())


def with_labels(config: Config, labels: Sequence[str]) -> Config:
    """The config of a classifier for these labels, in the order of their numbers."""
    if kind(config) != "classifier":
        raise InputError(f"labels are a classifier's; this base model is {kind(config)}")
    return family(config).with_labels(config, tuple(labels))


def head_paths(config: Config) -> tuple[str, ...]:
    """The weights of a classifier's head, which is trained whole along with a module."""
    return tuple(path for path, leaf in table(config).items() if leaf.new is not None)


def classify(
    config: Config,
    weights: Mapping[str, Any],
    adapter: Adapter,
    hidden: jax.Array,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Logits (B, labels) of texts from their hidden states (B, T, D), in the compute type.

    The head reads the first token of each row that `segments` (B, T) does not call padding.
    """
    if segments is None:
        return label_logits(config, weights, adapter, hidden[:, 0])
    first = jnp.argmax(segments != 0, axis=1)
    states = jnp.take_along_axis(hidden, first[:, None, None], axis=1)[:, 0]
    return label_logits(config, weights, adapter, states)


def label_logits(
    config: Config, weights: Mapping[str, Any], adapter: Adapter, states: jax.Array
) -> jax.Array:
    """Logits (..., labels) from the hidden states (..., D) of texts' first tokens."""
    weights, adapter = decoder.with_saved(weights, adapter)

    def apply(path: str, x: jax.Array) -> jax.Array:
        return project(x, weights[path], weights.get(f"{path}.bias"), adapter.get(path))

    return family(config).head(apply, states)
