"""A saved adapter to spoil, and the two ways to spoil it: its config, and its tensors."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import peft
from lora_jax.errors import InputError
from lora_jax.families import t5
from lora_jax.peft.settings import read_settings


class Folder:
    """An adapter's folder whose two files can be changed."""

    def __init__(self, path: Path, config):
        self.path, self.config = path, config

    @property
    def settings(self) -> dict:
        return json.loads((self.path / peft.CONFIG).read_text())

    def edit(self, **settings):
        text = json.dumps(self.settings | settings)
        (self.path / peft.CONFIG).write_text(text)

    @property
    def tensors(self) -> dict:
        return load_file(self.path / peft.WEIGHTS)

    def store(self, tensors):
        save_file(tensors, self.path / peft.WEIGHTS)

    def load(self, config=None):
        return peft.load_adapter(self.path, config or self.config)

    def refusal(self, config=None) -> str:
        with pytest.raises(InputError) as caught:
            self.load(config)
        return str(caught.value)


@pytest.fixture
def saved(tmp_path, config, random_lora) -> Folder:
    """A LoRA on q and down in a PEFT folder, to be spoiled."""
    adapter = random_lora(config, targets=["q_proj", "down_proj"])
    peft.save_adapter(tmp_path / "adapter", adapter, config, base_name="tiny")
    return Folder(tmp_path / "adapter", config)


@pytest.fixture
def settings(saved):
    """A function to the settings of that LoRA with some of them changed."""
    return lambda **changes: replace(read_settings(saved.path), **changes)


@pytest.fixture
def folder(tmp_path, config):
    """A function that saves an adapter of the tiny model, or of another, in a folder to look at."""

    def make(adapter, of=None) -> Folder:
        peft.save_adapter(tmp_path / "made", adapter, of or config, overwrite=True)
        return Folder(tmp_path / "made", of or config)

    return make


@pytest.fixture(scope="session")
def t5_config() -> t5.Config:
    """A T5 of two layers in either stack."""
    return t5.Config(264, 32, 48, encoder_layers=2, layers=2, heads=4, head_width=8)


@pytest.fixture(scope="session")
def equal():
    """A function that tells whether two trees are the same to the bit."""

    def same(one, other) -> bool:
        if jax.tree.structure(one) != jax.tree.structure(other):
            return False
        pairs = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), one, other)
        return jax.tree.all(pairs)

    return same
