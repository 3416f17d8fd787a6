"""Parity with transformers and PEFT on torch: what is shared, and a table of the differences."""

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


@pytest.fixture
def report(request):
    """A function that adds a line to the summary."""
    return request.config.stash[MEASURED].append


@pytest.fixture
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
