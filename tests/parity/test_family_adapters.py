"""LoRA and IA3 to and from PEFT on the families whose projections are not as Llama's."""

import numpy as np
import pytest
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from lora_jax import merge, models, peft

MODELS = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "phi": ("PhiForCausalLM", {"num_key_value_heads": 4}),
    "phi3": ("Phi3ForCausalLM", {"rope_theta": 500.0}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 12,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 20,
        },
    ),
}


def lora(targets, **options):
    return LoraConfig(task_type="CAUSAL_LM", lora_alpha=7, target_modules=targets, **options)


def ia3(targets, feedforward, **options):
    kinds = {"target_modules": targets, "feedforward_modules": feedforward}
    return IA3Config(task_type="CAUSAL_LM", **kinds, **options)


CONV = {"fan_in_fan_out": True}  # else PEFT warns, and sets it
ADAPTERS = {
    "gpt2": {
        "LoRA on c_attn": lora(["c_attn"], r=3, **CONV),
        "LoRA on all, rslora": lora(["c_attn", "c_proj", "c_fc"], r=4, use_rslora=True, **CONV),
        "LoRA on one of the c_proj": lora(["attn.c_proj"], r=2, **CONV),
        "LoRA, all-linear": lora("all-linear", r=2, **CONV),
        "IA3, PEFT's layout": ia3(["c_attn", "mlp.c_proj"], ["mlp.c_proj"], **CONV),
        "IA3, the PEM paper's layout": ia3(["c_attn", "c_fc"], [], **CONV),
    },
    "phi": {
        "LoRA on q, k, v and dense": lora(["q_proj", "k_proj", "v_proj", "dense"], r=3),
        "LoRA on PEFT's targets": lora(["q_proj", "v_proj", "fc1", "fc2"], r=4),
        "IA3, PEFT's layout": ia3(["q_proj", "v_proj", "fc2"], ["fc2"]),
        "IA3, the PEM paper's layout": ia3(["k_proj", "v_proj", "fc1"], []),
    },
    "phi3": {
        "LoRA on qkv and o": lora(["qkv_proj", "o_proj"], r=3),
        "LoRA on all": lora("all-linear", r=2),
        "IA3": ia3(["qkv_proj", "down_proj"], ["down_proj"]),
    },
    "gemma3": {
        "LoRA on attention": lora(["q_proj", "k_proj", "v_proj", "o_proj"], r=3),
        "LoRA on all": lora("all-linear", r=2, use_rslora=True),
        "IA3, PEFT's choice": IA3Config(task_type="CAUSAL_LM"),
    },
}
CASES = [(name, kind) for name in MODELS for kind in ADAPTERS[name]]


@pytest.fixture
def rows(random_tokens):
    return np.asarray(random_tokens(2, 24)) % 96


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_peft_saves_changes_the_model_alike(
    tmp_path, name, kind, pair, with_modules, rows, logits, torch_logits, torch_model, agree
):
    theirs, config, weights = pair(*MODELS[name])
    before = torch_logits(theirs, rows)
    model = with_modules(theirs, ADAPTERS[name][kind], size=0.1)
    model.save_pretrained(tmp_path / "adapter")
    adapter = peft.load_adapter(tmp_path / "adapter", config)
    after = torch_logits(model, rows)
    assert np.abs(after - before).max() > 0.1
    agree(f"{name}, {kind}", logits(config, weights, adapter, rows), after, 1e-4)
    peft.save_adapter(tmp_path / "ours", adapter, config)
    again = PeftModel.from_pretrained(torch_model(tmp_path / "theirs"), tmp_path / "ours")
    agree(f"{name}, {kind}, saved by us", torch_logits(again, rows), after, 1e-5)
    merged = merge.merge(weights, adapter)
    whole = torch_logits(model.merge_and_unload(), rows)
    agree(f"{name}, {kind}, merged", logits(config, merged, {}, rows), whole, 1e-4)


OURS = [(name, kind) for name in MODELS for kind in ("LoRA", "LoRA on all", "peft", "pem")]
OURS.remove(("phi3", "pem"))  # whose keys have no place of their own


@pytest.mark.parametrize(("name", "kind"), OURS)
def test_a_module_of_ours_changes_pefts_model_alike(
    tmp_path, name, kind, pair, rows, logits, torch_logits, random_lora, random_ia3, agree
):
    theirs, config, weights = pair(*MODELS[name])
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
        ("phi3", "LoRA on all"),
        ("gemma3", "LoRA on attention"),
        ("gemma3", "IA3, PEFT's choice"),
    ],
)
def test_gradients(tmp_path, name, kind, pair, with_modules, rows, agree_on_next_tokens):
    theirs, config, weights = pair(*MODELS[name])
    model = with_modules(theirs, ADAPTERS[name][kind], size=0.1)
    model.save_pretrained(tmp_path / "adapter")
    adapter = peft.load_adapter(tmp_path / "adapter", config)
    agree_on_next_tokens(f"{name}, {kind}", config, weights, adapter, rows, model)


def test_gemmas_ia3_rescales_what_peft_chooses(pair):
    model, config, _ = pair(*MODELS["gemma3"])
    chosen = get_peft_model(model, IA3Config(task_type="CAUSAL_LM")).peft_config["default"]
    ours = models.ia3_layouts(config)["peft"]
    assert {path.rsplit(".", 1)[-1] for path in ours} == chosen.target_modules
    fed = {path.rsplit(".", 1)[-1] for path, side in ours.items() if side == "input"}
    assert fed == chosen.feedforward_modules
