"""What else PEFT writes, DoRA's gradients as torch has them, and a merged model in transformers."""

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig

from lora_jax import export, peft, tokens
from lora_jax.merge import merge
from lora_jax.modules import DoRA

LLAMA = {
    "vocab_size": 264,
    "num_hidden_layers": 2,
    "attention_bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LORA = {"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM"}
TARGETS = {"target_modules": ["q_proj", "down_proj"]}

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT says while it makes an adapter


@pytest.fixture
def base(pair):
    """A function from settings to a random Llama in torch, and our config and weights of it."""
    return lambda **settings: pair("LlamaForCausalLM", LLAMA | settings)


@pytest.fixture
def under(with_modules):
    """A function that puts a random adapter of PEFT's making on a model."""
    return lambda model, **settings: with_modules(model, LoraConfig(**LORA | settings), size=0.1)


@pytest.fixture
def rows(random_tokens):
    return np.asarray(random_tokens(2, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin, as before 1.6"])
def test_files_of_every_kind(tmp_path, base, under, rows, logits, torch_logits, agree, dtype, kind):
    model, config, weights = base()
    model = under(model, use_dora=True, modules_to_save=["lm_head"], **TARGETS)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype).float()  # what the file will hold
    want = torch_logits(model, rows)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype) if parameter.requires_grad else parameter.data
    model.save_pretrained(tmp_path / "a", safe_serialization=kind == "safetensors")
    if kind == "bin, as before 1.6":
        path = tmp_path / "a" / "adapter_model.bin"
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    adapter = peft.load_adapter(tmp_path / "a", config)
    agree(f"{kind}, {dtype}", logits(config, weights, adapter, rows), want, 1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["embed_tokens"]} | TARGETS,
    ],
)
@pytest.mark.parametrize("both", [True, False])
def test_a_tied_embedding_for_one_or_for_both(
    tmp_path, base, under, rows, logits, torch_logits, agree, settings, both
):
    model, config, weights = base(tie_word_embeddings=True)
    model = under(model, ensure_weight_tying=both, **settings)
    model.save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", config)
    assert ("unembed" in adapter) == both
    agree("tied", logits(config, weights, adapter, rows), torch_logits(model, rows), 1e-4)


def test_doras_gradients(tmp_path, base, under, rows, agree_on_next_tokens):
    model, config, weights = base()
    model = under(model, use_dora=True, **TARGETS)
    model.save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", config)
    assert all(isinstance(module, DoRA) for module in adapter.values())
    agree_on_next_tokens("DoRA", config, weights, adapter, rows, model)


def test_a_merged_dora_is_pefts(tmp_path, base, under, rows, logits, torch_logits, agree):
    model, config, weights = base()
    model = under(model, use_dora=True, target_modules=["q_proj", "down_proj", "lm_head"])
    model.save_pretrained(tmp_path / "a")
    merged = merge(weights, peft.load_adapter(tmp_path / "a", config))
    want = torch_logits(model.merge_and_unload(), rows)
    agree("DoRA, merged", logits(config, merged, {}, rows), want, 1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_is_transformers_own(
    tmp_path, base, under, base_folder, rows, torch_model, torch_logits, agree, tied
):
    """With its tokenizer, its settings, and the type of the base."""
    model, config, _ = base(tie_word_embeddings=tied)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "theirs" / name).write_bytes((base_folder / name).read_bytes())
    model = under(model, target_modules=["embed_tokens", "v_proj", "lm_head"])
    model.save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", config)
    export.save_merged(tmp_path / "whole", str(tmp_path / "theirs"), adapter)
    found = torch_model(tmp_path / "whole")
    assert found.config.tie_word_embeddings is False
    assert (found.config.eos_token_id, found.config.bos_token_id) == (2, 1)
    agree(f"merged, tied {tied}", torch_logits(found, rows), torch_logits(model, rows), 1e-4)
    assert tokens.encode(tokens.load_tokenizer(tmp_path / "whole"), ["hi"])
    transformers.AutoTokenizer.from_pretrained(tmp_path / "whole")


def test_a_merged_model_is_of_the_bases_type(tmp_path, base, under):
    model, config, _ = base()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    model = under(model, **TARGETS)
    model.save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", config)
    export.save_merged(tmp_path / "whole", str(tmp_path / "theirs"), adapter)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
