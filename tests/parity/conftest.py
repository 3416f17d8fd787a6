"""Parity with transformers and PEFT on torch: what is shared, and a table of the differences."""

import copy
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

# Torch's threads would spin while they wait, and take the cores from whatever else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("peft") is None:
    collect_ignore_glob = ["test_*.py"]

HERE = Path(__file__).parent
# PEFT 0.21 asks transformers 5 for an attribute by its old name.
OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
MEASURED = pytest.StashKey[list[str]]()
SHAPE = {  # a small model's, in words that every family's config knows or leaves alone
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# What PEFT calls an array of a module at a projection.
ROLES = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "magnitude": "lora_magnitude_vector.weight",
    "offset": "ia3_l",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("parity")
            item.add_marker(pytest.mark.filterwarnings(OLD_NAME))


def pytest_configure(config):
    config.stash[MEASURED] = []


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[MEASURED]:
        terminalreporter.section("measured")
        for line in config.stash[MEASURED]:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def report(request):
    """A function that adds a line to the summary."""
    return request.config.stash[MEASURED].append


@pytest.fixture(scope="session")
def agree(report):
    """A function that holds two arrays to a tolerance and reports how far apart they are."""

    def check(name, ours, theirs, within) -> None:
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape
        apart, size = np.abs(ours - theirs).max(), np.abs(theirs).max()
        report(f"{name}: max |difference| {apart:.1e} of {size:.3g} (within {within:.0e})")
        assert apart <= within

    return check


@pytest.fixture(scope="session")
def agree_on_gradients(agree):
    """A function that holds a loss and its gradient by every tensor of a module to torch's.

    `ours` is the loss and the gradients, `loss` torch's, of `model` under the same module.
    """

    def check(name, config, ours, loss, model) -> None:
        value, gradients = ours
        loss.backward()
        agree(f"{name}, loss", value, loss.item(), 1e-5)
        named = ((_plain(n), p.grad) for n, p in model.named_parameters())
        found = {n: gradient.numpy() for n, gradient in named if gradient is not None}
        pairs = list(_paired(config, gradients, found))
        assert len(pairs) == len(found)
        scaled = [[tensor.ravel() / np.abs(b).max() for tensor in (a, b)] for a, b in pairs]
        sides = (np.concatenate(side) for side in zip(*scaled, strict=True))
        agree(f"{name}, gradients, each over its tensor's largest", *sides, 1e-4)

    return check


def _plain(name):
    """A parameter's name in a PEFT model without what PEFT puts around its module."""
    for part in ("base_model.model.", ".modules_to_save", ".default"):
        name = name.replace(part, "")
    return name


def _paired(config, gradients, found):
    """Our gradients and torch's, tensor by tensor, turned as torch has them."""
    from lora_jax.peft import names
    from lora_jax.table import module_path

    leaves = {module_path(key): leaf for key, leaf in names.table(config).items()}
    for path, module in gradients.items():
        leaf = leaves[path]
        arrays = {key: value for key, value in vars(module).items() if hasattr(value, "ndim")}
        for layer, stored in enumerate(leaf.names()):
            for key, array in arrays.items():
                ours = np.asarray(array[layer] if leaf.stacked else array)
                role = f"{stored.removesuffix('.weight')}.{ROLES[key]}" if key in ROLES else stored
                yield ours.T if key in ROLES or leaf.transposed else ours, found[role]


@pytest.fixture(scope="session")
def agree_on_next_tokens(agree_on_gradients):
    """The same for the mean cross-entropy of each next token of `rows`, under `adapter` here."""
    import jax
    import jax.numpy as jnp
    import torch

    from lora_jax import models

    def check(name, config, weights, adapter, rows, model) -> None:
        def loss(adapter):
            states = models.forward(config, weights, adapter, jnp.asarray(rows)).hidden[:, :-1]
            chances = jax.nn.log_softmax(models.unembed(config, weights, adapter, states))
            return -jnp.mean(jnp.take_along_axis(chances, rows[:, 1:, None], axis=-1))

        ours = jax.jit(jax.value_and_grad(loss))(adapter)
        labels = torch.tensor(rows).long()
        agree_on_gradients(name, config, ours, model(labels, labels=labels).loss, model)

    return check


@pytest.fixture(scope="session")
def with_noise():
    """A function that adds noise to the parameters of a torch model that `where` says.

    Unless it says others, to those that transformers starts at zero or one: vectors, and T5's
    biases of relative positions.
    """
    import torch

    def constant(name, parameter):
        return parameter.ndim == 1 or "relative_attention_bias" in name

    def add(model, size=0.3, where=constant):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if where(name, parameter):
                    parameter.add_(size * torch.randn_like(parameter))
        return model

    return add


@pytest.fixture(scope="session")
def random_torch(with_noise):
    """A function from a class of transformers, by name, and settings to a small random model."""
    import torch
    import transformers

    def make(kind, settings, noise=0.3):
        torch.manual_seed(0)
        made = getattr(transformers, kind)
        return with_noise(made(made.config_class(**SHAPE | settings)).eval(), noise)

    return make


@pytest.fixture(scope="session")
def with_modules(with_noise):
    """A function that puts random modules of PEFT's on a torch model: all that they train is."""
    import torch
    from peft import get_peft_model

    def put(model, settings, size=0.2):
        torch.manual_seed(1)
        model = get_peft_model(model, copy.deepcopy(settings))
        return with_noise(model, size, lambda _, parameter: parameter.requires_grad).eval()

    return put


@pytest.fixture(scope="session")
def load():
    """A function from a base model's folder to its config and weights here."""
    from lora_jax import checkpoint

    def read(folder):
        config = checkpoint.read_config(folder)
        return config, checkpoint.load_weights(folder, config)

    return read


@pytest.fixture
def pair(tmp_path, random_torch, load):
    """A function from `random_torch`'s words to the model, and its config and weights here.

    It is saved in `tmp_path / "theirs"`.
    """

    def make(kind, settings):
        model = random_torch(kind, settings)
        model.save_pretrained(tmp_path / "theirs")
        return model, *load(tmp_path / "theirs")

    return make


@pytest.fixture(scope="session")
def smollm():
    """SmolLM2 as we hold it, fetched the first time."""
    from lora_jax import bases

    return bases.load_base("smollm2-135m")


@pytest.fixture(scope="session")
def tokenizer(smollm):
    """SmolLM2's tokenizer."""
    from lora_jax import tokens

    return tokens.load_tokenizer(smollm.folder)


@pytest.fixture
def torch_smollm(smollm):
    """SmolLM2 as transformers loads it from our folder; fresh, because PEFT changes it in place."""
    return load_torch(smollm.folder)


@pytest.fixture(scope="session")
def torch_model():
    """A function that loads a folder in transformers, in float32."""
    return load_torch


def load_torch(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def torch_logits():
    """A function to a torch model's logits (B, T, V) as an array."""
    import torch

    def run(model, tokens, **options):
        with torch.no_grad():
            return model(torch.tensor(np.asarray(tokens)), **options).logits.numpy()

    return run


@pytest.fixture(scope="session")
def logits(hidden):
    """A function to our logits (B, T, V)."""
    from lora_jax import models

    return lambda config, weights, adapter, tokens, **options: models.unembed(
        config, weights, adapter, hidden(config, weights, adapter, tokens, **options)
    )
