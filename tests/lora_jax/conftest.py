"""What tests of GGUF files and of users' Flax models share: a writer, and random modules."""

import jax
import numpy as np
import pytest
from gguf import GGUFWriter

from lora_jax import gguf
from lora_jax.modules import init_ia3, init_lora


@pytest.fixture(scope="session")
def gguf_file():
    """A function that writes a model as llama.cpp's converter does: its sizes and its tensors.

    `add` adds metadata to the writer, and `leave` names keys of it to leave out again.
    """

    def write(path, kind, config, tensors, *, add, leave=()):
        writer = GGUFWriter(path, kind)
        writer.add_context_length(config.context)
        writer.add_embedding_length(config.width)
        writer.add_feed_forward_length(config.hidden)
        writer.add_block_count(config.layers)
        writer.add_head_count(config.heads)
        writer.add_head_count_kv(config.kv_heads)
        writer.add_rope_freq_base(config.rope.base)
        writer.add_layer_norm_rms_eps(config.eps)
        add(writer)
        for key in leave:
            del writer.kv_data[0][key]
        for name, value in tensors:
            writer.add_tensor(name, np.ascontiguousarray(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def convert():
    """A function that converts a GGUF file to a Hugging Face folder beside it."""

    def run(source, *progress):
        folder = source.with_suffix("")
        folder.mkdir()
        gguf.convert(source, folder, *progress)
        return folder

    return run


def _noisy(adapter, seed):
    """The adapter with noise on all its arrays."""
    leaves, form = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(form, new)


@pytest.fixture(scope="session")
def loras():
    """A function from the shapes of projections to a random LoRA on each."""

    def make(shapes, seed=0):
        key = jax.random.key(seed)
        return _noisy(init_lora(key, shapes, targets=["all-linear"], rank=2, alpha=3), seed)

    return make


@pytest.fixture(scope="session")
def ia3s():
    """A function from the shapes of projections to a random IA3 on each, in turn on either side."""

    def make(shapes):
        sides = {path: ("input", "output")[n % 2] for n, path in enumerate(shapes)}
        return _noisy(init_ia3(shapes, sides), 0)

    return make
