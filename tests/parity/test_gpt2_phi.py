"""GPT-2 and Phi against transformers and PEFT on torch: random models saved there, read here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from lora_jax import checkpoint, merge, models, peft
from lora_jax.modules import IA3, LoRA
from lora_jax.table import kernels

GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
PHI = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "gpt2": GPT2,
    "gpt2, relu, n_inner 40": GPT2 | {"activation_function": "relu", "n_inner": 40},
    "gpt2, logits not scaled": GPT2 | {"scale_attn_weights": False},
    "gpt2, scaled by layer": GPT2
    | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "gpt2, untied": GPT2 | {"tie_word_embeddings": False},
    "phi": PHI,
    "phi, a rotary quarter, shared keys": PHI
    | {"partial_rotary_factor": 0.25, "rope_theta": 5e4, "num_key_value_heads": 2},
    "phi, normed queries and keys": PHI | {"qk_layernorm": True},
    "phi, tied, exact gelu": PHI | {"tie_word_embeddings": True, "hidden_act": "gelu"},
}
BOTH = ("gpt2", "phi")


def random_torch(name, seed=0):
    """A random model; its biases and gains too, which transformers starts at zero and one."""
    torch.manual_seed(seed)
    family = "GPT2" if name.startswith("gpt2") else "Phi"
    head = "GPT2LMHeadModel" if family == "GPT2" else "PhiForCausalLM"
    config = getattr(transformers, f"{family}Config")(**MODELS[name], initializer_range=0.2)
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def pair(tmp_path):
    """A function from a model's name to it in torch, and to its config and weights here."""

    def make(name):
        model = random_torch(name)
        model.save_pretrained(tmp_path / "theirs")
        config = checkpoint.read_config(tmp_path / "theirs")
        return model, config, checkpoint.load_weights(tmp_path / "theirs", config)

    return make


@pytest.fixture
def rows(random_tokens):
    return np.asarray(random_tokens(2, 24)) % 96


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_computes_the_same_here(
    name, pair, rows, logits, torch_logits, agree
):
    model, config, weights = pair(name)
    agree(name, logits(config, weights, {}, rows), torch_logits(model, rows), 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_we_save_computes_the_same_there(
    tmp_path, name, pair, rows, logits, torch_logits, torch_model, agree
):
    _, config, weights = pair(name)
    checkpoint.save_model(tmp_path / "ours", config, weights)
    theirs = torch_logits(torch_model(tmp_path / "ours"), rows)
    agree(f"{name}, saved by us", logits(config, weights, {}, rows), theirs, 1e-4)


def test_a_gpt2_without_its_prefix_and_with_its_masks(tmp_path, pair, rows, logits, agree):
    """As the first checkpoints were stored: bare names, and a causal mask in every layer."""
    from safetensors.numpy import load_file, save_file

    _, config, weights = pair("gpt2")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = {k.removeprefix("transformer."): t for k, t in load_file(path).items()}
    tensors |= {f"h.{n}.attn.bias": np.ones((1, 1, 64, 64), np.float32) for n in range(3)}
    tensors |= {f"h.{n}.attn.masked_bias": np.float32([-1e4]) for n in range(3)}
    save_file(tensors, path)
    bare = checkpoint.load_weights(tmp_path / "theirs", config)
    ours, again = (logits(config, w, {}, rows) for w in (weights, bare))
    agree("gpt2 without its prefix", again, ours, 0)


@pytest.mark.parametrize("name", BOTH)
def test_left_padding(name, pair, rows, logits, torch_logits, agree):
    model, config, weights = pair(name)
    real = np.arange(24) >= np.array([[0], [9]])
    theirs = torch_logits(
        model,
        rows,
        attention_mask=torch.tensor(real.astype(np.int64)),
        position_ids=torch.tensor(np.maximum(np.cumsum(real, axis=1) - 1, 0)),
    )
    ours = logits(config, weights, {}, rows, segments=jnp.asarray(real, jnp.int32))
    agree(f"{name}, padded on the left", ours[real], theirs[real], 1e-4)


@pytest.mark.parametrize("name", BOTH)
def test_packed_texts_are_each_as_alone_in_torch(name, pair, rows, logits, torch_logits, agree):
    model, config, weights = pair(name)
    segments = jnp.asarray([[1] * 7 + [2] * 11 + [3] * 6])
    ours = logits(config, weights, {}, rows[:1], segments=segments)
    parts = np.split(rows[:1], [7, 18], axis=1)
    theirs = np.concatenate([torch_logits(model, part) for part in parts], axis=1)
    agree(f"{name}, packed", ours, theirs, 1e-4)


@pytest.mark.parametrize("name", [*BOTH, "gpt2, scaled by layer", "phi, normed queries and keys"])
def test_step_by_step_through_the_cache(name, pair, rows, torch_logits, agree):
    model, config, weights = pair(name)
    cache, seen = models.new_cache(config, 2, 24), []
    step = jax.jit(lambda tokens, cache: models.forward(config, weights, {}, tokens, cache=cache))
    for start in range(0, 24, 4):
        out = step(rows[:, start : start + 4], cache)
        cache = out.cache
        seen.append(models.unembed(config, weights, {}, out.hidden))
    agree(f"{name}, cached", np.concatenate(seen, 1), torch_logits(model, rows), 1e-4)


def lora(targets, **settings):
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, lora_alpha=7, **settings)


def ia3(targets, feedforward):
    kinds = {"target_modules": targets, "feedforward_modules": feedforward}
    return IA3Config(task_type="CAUSAL_LM", **kinds)


CONV = {"fan_in_fan_out": True}  # else PEFT warns, and sets it
ADAPTERS = {
    "gpt2": {
        "LoRA on c_attn": lambda: lora(["c_attn"], r=3, **CONV),
        "LoRA on all, rslora": lambda: lora(
            ["c_attn", "c_proj", "c_fc"], r=4, use_rslora=True, **CONV
        ),
        "LoRA on one of the c_proj": lambda: lora(["attn.c_proj"], r=2, **CONV),
        "LoRA, all-linear": lambda: lora("all-linear", r=2, **CONV),
        "IA3, PEFT's layout": lambda: IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            **CONV,
        ),
        "IA3, the PEM paper's layout": lambda: IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["c_attn", "c_fc"],
            feedforward_modules=[],
            **CONV,
        ),
    },
    "phi": {
        "LoRA on q, k, v and dense": lambda: lora(["q_proj", "k_proj", "v_proj", "dense"], r=3),
        "LoRA on PEFT's targets": lambda: lora(["q_proj", "v_proj", "fc1", "fc2"], r=4),
        "IA3, PEFT's layout": lambda: ia3(["q_proj", "v_proj", "fc2"], ["fc2"]),
        "IA3, the PEM paper's layout": lambda: ia3(["k_proj", "v_proj", "fc1"], []),
    },
}
CASES = [(name, kind) for name in BOTH for kind in ADAPTERS[name]]


def shaken(model, settings):
    """The model under a new adapter whose every module has random values."""
    model = get_peft_model(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_l" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_peft_saves_changes_the_model_alike(
    tmp_path, name, kind, pair, rows, logits, torch_logits, agree
):
    theirs, config, weights = pair(name)
    before = torch_logits(theirs, rows)
    model = shaken(theirs, ADAPTERS[name][kind]())
    model.save_pretrained(tmp_path / "adapter")
    adapter = peft.load_adapter(tmp_path / "adapter", config)
    after = torch_logits(model, rows)
    assert np.abs(after - before).max() > 0.1
    agree(f"{name}, {kind}", logits(config, weights, adapter, rows), after, 1e-4)
    merged = merge.merge(weights, adapter)
    whole = torch_logits(model.merge_and_unload(), rows)
    agree(f"{name}, {kind}, merged", logits(config, merged, {}, rows), whole, 1e-4)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("kind", ["LoRA", "LoRA on all", "peft", "pem"])
def test_a_module_of_ours_changes_pefts_model_alike(
    tmp_path, name, kind, pair, rows, logits, torch_logits, random_lora, random_ia3, agree
):
    theirs, config, weights = pair(name)
    if kind.startswith("LoRA"):
        targets = models.default_targets(config) if kind == "LoRA" else ["all-linear"]
        adapter = random_lora(config, targets=targets)
    else:
        adapter = random_ia3(config, layout=kind)
    peft.save_adapter(tmp_path / "adapter", adapter, config)
    model = PeftModel.from_pretrained(theirs, tmp_path / "adapter")  # a missing key is a warning
    ours = logits(config, weights, adapter, rows)
    agree(f"{name}, {kind} to PEFT", ours, torch_logits(model, rows), 1e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt2", "LoRA on all, rslora"),
        ("gpt2", "IA3, PEFT's layout"),
        ("phi", "LoRA on q, k, v and dense"),
        ("phi", "IA3, PEFT's layout"),
    ],
)
def test_gradients(tmp_path, name, kind, pair, rows, agree):
    """Of the mean cross-entropy of the next token, by the adapter's every tensor."""
    theirs, config, weights = pair(name)
    model = shaken(theirs, ADAPTERS[name][kind]())
    model.save_pretrained(tmp_path / "adapter")
    adapter = peft.load_adapter(tmp_path / "adapter", config)

    def loss(adapter):
        states = models.forward(config, weights, adapter, jnp.asarray(rows)).hidden[:, :-1]
        chances = jax.nn.log_softmax(models.unembed(config, weights, {}, states))
        return -jnp.mean(jnp.take_along_axis(chances, rows[:, 1:, None], axis=-1))

    value, gradients = jax.jit(jax.value_and_grad(loss))(adapter)
    labels = torch.tensor(rows).long()
    out = model(labels, labels=labels)
    out.loss.backward()
    agree(f"{name}, {kind}, loss", value, out.loss.item(), 1e-5)
    found = {n.replace(".default", ""): p.grad for n, p in model.named_parameters()}
    pairs = list(_paired(gradients, found, kernels(models.table(config))))
    assert len(pairs) == sum(gradient is not None for gradient in found.values())
    scaled = [[tensor.ravel() / np.abs(b).max() for tensor in (a, b)] for a, b in pairs]
    ours, torchs = (np.concatenate(side) for side in zip(*scaled, strict=True))
    agree(f"{name}, {kind}, gradients, each over its tensor's largest", ours, torchs, 1e-4)


def _paired(gradients, found, leaves):
    """Our gradients and torch's, tensor by tensor, in PEFT's orientation."""
    for path, module in gradients.items():
        for layer, name in enumerate(leaves[path].names()):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            match module:
                case LoRA(a, b):
                    yield np.asarray(a[layer].T), found[f"{stem}.lora_A.weight"].numpy()
                    yield np.asarray(b[layer].T), found[f"{stem}.lora_B.weight"].numpy()
                case IA3(offset):
                    yield np.asarray(offset[layer]), found[f"{stem}.ia3_l"].numpy().reshape(-1)
