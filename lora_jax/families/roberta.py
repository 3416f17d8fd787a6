"""RoBERTa with a classification head: an encoder that reads both ways, and labels for a text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.activations import ACTIVATIONS
from lora_jax.decoder import Layer, Places, learned_positions
from lora_jax.errors import InputError
from lora_jax.fields import Fields
from lora_jax.parts import layer_norm
from lora_jax.table import Leaf, biased

Array = jax.Array
Weights = Mapping[str, Any]

KIND = "classifier"
PREFIX = "roberta."
# A masked language model's head, the pooler that the classifier does without, and buffers.
SPARE = (
    r"lm_head\..*",
    r"(roberta\.)?pooler\..*",
    r"(roberta\.)?embeddings\.(position|token_type)_ids",
)

# PEFT's default names "output.dense", which by its suffix rule is the attention's output too.
TARGETS = ("attention.self.query", "attention.self.value")
_KEYS_AND_VALUES = {"attention.self.key": "output", "attention.self.value": "output"}
IA3_LAYOUTS = {
    "peft": {**_KEYS_AND_VALUES, "attention.output.dense": "input", "output.dense": "input"},
    "pem": {**_KEYS_AND_VALUES, "intermediate.dense": "output"},
}


@dataclass(frozen=True)
class Config:
    """What fixes a RoBERTa classifier's shape and arithmetic."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    context: int  # tokens a text may have; the table of positions has `padding` + 1 more
    labels: tuple[str, ...]  # their names, in the order of the head's outputs
    token_types: int = 1
    padding: int = 1  # the id of the padding token, after which positions begin
    activation: str = "gelu"
    eps: float = 1e-12
    spread: float = 0.02  # deviation of a new head's weights

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values."""
        return self.heads

    @property
    def head_width(self) -> int:
        """The width of a head."""
        return self.width // self.heads

    @property
    def tied(self) -> bool:
        """Whether the unembedding is the embedding: there is none."""
        return False


def config_from_huggingface(raw: Mapping[str, Any], where: str = "config.json") -> Config:
    """The config that a Hugging Face `config.json` describes; what it asks in vain is named."""
    fields = Fields(raw, where)
    for key, known in _PLAIN.items():
        fields.one_of(key, known)
    width, heads = fields.heads("hidden_size", "num_attention_heads")
    padding = fields.whole("pad_token_id", 1, least=0)
    places = fields.whole("max_position_embeddings")
    context = places - padding - 1
    fields.expect(context > 0, f"max_position_embeddings {places} has no place for a token")
    config = Config(
        vocabulary=fields.whole("vocab_size"),
        width=width,
        hidden=fields.whole("intermediate_size"),
        layers=fields.whole("num_hidden_layers"),
        heads=heads,
        context=context,
        labels=_labels(fields),
        token_types=fields.whole("type_vocab_size", 2),
        padding=padding,
        activation=fields.one_of("hidden_act", ACTIVATIONS, "gelu"),
        eps=fields.number("layer_norm_eps", 1e-12),
        spread=fields.number("initializer_range", 0.02),
    )
    fields.refuse()
    return config


def _labels(fields: Fields) -> tuple[str, ...]:
    """The labels' names; where the config has none, LABEL_0 and on, two of them unless it says."""
    named = fields.table("id2label")
    numbers = [str(n) for n in range(len(named))]
    fits = named.keys() == set(numbers) and all(isinstance(x, str) for x in named.values())
    fields.expect(fits, f"id2label is not texts by the numbers from 0 to {len(named) - 1}")
    count = fields.whole("num_labels", len(named) or 2)
    return (
        tuple(named[n] for n in numbers) if fits and len(named) == count else generic_labels(count)
    )


def generic_labels(count: int) -> tuple[str, ...]:
    """The names that transformers gives labels without names."""
    return tuple(f"LABEL_{n}" for n in range(count))


def with_labels(config: Config, labels: tuple[str, ...]) -> Config:
    """The config of a classifier with `labels`; labels that have names of their own are kept."""
    ours, theirs = ([label.casefold() for label in x] for x in (config.labels, labels))
    if config.labels != generic_labels(len(config.labels)) and ours != theirs:
        raise InputError(
            f"the base model's head gives the labels {', '.join(config.labels)}, in this order, "
            f"not {', '.join(labels)}"
        )
    return replace(config, labels=labels)


_PLAIN: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "problem_type": ("single_label_classification", None),
}


def config_to_huggingface(config: Config) -> dict[str, Any]:
    """The `config.json` of this config, as transformers writes it."""
    return {
        "architectures": ["RobertaForSequenceClassification"],
        "model_type": "roberta",
        "hidden_act": config.activation,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context + config.padding + 1,
        "type_vocab_size": config.token_types,
        "pad_token_id": config.padding,
        "layer_norm_eps": config.eps,
        "initializer_range": config.spread,
        "id2label": {str(n): label for n, label in enumerate(config.labels)},
        "label2id": {label: n for n, label in enumerate(config.labels)},
        "problem_type": "single_label_classification",
    }


def table(config: Config) -> dict[str, Leaf]:
    """The family's weight table."""
    n, d, f, stem = config.layers, config.width, config.hidden, "roberta.embeddings"
    places = config.context + config.padding + 1
    leaves = {
        "embed": Leaf("VD", (config.vocabulary, d), f"{stem}.word_embeddings.weight"),
        "positions": Leaf("TD", (places, d), f"{stem}.position_embeddings.weight"),
        "token_types": Leaf("YD", (config.token_types, d), f"{stem}.token_type_embeddings.weight"),
        **biased("norm", Leaf("D", (d,), f"{stem}.LayerNorm.weight", norm=True)),
    }
    for path, axes, shape in (
        ("attention.self.query", "NDH", (n, d, d)),
        ("attention.self.key", "NDH", (n, d, d)),
        ("attention.self.value", "NDH", (n, d, d)),
        ("attention.output.dense", "NHD", (n, d, d)),
        ("attention.output.LayerNorm", "ND", (n, d)),
        ("intermediate.dense", "NDF", (n, d, f)),
        ("output.dense", "NFD", (n, f, d)),
        ("output.LayerNorm", "ND", (n, d)),
    ):
        name, norm = f"roberta.encoder.layer.{{n}}.{path}.weight", len(shape) == 2
        leaves |= biased(f"layers.{path}", Leaf(axes, shape, name, not norm, norm))
    return leaves | _head(config)


def _head(config: Config) -> dict[str, Leaf]:
    """The classification head; a checkpoint that has none gets a new one."""
    d, count, leaves = config.width, len(config.labels), {}
    for path, axes, shape in (
        ("classifier.dense", "DD", (d, d)),
        ("classifier.out_proj", "DL", (d, count)),
    ):
        name = f"{path}.weight"
        leaves |= biased(path, Leaf(axes, shape, name, transposed=True, new=config.spread))
    return leaves


def begin(config: Config, weights: Weights, x: Array, places: Places) -> tuple[Array, Any]:
    """The first layer's input, and the mask that all layers share: each sees its whole text."""
    x = x + learned_positions(weights["positions"], places, config.padding + 1)
    x = layer_norm(x + weights["token_types"][0], weights["norm"], weights["norm.bias"], config.eps)
    return x, places.whole_mask()


def layer(config: Config, mask: Any, x: Array, step: Layer) -> Array:
    """One transformer layer: attention and a feed-forward, each added and then normed."""

    def norm(path: str, x: Array) -> Array:
        return layer_norm(x, step.weights[path], step.weights[f"{path}.bias"], config.eps)

    split = (*x.shape[:-1], config.heads, config.head_width)
    together = step.project_all([f"attention.self.{p}" for p in ("query", "key", "value")], x)
    q, k, v = (y.reshape(split) for y in together)
    mixed = step.attend(q, k, v, mask).reshape(x.shape)
    x = norm("attention.output.LayerNorm", x + step.project("attention.output.dense", mixed))
    inner = ACTIVATIONS[config.activation](step.project("intermediate.dense", x))
    return norm("output.LayerNorm", x + step.project("output.dense", inner))


def finish(config: Config, weights: Weights, x: Array) -> Array:
    """The final hidden states: the last layer's output, which is normed already."""
    return x


def head(project: Callable[[str, Array], Array], x: Array) -> Array:
    """Logits (..., labels) from the hidden states (..., D) of texts' first tokens."""
    return project("classifier.out_proj", jnp.tanh(project("classifier.dense", x)))
