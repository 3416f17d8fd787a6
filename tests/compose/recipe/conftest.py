"""Adapters of the tiny model on disk, and recipes over them."""

import pytest

from lora_jax import peft

# `{root}` stands for the folder of the adapters, `{out}` for one to write in.
TEXT = """\
inputs:
  math: {root}/math
  code: {root}/code
  wiki: {root}/wiki
steps:
  both:
    linear: [math, code]
    weights: [0.6, 0.4]
    rank: 4
  clean: both - 0.4*wiki
  routed: {{arrow: [clean, code], top_k: 1}}
outputs:
  {out}/both: both
  {out}/routed: routed
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, config, random_lora, base_folder):
    """A folder with three adapters that name the tiny base model."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("math", "code", "wiki")):
        adapter = random_lora(config, seed, targets=("q_proj", "up_proj"))
        peft.save_adapter(folder / name, adapter, config, base_name=str(base_folder))
    return folder


@pytest.fixture(scope="module")
def modules(root, config):
    """The three adapters in memory."""
    return {name: peft.load_adapter(root / name, config) for name in ("math", "code", "wiki")}


@pytest.fixture
def written(root, tmp_path):
    """A function that writes a recipe's text, with folders put in, and gives its path."""

    def write(text=TEXT):
        path = tmp_path / "recipe.yaml"
        path.write_text(text.format(root=root, out=tmp_path / "out"))
        return path

    return write
