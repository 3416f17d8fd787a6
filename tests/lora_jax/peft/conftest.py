"""A saved adapter to spoil, and the two ways to spoil it: its config, and its tensors."""

import json
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import peft
from lora_jax.errors import InputError

STEM = "base_model.model.model.layers"


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
def folder(tmp_path, config):
    """A function that saves an adapter of the tiny model, or of another, in a folder to look at."""

    def make(adapter, of=None) -> Folder:
        peft.save_adapter(tmp_path / "made", adapter, of or config, overwrite=True)
        return Folder(tmp_path / "made", of or config)

    return make


@pytest.fixture(scope="session")
def equal():
    """A function that tells whether two trees are the same to the bit."""

    def same(one, other) -> bool:
        if jax.tree.structure(one) != jax.tree.structure(other):
            return False
        pairs = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), one, other)
        return jax.tree.all(pairs)

    return same
