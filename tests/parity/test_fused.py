"""One model with its projections fused and apart, in torch both ways, and PEFT's adapters of each.

A Phi-3 is a LLaMA whose q, k, v and gate, up are one kernel each: with the same numbers in them the
two give the same logits, and so must an adapter that was made for the other.
"""

import copy

import pytest
from peft import IA3Config, LoraConfig, PeftModel

from lora_jax import peft

APART = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "gate_up_proj", "down_proj"]
KINDS = {
    "lora": lambda targets: LoraConfig(r=3, lora_alpha=7, target_modules=targets),
    "rslora, ranks": lambda targets: LoraConfig(
        r=3, use_rslora=True, rank_pattern={targets[0]: 5}, target_modules=targets
    ),
    "ia3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=["down_proj"]),
}


@pytest.fixture
def twins(tmp_path, random_torch):
    """The folders and the torch models of one model, fused and apart."""
    shared = {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}
    fused, apart = (random_torch(f"{k}ForCausalLM", shared) for k in ("Phi3", "Llama"))
    tensors = {}
    for name, tensor in fused.state_dict().items():
        if "qkv_proj" in name:  # four heads of 8, and two of keys and of values
            parts = zip("qkv", tensor.split([32, 16, 16]), strict=True)
            tensors |= {name.replace("qkv", part): cut for part, cut in parts}
        elif "gate_up_proj" in name:
            parts = zip(("gate", "up"), tensor.chunk(2), strict=True)
            tensors |= {name.replace("gate_up", part): cut for part, cut in parts}
        else:
            tensors[name] = tensor
    apart.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    models = {"fused": fused, "apart": apart}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    return models


@pytest.mark.filterwarnings("ignore")  # what PEFT says while it makes an adapter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("made_on", "used_on"), [("fused", "apart"), ("apart", "fused")])
def test_an_adapter_of_either_fits_both(
    tmp_path,
    twins,
    with_modules,
    random_tokens,
    load,
    logits,
    torch_logits,
    agree,
    kind,
    made_on,
    used_on,
):
    tokens = random_tokens(2, 9) % 96
    bases = {name: torch_logits(copy.deepcopy(model), tokens) for name, model in twins.items()}
    agree("the same model fused and apart, in torch", *bases.values(), 1e-5)
    settings = KINDS[kind](FUSED if made_on == "fused" else APART)
    model = with_modules(twins[made_on], settings, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    want = torch_logits(model, tokens)
    assert abs(want - bases[made_on]).max() > 0.02
    config, weights = load(tmp_path / used_on)
    adapter = peft.load_adapter(tmp_path / "adapter", config)
    found = logits(config, weights, adapter, tokens)
    agree(f"{kind}, made on {made_on}, used on {used_on}", found, want, 1e-4)
    peft.save_adapter(tmp_path / "ours", adapter, config)
    again = PeftModel.from_pretrained(twins[used_on], tmp_path / "ours").eval()
    agree(f"{kind}, saved for {used_on}", torch_logits(again, tokens), want, 1e-4)
