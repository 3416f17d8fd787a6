"""The model that --model_args describe; what they cannot mean is named."""

import pytest

from compose.folder import save_library
from compose.library import Library, Routing
from eval.harness_arguments import Arguments, arguments, open_bench, recipe
from lora_jax import peft
from lora_jax.errors import InputError
from lora_jax.modules import Experts, LoRA


@pytest.fixture(scope="module")
def folders(tmp_path_factory, config, random_lora):
    """An adapter, and a library of two without a routing and with one."""
    root = tmp_path_factory.mktemp("modules")
    one, two = (random_lora(config, seed) for seed in (1, 2))
    peft.save_adapter(root / "mood", one, config)
    for name, routing in (("plain", None), ("routed", Routing(top_k=2))):
        save_library(root / name, Library(("a", "b"), (one, two), routing), config)
    return root


@pytest.fixture
def opened(base_folder, folders):
    """A function from arguments to the one module that they describe."""

    def adapter(**given):
        (column,) = open_bench(arguments({"base": str(base_folder), **given})).columns
        return column.adapter

    return adapter


def test_what_the_harness_always_passes_is_let_through():
    given = {"base": "b", "batch_size": "auto", "max_batch_size": 64, "device": "cuda:0"}
    assert arguments(given) == Arguments(base="b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretrained": "x"}, "pretrained is unknown; known are adapter, base, batch_tokens"),
        ({"space": "deltas"}, "space=deltas is not one of delta, factor"),
        ({"devices": "all", "dtype": "int8"}, "devices=all .*; dtype=int8 is not one of float32"),
        ({"batch_tokens": 0, "max_length": -1}, "batch_tokens=0 must be .*; max_length=-1 must"),
        ({"max_length": "long", "batch_tokens": 1.5}, "batch_tokens=1.5 must .*; max_length=long"),
        ({"seed": "x"}, r"seed=x must be in \[0, 2\*\*32\)"),
        ({"adapter": 3}, "adapter=3 must be NAME=FOLDER, or a list of them"),
        ({"adapter": ["a=b", 3]}, "adapter=.* must be NAME=FOLDER"),
        ({"library": 7, "base": True}, "base=True must be a text; library=7 must be a text"),
        ({"library": "l", "top_k": "x", "mixing": "y"}, "mixing=y is not .*; top_k=x must be a"),
        ({"library": "l", "temperature": 0}, "temperature=0 must be a number over 0"),
        ({"top_k": 2}, "top_k are for a library alone"),
        ({"library": "l", "expression": "lib", "mixing": "factors"}, "mixing are for a library"),
    ],
)
def test_arguments_that_cannot_be_are_named(given, message):
    with pytest.raises(InputError, match=message):
        arguments(given)


@pytest.mark.parametrize(
    ("given", "names", "text"),
    [
        ({}, [], "base"),
        ({"adapter": "m=f"}, ["m"], "m"),
        ({"library": "l"}, ["lib"], "lib"),
        ({"library": "l", "top_k": 2, "mixing": "factors"}, ["lib"], "arrow(lib, top_k=2, mixing="),
        ({"expression": "a - b"}, ["a", "b"], "a - b"),
    ],
)
def test_the_expression_is_the_one_that_the_arguments_mean(given, names, text):
    assert recipe(Arguments(**given), names).startswith(text)


def test_several_modules_need_an_expression():
    with pytest.raises(InputError, match="say what to make of a, b: expression="):
        recipe(Arguments(), ["a", "b"])


def test_the_base_alone_an_adapter_and_a_composition(opened, folders):
    assert opened() == {}
    mood = f"mood={folders / 'mood'}"
    assert {type(m) for m in opened(adapter=mood).values()} == {LoRA}
    twice = opened(adapter=[mood], expression="2*mood")
    assert all(m.scale * m.b.sum() != 0 for m in twice.values())


def test_a_library_is_routed(opened, folders):
    for given in ({"library": str(folders / "plain"), "top_k": 1}, {"library": "routed"}):
        given["library"] = str(folders / given["library"])
        module = next(iter(opened(**given).values()))
        assert isinstance(module, Experts) and module.top_k == given.get("top_k", 2)
    with pytest.raises(InputError, match="'lib' is a library that is not routed; say top_k=3"):
        opened(library=str(folders / "plain"))


def test_reserved_names_and_missing_folders_are_named(opened):
    with pytest.raises(InputError, match="the name 'lib' is taken"):
        opened(adapter="lib=x")
    with pytest.raises(InputError, match="nowhere is not a folder"):
        opened(adapter="a=nowhere")


def test_the_weights_have_the_type_asked_for(base_folder):
    bench = open_bench(arguments({"base": str(base_folder), "dtype": "bfloat16"}))
    assert bench.base.weights["embed"].dtype == "bfloat16"
