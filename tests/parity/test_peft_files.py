"""What else PEFT writes, DoRA's gradients as torch has them, and a merged model in transformers."""

import jax
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lora_jax import checkpoint, export, models, peft, tokens
from lora_jax.merge import merge
from lora_jax.modules import DoRA

LLAMA = {
    "vocab_size": 264,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LORA = {"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM"}
TARGETS = {"target_modules": ["q_proj", "down_proj"]}

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT says while it makes an adapter


@pytest.fixture
def base(tmp_path):
    """A function from settings to a random Llama in torch, and our config and weights of it."""

    def make(**settings):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | settings)).eval()
        model.save_pretrained(tmp_path / "base")
        config = checkpoint.read_config(tmp_path / "base")
        return model, config, checkpoint.load_weights(tmp_path / "base", config)

    return make


def under(model, **settings):
    """The model under a random adapter of PEFT's making."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**LORA | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def rows(random_tokens):
    return np.asarray(random_tokens(2, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin, as before 1.6"])
def test_files_of_every_kind(tmp_path, base, rows, logits, torch_logits, agree, dtype, kind):
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
    tmp_path, base, rows, logits, torch_logits, agree, settings, both
):
    model, config, weights = base(tie_word_embeddings=True)
    model = under(model, ensure_weight_tying=both, **settings)
    model.save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", config)
    assert ("unembed" in adapter) == both
    agree("tied", logits(config, weights, adapter, rows), torch_logits(model, rows), 1e-4)


def test_doras_gradients(tmp_path, base, rows, report):
    """Of a loss over the logits, by every tensor that is trained: within 1e-4 of the largest."""
    model, config, weights = base()
    model = under(model, use_dora=True, **TARGETS)
    model.save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", config)
    model(torch.tensor(rows)).logits.square().sum().backward()

    def loss(adapter):
        hidden = models.forward(config, weights, adapter, rows).hidden
        return (models.unembed(config, weights, adapter, hidden) ** 2).sum()

    ours = jax.jit(jax.grad(loss))(adapter)
    layers = model.base_model.model.model.layers
    for path, got in ours.items():
        assert isinstance(got, DoRA)
        found = [layer.get_submodule(path) for layer in layers]
        wanted = {
            "a": [m.lora_A["default"].weight.grad.T for m in found],
            "b": [m.lora_B["default"].weight.grad.T for m in found],
            "magnitude": [m.lora_magnitude_vector["default"].weight.grad for m in found],
        }
        for name, tensors in wanted.items():
            want = torch.stack(tensors).numpy()
            apart = np.abs(getattr(got, name) - want).max() / np.abs(want).max()
            report(f"gradient of DoRA's {name} at {path}: {apart:.1e} apart (within 1e-4)")
            assert apart <= 1e-4


def test_a_merged_dora_is_pefts(tmp_path, base, rows, logits, torch_logits, agree):
    model, config, weights = base()
    model = under(model, use_dora=True, target_modules=["q_proj", "down_proj", "lm_head"])
    model.save_pretrained(tmp_path / "a")
    merged = merge(weights, peft.load_adapter(tmp_path / "a", config))
    want = torch_logits(model.merge_and_unload(), rows)
    agree("DoRA, merged", logits(config, merged, {}, rows), want, 1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_is_transformers_own(
    tmp_path, base, base_folder, rows, torch_model, torch_logits, agree, tied
):
    """With its tokenizer, its settings, and the type of the base."""
    model, config, _ = base(tie_word_embeddings=tied)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((base_folder / name).read_bytes())
    model = under(model, target_modules=["embed_tokens", "v_proj", "lm_head"])
    model.save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", config)
    export.save_merged(tmp_path / "whole", str(tmp_path / "base"), adapter)
    found = torch_model(tmp_path / "whole")
    assert found.config.tie_word_embeddings is False
    assert (found.config.eos_token_id, found.config.bos_token_id) == (2, 1)
    agree(f"merged, tied {tied}", torch_logits(found, rows), torch_logits(model, rows), 1e-4)
    assert tokens.encode(tokens.load_tokenizer(tmp_path / "whole"), ["hi"])
    transformers.AutoTokenizer.from_pretrained(tmp_path / "whole")


def test_a_merged_model_is_of_the_bases_type(tmp_path, base):
    model, config, _ = base()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = under(model, **TARGETS)
    model.save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", config)
    export.save_merged(tmp_path / "whole", str(tmp_path / "base"), adapter)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
