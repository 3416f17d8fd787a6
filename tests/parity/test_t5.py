"""Random T5 models of the three kinds against transformers, and PEFT's modules on them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from eval.generation import Sampling, generate
from lora_jax import checkpoint, merge, models, peft
from lora_jax.families import t5
from lora_jax.modules import IA3, LoRA
from train.loss import Batch, Source, batch_loss

SHAPE = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 56,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,  # texts reach farther
    "decoder_start_token_id": 0,
}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
KINDS = {"v1.0": {}, "v1.1": V1_1, "flan": V1_1}
SOURCE = np.array([13, 24, 1, 17])  # tokens of each row of the source


def random_torch(folder, name, seed=0):
    """A random model of a kind, saved in `folder`; Flan's with the config that Google wrote."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**SHAPE, **KINDS[name])).eval()
    if name != "v1.0":  # transformers 5 ties them until they differ
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1 or "relative_attention_bias" in path:
                parameter.add_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if name == "flan":
        path = folder / "config.json"
        raw = json.loads(path.read_text()) | {"tie_word_embeddings": False, "n_positions": 512}
        del raw["scale_decoder_outputs"]
        path.write_text(json.dumps(raw))
    return model


def load(folder):
    config = checkpoint.read_config(folder)
    return config, checkpoint.load_weights(folder, config)


@pytest.fixture(scope="module")
def source(random_tokens):
    """Sources of unequal lengths, and which of their places are real."""
    segments = (np.arange(24) < SOURCE[:, None]).astype(np.int32)
    return np.asarray(random_tokens(4, 24)) % 96 * segments, segments


@pytest.fixture(scope="module")
def target(random_tokens):
    """Texts of unequal lengths for the decoder, and which of their places are real."""
    segments = (np.arange(18) < np.array([18, 5, 11, 14])[:, None]).astype(np.int32)
    tokens = np.asarray(random_tokens(4, 18, seed=1)) % 96
    tokens[:, 0] = 0
    return tokens * segments, segments


@pytest.fixture(scope="module")
def logits():
    """A function to our logits (B, T, V) of a source and a target."""

    def run(config, weights, adapter, source, target):
        memory = models.encode(config, weights, adapter, *source)
        out = models.forward(config, weights, adapter, target[0], segments=target[1], memory=memory)
        return models.unembed(config, weights, adapter, out.hidden)

    return jax.jit(run, static_argnums=0)


@pytest.fixture(scope="module")
def torch_logits():
    """A function to a torch model's logits of a source and a target."""

    def run(model, source, target):
        names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
        given = zip(names, (*source, *target), strict=True)
        with torch.no_grad():
            return model(**{n: torch.tensor(x).long() for n, x in given}).logits.numpy()

    return run


@pytest.mark.parametrize("name", KINDS)
def test_what_transformers_saves_computes_the_same_here(
    tmp_path, name, source, target, logits, torch_logits, agree
):
    model = random_torch(tmp_path, name)
    config, weights = load(tmp_path)
    assert config.tied == (name == "v1.0")
    real = target[1] > 0
    ours = np.asarray(logits(config, weights, {}, source, target))[real]
    agree(f"T5 {name}", ours, torch_logits(model, source, target)[real], 1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_what_we_save_computes_the_same_there(
    tmp_path, name, source, target, logits, torch_logits, agree
):
    random_torch(tmp_path / "theirs", name, seed=1)
    config, weights = load(tmp_path / "theirs")
    checkpoint.save_model(tmp_path / "ours", config, weights)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    real = target[1] > 0
    ours = np.asarray(logits(config, weights, {}, source, target))[real]
    agree(f"T5 {name}, saved by us", ours, torch_logits(model, source, target)[real], 1e-4)


def test_buckets_are_transformers():
    distances = np.arange(-700, 701)
    for both, count, far in [(True, 32, 128), (False, 32, 128), (True, 8, 12), (False, 10, 50)]:
        theirs = T5Attention._relative_position_bucket(
            torch.tensor(distances), bidirectional=both, num_buckets=count, max_distance=far
        )
        config = t5.Config(1, 1, 1, 1, 1, 1, 1, buckets=count, far=far)
        kernel = jnp.arange(count, dtype=jnp.float32)[:, None]
        ours = t5._bias(config, kernel, jnp.asarray(distances)[None, None], both)
        np.testing.assert_array_equal(ours[0, 0, 0], theirs.numpy())


def step_by_step(config, weights, source, target):
    """Logits of a target, two tokens at a time over a cache, the source read once."""

    @jax.jit
    def step(cache, memory, tokens, segments):
        out = models.forward(
            config, weights, {}, tokens, segments=segments, cache=cache, memory=memory
        )
        return out.cache, models.unembed(config, weights, {}, out.hidden)

    memory = models.encode(config, weights, {}, *source)
    cache, seen = models.new_cache(config, *target[0].shape), []
    for start in range(0, target[0].shape[1], 2):
        part = (x[:, start : start + 2] for x in target)
        cache, found = step(cache, memory, *part)
        seen.append(found)
    return np.concatenate(seen, axis=1)


@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_a_cached_decoder(tmp_path, name, source, target, torch_logits, agree):
    model = random_torch(tmp_path, name)
    ours = step_by_step(*load(tmp_path), source, target)
    real, theirs = target[1] > 0, torch_logits(model, source, target)
    agree(f"T5 {name}, step by step", ours[real], theirs[real], 1e-4)


@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_greedy_text_is_transformers(tmp_path, name, source):
    model = random_torch(tmp_path, name)
    config, weights = load(tmp_path)
    tokens, mask = (torch.tensor(x).long() for x in source)
    # Its cache has as many layers as the encoder, which are too few for this decoder.
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": False}
    theirs = model.generate(tokens, attention_mask=mask, **options)
    prompts = [row[:size].tolist() for row, size in zip(source[0], SOURCE, strict=True)]
    ours = generate(
        config, weights, {}, prompts, stop=1, sampling=Sampling(max_new_tokens=12), tokens=60
    )
    for reply, row in zip(ours, theirs[:, 1:].tolist(), strict=True):
        assert reply == (row[: row.index(1)] if 1 in row else row)
    assert len({tuple(reply) for reply in ours}) > 1


SETTINGS = {
    "LoRA on q and v": (LoraConfig, {"r": 3, "lora_alpha": 7, "target_modules": ["q", "v"]}),
    "LoRA on all": (LoraConfig, {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}),
    "IA3": (IA3Config, {}),  # PEFT's own for T5: k, v, and wo's input
}


def with_modules(model, name):
    """The model under modules of PEFT's that are random, so that they change what comes out."""
    kind, settings = SETTINGS[name]
    model = get_peft_model(model, kind(task_type="SEQ_2_SEQ_LM", **settings))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path or "ia3_l" in path:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
def test_what_peft_saves_changes_the_model_alike(
    tmp_path, kind, name, source, target, logits, torch_logits, agree
):
    model = random_torch(tmp_path / "base", kind)
    config, weights = load(tmp_path / "base")
    before = torch_logits(model, source, target)
    model = with_modules(model, name)
    model.save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", config)
    after, real = torch_logits(model, source, target), target[1] > 0
    assert np.abs(after - before).max() > 0.1
    ours = np.asarray(logits(config, weights, adapter, source, target))
    agree(f"T5 {kind}, {name} from PEFT", ours[real], after[real], 1e-4)
    merged = logits(config, merge.merge(weights, adapter), {}, source, target)
    agree(f"T5 {kind}, {name} merged", np.asarray(merged)[real], after[real], 1e-4)


@pytest.mark.parametrize("name", ["LoRA", "LoRA on the encoder's q", "IA3"])
def test_what_we_save_changes_pefts_model_alike(
    tmp_path, name, source, target, logits, torch_logits, random_lora, random_ia3, agree
):
    model = random_torch(tmp_path / "base", "v1.1")
    config, weights = load(tmp_path / "base")
    some = {"targets": ("encoder.layer.0.SelfAttention.q",)}
    options = {"targets": ("q", "v", "wi_1")} if name == "LoRA" else some
    adapter = random_ia3(config) if name == "IA3" else random_lora(config, **options)
    peft.save_adapter(tmp_path / "a", adapter, config)
    settings = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    assert settings["task_type"] == "SEQ_2_SEQ_LM"
    model = PeftModel.from_pretrained(model, tmp_path / "a")
    ours, real = logits(config, weights, adapter, source, target), target[1] > 0
    theirs = torch_logits(model, source, target)
    agree(f"T5, {name} to PEFT", np.asarray(ours)[real], theirs[real], 1e-4)
    found = {path for path, _ in model.named_parameters() if "lora_" in path or "ia3_l" in path}
    assert len(found) == sum(leaf.shape[0] for leaf in jax.tree.leaves(adapter))


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients(tmp_path, name, source, target, agree):
    """Of the cross-entropy of a target's tokens, by the adapter's every tensor."""
    model = random_torch(tmp_path / "base", "v1.0")
    config, weights = load(tmp_path / "base")
    model = with_modules(model, name)
    model.save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", config)
    tokens, mask = source
    labels = np.where(target[1] > 0, target[0], -100)
    made = Batch(
        np.where(target[1] > 0, np.c_[np.zeros(4, int), target[0][:, :-1]], 0),
        target[1],
        np.tile(np.arange(18), (4, 1)),
        np.tile(np.arange(18), (4, 1)),
        target[0],
        target[1].astype(np.float32),
        Source(tokens, mask),
    )
    batch = jax.tree.map(jnp.asarray, made)
    ours = jax.jit(jax.value_and_grad(lambda a: batch_loss(config, weights, a, batch)))(adapter)
    given = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    loss = model(**{n: torch.tensor(x).long() for n, x in given.items()}).loss * target[1].sum()
    loss.backward()
    agree(f"T5 loss, {name}", ours[0] / loss.item(), 1.0, 1e-5)
    pairs = list(_paired(config, ours[1], dict(model.named_parameters())))
    scaled = [[tensor.ravel() / np.abs(b).max() for tensor in (a, b)] for a, b in pairs]
    found, wanted = (np.concatenate(side) for side in zip(*scaled, strict=True))
    agree(f"T5 gradients, {name}, each over its tensor's largest", found, wanted, 1e-4)


def _paired(config, gradients, parameters):
    """Our gradients and torch's, tensor by tensor, in PEFT's orientation."""
    for path, module in gradients.items():
        for layer, stored in enumerate(models.table(config)[path].names()):
            stem = f"base_model.model.{stored.removesuffix('.weight')}"
            match module:
                case LoRA():
                    for ours, theirs in ((module.a, "A"), (module.b, "B")):
                        other = parameters[f"{stem}.lora_{theirs}.default.weight"].grad
                        yield np.asarray(ours[layer].T), other.numpy()
                case IA3():
                    other = parameters[f"{stem}.ia3_l.default"].grad
                    yield np.asarray(module.offset[layer]), other.numpy().reshape(-1)
