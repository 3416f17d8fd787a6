"""Adapters of every kind that PEFT makes, on a model of every family: read here, and saved again.

PEFT makes a random adapter of a random model; we load it and compute the same logits; what we save
of it PEFT loads without a warning and computes the same logits again.
"""

import warnings
from functools import partialmethod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import (
    ArrowConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    create_arrow_model,
)
from peft.tuners.lora.arrow import ArrowLoraLinearLayer

from compose.arrow import route_library
from compose.genknowsub import genknowsub
from compose.library import Library
from lora_jax import export, models, peft
from lora_jax.modules import init_lora

# transformers' classes and settings, and what the family calls its modules: two projections of the
# attention, the feed-forward's last, its embedding, its head, its layers, and its last norm.
LLAMA = "q_proj v_proj down_proj embed_tokens lm_head layers model.norm"
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
MODELS = {
    "llama": ("LlamaForCausalLM", {}, LLAMA),
    "llama, tied, biases": ("LlamaForCausalLM", BIASED, LLAMA),
    "mistral": ("MistralForCausalLM", {"sliding_window": 4}, LLAMA),
    "qwen2": ("Qwen2ForCausalLM", {}, LLAMA),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}, LLAMA),
    "phi3": (
        "Phi3ForCausalLM",
        {},
        "qkv_proj o_proj down_proj embed_tokens lm_head layers model.norm",
    ),
    "phi": (
        "PhiForCausalLM",
        {"num_key_value_heads": 4, "partial_rotary_factor": 0.75},
        "q_proj dense fc2 embed_tokens lm_head layers final_layernorm",
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {"head_dim": 8, "sliding_window": 4, "tie_word_embeddings": False},
        LLAMA,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"tie_word_embeddings": False},
        "c_attn attn.c_proj mlp.c_proj wte lm_head h ln_f",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_kv": 8, "d_ff": 40, "num_decoder_layers": 3, "pad_token_id": 0, "eos_token_id": 1},
        "q v wo - - block decoder.final_layer_norm",
    ),
    "roberta": (
        "RobertaForSequenceClassification",
        {"num_labels": 3, "pad_token_id": 1},
        "query value output.dense word_embeddings - layer roberta.embeddings.LayerNorm",
    ),
}
LORA = {"r": 3, "lora_alpha": 7}
# By name: the config's class, and its settings from what the family calls its modules.
OPTIONS = {
    "lora": lambda q, v, f, *_: LORA | {"target_modules": [q, f]},
    "rslora": lambda q, v, f, *_: LORA | {"use_rslora": True, "target_modules": [q, v]},
    "patterns": lambda q, v, f, e, h, n, _: (
        LORA
        | {"target_modules": [q, v, f]}
        | {
            "rank_pattern": {q: 5, rf"{n}\.[02]\..*{f}": 2},
            "alpha_pattern": {f"^.*{n}.1.*": 2, v: 9},
        }
    ),
    "dora": lambda q, v, f, *_: LORA | {"use_dora": True, "target_modules": [q, f]},
    "dora, rslora, patterns": lambda q, v, f, *_: (
        LORA
        | {"use_dora": True, "use_rslora": True, "target_modules": [q, f], "rank_pattern": {q: 2}}
    ),
    "lora_bias": lambda q, v, f, *_: LORA | {"lora_bias": True, "target_modules": [q, v]},
    "bias all": lambda q, v, f, *_: LORA | {"bias": "all", "target_modules": [q, v]},
    "bias lora_only": lambda q, v, f, *_: LORA | {"bias": "lora_only", "target_modules": [q, f]},
    "modules_to_save": lambda q, v, f, e, h, n, norm: (
        LORA | {"target_modules": [q], "modules_to_save": [norm, *({e, h} - {"-"})]}
    ),
    "a projection saved": lambda q, v, f, *_: (
        LORA | {"target_modules": [q], "modules_to_save": [f]}
    ),
    "embedding and head": lambda q, v, f, e, h, *_: (
        LORA | {"target_modules": [q, *({e, h} - {"-"})]}
    ),
    "embedding and head, dora": lambda q, v, f, e, h, *_: (
        LORA | {"target_modules": [q, *({e, h} - {"-"})], "use_dora": True}
    ),
    "some layers": lambda q, v, f, e, h, n, _: (
        LORA | {"target_modules": [q, v], "layers_to_transform": [0, 2], "layers_pattern": n}
    ),
    "one layer, dora": lambda q, v, f, *_: (
        LORA | {"target_modules": [q, v], "layers_to_transform": 1, "use_dora": True}
    ),
    "a pattern of targets": lambda q, v, f, e, h, n, _: (
        LORA
        | {
            "target_modules": rf".*\.{n}\.[12]\..*\.({q}|{f})",
            "exclude_modules": rf".*\.{n}\.2\..*{q}",
        }
    ),
    "all-linear": lambda *_: LORA | {"target_modules": "all-linear"},
    "ia3": lambda q, v, f, *_: {"target_modules": [v, f], "feedforward_modules": [f]},
    "ia3, its default": lambda *_: {},
    "ia3, a pattern": lambda q, v, f, e, h, n, _: {
        "target_modules": rf".*\.{n}\.[02]\..*({q}|{f})",
        "feedforward_modules": rf".*{f}",
    },
}
# PEFT has no default there.
IMPOSSIBLE = {("ia3, its default", name) for name in ("phi3", "qwen2", "qwen3")}
CASES = [
    (name, option)
    for name, (_, _, words) in MODELS.items()
    for option in OPTIONS
    if not ("embedding" in option and words.split()[3] == "-") and (option, name) not in IMPOSSIBLE
]


def settings_of(name, option):
    """PEFT's config of an option on a model."""
    words = MODELS[name][2].split()
    kind = IA3Config if option.startswith("ia3") else LoraConfig
    tasks = {"t5": "SEQ_2_SEQ_LM", "roberta": "SEQ_CLS"}
    settings = OPTIONS[option](*words) | {"task_type": tasks.get(name, "CAUSAL_LM")}
    if name == "gpt2":
        settings["fan_in_fan_out"] = True
    return kind(**settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory, random_torch, load):
    """A function from a model's name to its folder, our config and our weights."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("base")
            random_torch(*MODELS[name][:2]).save_pretrained(folder)
            made[name] = folder, *load(folder)
        return made[name]

    return make


def in_torch(folder):
    """The base in a folder, as transformers loads it."""
    kind = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens(random_tokens):
    return np.asarray(random_tokens(2, 7)) % 60 + 2


def in_tensors(model, tokens):
    """A torch model's logits: of tokens, of labels, or of a decoder that reads the same tokens."""
    given = {"input_ids": torch.tensor(tokens)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"]
    return model(**given).logits


def theirs(model, tokens):
    """The same as an array."""
    with torch.no_grad():
        return in_tensors(model, tokens).numpy()


@pytest.fixture(scope="module")
def run(outputs):
    return jax.jit(outputs, static_argnums=0)


def loaded_by_peft(folder, adapter):
    """The base in a folder under an adapter's, as PEFT loads it, and the warnings it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(in_torch(folder), adapter).eval()
    return model, {str(warning.message) for warning in caught}


@pytest.mark.filterwarnings("ignore")  # what PEFT says while it makes an adapter
@pytest.mark.parametrize(("name", "option"), CASES)
def test_an_adapter_of_pefts_comes_and_goes(
    tmp_path, base, run, with_modules, tokens, agree, name, option
):
    folder, config, weights = base(name)
    size = 0.3 if option.startswith("ia3") else 0.1
    model = with_modules(in_torch(folder), settings_of(name, option), size)
    want = theirs(model, tokens)
    assert np.abs(want - theirs(in_torch(folder), tokens)).max() > 0.02
    model.save_pretrained(tmp_path / "theirs")
    adapter = peft.load_adapter(tmp_path / "theirs", config)
    agree(f"{name}, {option}", run(config, weights, adapter, tokens), want, 1e-4)

    peft.save_adapter(tmp_path / "ours", adapter, config, base_name=str(folder))
    again, told = loaded_by_peft(folder, tmp_path / "ours")
    assert told <= loaded_by_peft(folder, tmp_path / "theirs")[1]  # what it says of its own
    known = ("tie_word_embeddings", "is_gradient_checkpointing", "has no bias")
    heads = ("fan_in_fan_out is set to True",) if "head" in option else ()
    assert not [text for text in told if not any(k in text for k in (*known, *heads))]
    agree(f"{name}, {option}, saved again", theirs(again, tokens), want, 1e-4)


@pytest.fixture
def adapted(tmp_path, base, with_modules):
    """A function from a case to the torch model under an adapter, and ours: config and so on."""

    def make(name, option):
        folder, config, weights = base(name)
        model = with_modules(in_torch(folder), settings_of(name, option), 0.1)
        model.save_pretrained(tmp_path / "theirs")
        return model, config, weights, peft.load_adapter(tmp_path / "theirs", config)

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", ["all-linear", "dora", "ia3", "modules_to_save"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_torchs(adapted, outputs, tokens, agree_on_gradients, name, option):
    model, config, weights, adapter = adapted(name, option)

    @jax.jit
    @jax.value_and_grad
    def loss(adapter):
        return jnp.mean(jnp.square(outputs(config, weights, adapter, tokens)))

    wanted = in_tensors(model, tokens).square().mean()
    agree_on_gradients(f"{name}, {option}", config, loss(adapter), wanted, model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", ["all-linear", "dora", "ia3", "modules_to_save"])
@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_is_transformers_own(tmp_path, base, adapted, tokens, agree, name, option):
    model, _, _, adapter = adapted(name, option)
    export.save_merged(tmp_path / "whole", str(base(name)[0]), adapter)
    kind = type(in_torch(base(name)[0]))
    whole, told = kind.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(told.values())
    agree(f"{name}, {option}, merged", theirs(whole.eval(), tokens), theirs(model, tokens), 1e-4)


ROUTED = [name for name in MODELS if name not in ("llama, tied, biases", "roberta")]


@pytest.mark.filterwarnings("ignore")  # what PEFT says while it loads adapters
@pytest.mark.parametrize("general", [False, True], ids=["Arrow", "GenKnowSub"])
@pytest.mark.parametrize("name", ROUTED)
def test_routing_on_every_familys_targets(
    tmp_path, monkeypatch, base, run, tokens, agree, name, general
):
    """PEFT is given as many power iterations as its prototypes take to settle."""
    settle = partialmethod(ArrowLoraLinearLayer.top_right_singular_vec_from_BA, iters=2000)
    monkeypatch.setattr(ArrowLoraLinearLayer, "top_right_singular_vec_from_BA", settle)
    folder, config, weights = base(name)

    def adapters(count, seed, size):
        for n in range(seed, seed + count):
            key = jax.random.key(n)
            made = init_lora(
                key,
                models.projections(config),
                targets=models.default_targets(config),
                rank=2,
                alpha=4.0,
            )
            for m, (path, module) in enumerate(made.items()):
                b = size * jax.random.normal(jax.random.fold_in(key, m), module.b.shape)
                made[path] = module.replace(b=b)
            peft.save_adapter(tmp_path / str(n), made, config)
            yield made

    tasks, generals = list(adapters(3, 0, 0.3)), list(adapters(2, 10, 0.1))
    library = Library(("a", "b", "c"), tuple(tasks))
    if general:
        library = genknowsub(library, generals, space="factor")
    routed = route_library(library, top_k=2)
    model = create_arrow_model(
        in_torch(folder),
        [str(tmp_path / str(n)) for n in range(3)],
        ArrowConfig(top_k=2, use_gks=general, rng_seed=0),
        [str(tmp_path / str(n)) for n in (10, 11)] if general else None,
    ).eval()
    found = run(config, weights, routed, tokens)
    assert np.abs(found - run(config, weights, {}, tokens)).max() > 0.02
    how = "GenKnowSub + Arrow" if general else "Arrow"
    agree(f"{name}, {how}", found, theirs(model, tokens), 1e-4)
