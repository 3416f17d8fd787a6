"""Columns are named recipes over named adapters."""

import pytest

from compose.folder import save_library
from compose.library import Library
from eval.columns import build
from lora_jax import peft
from lora_jax.errors import InputError


@pytest.fixture(scope="module")
def folders(tmp_path_factory, config, random_lora):
    root = tmp_path_factory.mktemp("adapters")
    peft.save_adapter(root / "a", random_lora(config, 1), config)
    members = (random_lora(config, 2), random_lora(config, 3))
    save_library(root / "lib", Library(("x", "y"), members), config, base_name="")
    return {name: root / name for name in ("a", "lib")}


def names(recipes, folders, config):
    return [column.name for column in build(recipes, folders, config, "delta")]


def test_by_default_the_base_and_every_adapter(folders, config):
    assert names([], folders, config) == ["base", "a", "lib.x", "lib.y"]


def test_recipes_in_their_order_and_under_their_labels(folders, config):
    recipes = ["mean(lib)", "base", "routed=arrow(lib, top_k=1)", "a - 0.4*a"]
    found = build(recipes, folders, config, "delta")
    assert [c.name for c in found] == ["mean(lib)", "base", "routed", "a - 0.4*a"]
    assert found[1].adapter == {}
    assert found[2].recipe == "arrow(lib, top_k=1)"
    assert {type(m).__name__ for m in found[2].adapter.values()} == {"Experts"}


@pytest.mark.parametrize(
    "recipes, message",
    [
        (["b"], "b"),
        (["arrow(lib, top_k=3)"], "top_k"),
        (["a", "a=mean(lib)"], "two columns are called 'a'"),
    ],
)
def test_wrong_recipes_are_refused(folders, config, recipes, message):
    with pytest.raises(InputError, match=message):
        names(recipes, folders, config)
