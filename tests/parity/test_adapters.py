"""LoRA and IA3 in PEFT's format, made by PEFT and read here, and the other way round."""

import numpy as np
import pytest
from peft import IA3Config, LoraConfig, PeftModel

from lora_jax import merge, peft

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORAS = {
    "alpha unlike rank": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "rslora on all": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ALL},
    "patterns": {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 5, "layers.1.self_attn.v_proj": 2},
        "alpha_pattern": {"mlp.up_proj": 2, "layers.0.self_attn.k_proj": 9},
    },
    "patterns and rslora": {
        "r": 2,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": ["o_proj"],
        "rank_pattern": {"o_proj": 4},
    },
    "a pattern of targets": {"r": 2, "lora_alpha": 3, "target_modules": r".*\.(gate|down)_proj"},
    "all-linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
}
IA3S = {
    "PEFT's layout": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "the PEM paper's layout": {
        "target_modules": ["k_proj", "v_proj", "up_proj"],
        "feedforward_modules": [],
    },
    "a pattern of feed-forwards": {
        "target_modules": ["o_proj", "down_proj"],
        "feedforward_modules": r".*\.(o|down)_proj",
    },
}


@pytest.fixture
def theirs(base_folder, torch_model):
    """The tiny model in torch."""
    return torch_model(base_folder)


@pytest.fixture
def rows(random_tokens):
    return np.asarray(random_tokens(2, 12))


def peft_config(kind, settings):
    return (LoraConfig if kind == "LoRA" else IA3Config)(task_type="CAUSAL_LM", **settings)


CASES = [("LoRA", name) for name in LORAS] + [("IA3", name) for name in IA3S]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_what_peft_saves_changes_the_model_alike(
    tmp_path, config, weights, theirs, rows, logits, torch_logits, with_modules, kind, name, agree
):
    settings = (LORAS if kind == "LoRA" else IA3S)[name]
    before = torch_logits(theirs, rows)
    model = with_modules(theirs, peft_config(kind, settings))
    model.save_pretrained(tmp_path)
    adapter = peft.load_adapter(tmp_path, config)
    after = torch_logits(model, rows)
    assert np.abs(after - before).max() > 0.1
    agree(f"{kind} from PEFT, {name}", logits(config, weights, adapter, rows), after, 1e-4)
    merged = merge.merge(weights, adapter)
    whole = torch_logits(model.merge_and_unload(), rows)
    agree(f"{kind} merged, {name}", logits(config, merged, {}, rows), whole, 1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alpha unlike rank", {"rank": 3, "alpha": 7.0, "targets": ["q_proj", "v_proj"]}),
        ("rslora on all", {"rank": 5, "alpha": 2.0, "targets": ALL, "rslora": True}),
    ],
)
def test_a_lora_of_ours_changes_pefts_model_alike(
    tmp_path, config, weights, theirs, rows, logits, torch_logits, random_lora, name, options, agree
):
    adapter = random_lora(config, **options)
    peft.save_adapter(tmp_path / "a", adapter, config)
    model = PeftModel.from_pretrained(theirs, tmp_path / "a")  # a missing key is a warning
    ours = logits(config, weights, adapter, rows)
    agree(f"LoRA to PEFT, {name}", ours, torch_logits(model, rows), 1e-4)


def test_a_lora_of_unequal_parts_changes_pefts_model_alike(
    tmp_path, config, weights, theirs, rows, logits, torch_logits, random_lora, agree
):
    adapter = random_lora(config, rank=3, alpha=7.0, targets=["q_proj", "down_proj"])
    adapter |= random_lora(config, rank=5, alpha=2.0, targets=["v_proj"])
    adapter |= random_lora(config, rank=3, alpha=1.0, targets=["up_proj"])
    peft.save_adapter(tmp_path / "a", adapter, config)
    model = PeftModel.from_pretrained(theirs, tmp_path / "a")
    ours = logits(config, weights, adapter, rows)
    agree("LoRA to PEFT, unequal ranks and scales", ours, torch_logits(model, rows), 1e-4)


@pytest.mark.parametrize("layout", ["peft", "pem"])
def test_an_ia3_of_ours_changes_pefts_model_alike(
    tmp_path, config, weights, theirs, rows, logits, torch_logits, random_ia3, layout, agree
):
    adapter = random_ia3(config, layout=layout)
    peft.save_adapter(tmp_path / "a", adapter, config)
    model = PeftModel.from_pretrained(theirs, tmp_path / "a")
    ours = logits(config, weights, adapter, rows)
    agree(f"IA3 to PEFT, layout {layout}", ours, torch_logits(model, rows), 1e-4)


def test_what_peft_saves_comes_back_bit_for_bit(tmp_path, config, theirs, with_modules):
    """PEFT's file, read and written by us, holds the same tensors."""
    from safetensors.numpy import load_file

    model = with_modules(theirs, peft_config("LoRA", LORAS["alpha unlike rank"]))
    model.save_pretrained(tmp_path / "theirs")
    adapter = peft.load_adapter(tmp_path / "theirs", config)
    peft.save_adapter(tmp_path / "ours", adapter, config)
    one, other = (load_file(tmp_path / d / peft.WEIGHTS) for d in ("theirs", "ours"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("LoRA", "alpha unlike rank"), ("LoRA", "rslora on all"), ("IA3", "PEFT's layout")],
)
def test_gradients(
    tmp_path, config, weights, theirs, rows, with_modules, agree_on_next_tokens, kind, name
):
    settings = (LORAS if kind == "LoRA" else IA3S)[name]
    model = with_modules(theirs, peft_config(kind, settings))
    model.save_pretrained(tmp_path)
    adapter = peft.load_adapter(tmp_path, config)
    agree_on_next_tokens(f"{kind}, {name}", config, weights, adapter, rows, model)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LoRA", {"r": 4, "lora_alpha": 10, "target_modules": ALL}),
        (
            "LoRA",
            {"r": 8, "lora_alpha": 10, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        ),
        ("IA3", IA3S["PEFT's layout"]),
    ],
)
def test_the_real_model(
    tmp_path, smollm, torch_smollm, rows, logits, torch_logits, with_modules, kind, settings, agree
):
    model = with_modules(torch_smollm, peft_config(kind, settings), size=0.02)
    model.save_pretrained(tmp_path)
    adapter = peft.load_adapter(tmp_path, smollm.config)
    ours = logits(smollm.config, smollm.weights, adapter, rows)
    name = f"SmolLM2 under {kind} {'rslora' if settings.get('use_rslora') else ''}".strip()
    agree(name, ours, torch_logits(model, rows), 1e-3)
