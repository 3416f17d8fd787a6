"""Columns are named recipes over named adapters."""

import jax
import numpy as np
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


def test_a_number_left_open_is_a_column_for_every_value(folders, config):
    swept = {"x": (0.0, 0.5, 1.0)}
    found = build(["base", "less=a - {x}*mean(lib)"], folders, config, "delta", swept)
    assert [c.name for c in found] == ["base", "less x=0", "less x=0.5", "less x=1"]
    assert [dict(c.setting) for c in found] == [{}, {"x": 0}, {"x": 0.5}, {"x": 1}]
    alone = build(["a - 0.5*mean(lib)"], folders, config, "delta")[0]
    assert found[2].recipe == alone.recipe and found[2].group == "less"
    jax.tree.map(np.testing.assert_array_equal, found[2].adapter, alone.adapter)


def test_a_recipe_of_a_file_has_a_column_for_every_output(folders, config, base_folder, tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(
        f"base: {base_folder}\n"
        f"inputs: {{a: {folders['a']}, lib: {folders['lib']}}}\n"
        "steps: {less: {ties: [a, lib], density: {d}}, routed: {arrow: [lib], top_k: 1}}\n"
        "outputs: {out/less: less, out/routed: routed}\n"
    )
    found = build([str(path), f"r={path}"], folders, config, "delta", {"d": (0.5, 1.0)})
    assert [c.name for c in found][:4] == [
        "both.less d=0.5",
        "both.routed d=0.5",
        "both.less d=1",
        "both.routed d=1",
    ]
    assert [c.name for c in found][4] == "r.less d=0.5"
    by_hand = build(["ties(a, lib, density=0.5)"], folders, config, "delta")[0]
    jax.tree.map(np.testing.assert_array_equal, found[0].adapter, by_hand.adapter)
    assert {type(m).__name__ for m in found[1].adapter.values()} == {"Experts"}
    path.write_text(path.read_text().replace("ties", "tees"))
    with pytest.raises(InputError, match=r"both.yaml: line 3, .* unknown method .tees"):
        build([str(path)], folders, config, "delta", {"d": (0.5,)})
