import json
from xml.etree import ElementTree

import numpy as np
import pytest

from compose.arithmetic import average, weighted_sum
from compose.folder import save_library
from compose.geometry import norm, recompress
from compose.inputs import load_input
from compose.library import Library
from compose.merging.merge import merge
from compose.recipe import Expression, Method, Recipe, evaluate, read_recipe, recipe_text, run
from compose.recipe.read import parsed_text
from compose.weights import over_depth
from lora_jax import peft
from lora_jax.errors import InputError
from lora_jax.files import folder_digest

Q, UP = "self_attn.q_proj", "mlp.up_proj"


TEXT = """\
inputs:
  math: {root}/math
  code: {root}/code
  wiki: {root}/wiki
steps:
  both:
    ties: [math, code]
    weights: [0.6, 0.4]
    density: 0.5
    rank: 4
  clean: both - 0.4*wiki
  routed: {{arrow: [clean, code], top_k: 1}}
outputs:
  {out}/both: both
  {out}/routed: routed
"""


def one(step, *names, **fields):
    """A recipe of one step over the named inputs."""
    return Recipe(dict.fromkeys(names, ""), {"x": step}, {"o": "x"}, **fields)


def same(x, y, tolerance=1e-5):
    """Whether two modules add the same, whatever their factors."""
    assert x.keys() == y.keys()
    gap = norm(weighted_sum([x, y], [1, -1], space="delta"))
    assert gap <= tolerance * norm(x) and norm(x) > 0


def test_outputs_are_what_the_same_steps_make_by_hand(written, modules, config, tmp_path):
    made = run(read_recipe(written(TEXT)))
    math, code, wiki = modules["math"], modules["code"], modules["wiki"]
    both, lost = merge([math, code], "ties", weights=[0.6, 0.4], density=0.5, rank=4)
    clean = weighted_sum([both, wiki], [1, -0.4], space="delta")
    found = load_input(tmp_path / "out" / "both", config)
    same(found, both)
    routed = load_input(tmp_path / "out" / "routed", config)
    assert isinstance(routed, Library) and routed.names == ("clean", "code")
    assert routed.routing.top_k == 1
    same(routed.adapters[0], clean)
    same(routed.adapters[1], code)
    assert list(made.values) == ["both", "clean", "routed"]
    np.testing.assert_allclose(made.errors["both"][""][Q], lost[Q], rtol=1e-4)


def test_the_record_can_make_the_output_again(written, root, config, tmp_path, base_folder):
    recipe = read_recipe(written())
    run(recipe)
    record = json.loads((tmp_path / "out" / "both" / "provenance.json").read_text())
    assert parsed_text(record["recipe"], "file") == (recipe, []) and record["step"] == "both"
    assert record["recipe"] == recipe_text(recipe)
    assert record["inputs"].keys() == {"math", "code"}
    assert record["inputs"]["math"]["sha256"] == folder_digest(root / "math")
    assert record["base_model_name_or_path"] == str(base_folder) and "jax" in record["versions"]
    lost = record["truncation_error"]
    assert (
        lost.keys() == {"both"} and all(0 < e < 1 for e in lost["both"][Q]) and UP in lost["both"]
    )
    other = json.loads((tmp_path / "out" / "routed" / "provenance.json").read_text())
    assert other["inputs"].keys() == {"math", "code", "wiki"} and other["truncation_error"] == lost
    drawing = ElementTree.parse(tmp_path / "out" / "routed" / "lineage.svg").getroot()
    assert {"math", "code", "wiki", "both", "clean", "routed"} <= set(drawing.itertext())


@pytest.mark.parametrize("space", ["delta", "factor"])
def test_a_space_holds_for_all_steps_that_name_none(modules, space):
    math, code = modules["math"], modules["code"]
    found = evaluate(one(Expression("math - 0.4*code"), "math", "code", space=space), modules)["x"]
    same(found, weighted_sum([math, code], [1, -0.4], space=space))
    step = Method("mean", ("math", "code"), space=space)
    same(evaluate(one(step, "math", "code"), modules)["x"], average([math, code], space=space))
    other = "factor" if space == "delta" else "delta"
    step = Method("gks", ("math", "code"), space=space, options={"strength": 0.5})
    by_default = one(
        Method("gks", ("math", "code"), options={"strength": 0.5}), "math", "code", space=space
    )
    same(
        evaluate(one(step, "math", "code", space=other), modules)["x"],
        evaluate(by_default, modules)["x"],
    )


def test_weights_by_depth_and_projection_are_those_layers_and_projections(modules):
    math, code = modules["math"], modules["code"]
    shares = ((0, 1), {"q_proj": 0.5, "*": (1, -1)})
    step = Method("linear", ("math", "code"), shares)
    rising, turning = over_depth([0, 1], 2), over_depth([1, -1], 2)
    want = weighted_sum(
        [math, code], [{Q: rising, UP: rising}, {Q: 0.5, UP: turning}], space="delta"
    )
    same(evaluate(one(step, "math", "code"), modules)["x"], want)
    step = Method("mean", ("math", "code"), ({"q_proj": 3, "*": 1}, 1))
    want = average([math, code], [{Q: 3.0, UP: 1.0}, {Q: 1.0, UP: 1.0}], space="delta")
    same(evaluate(one(step, "math", "code"), modules)["x"], want)


def test_a_weight_counts_where_its_member_changes_nothing(modules):
    half = {Q: modules["code"][Q]}
    inputs = {"math": modules["math"], "code": half}
    plain = Method("mean", ("math", "code"), (1, 1))
    deep = Method("mean", ("math", "code"), ((1, 1), (1, 1)))
    found = [evaluate(one(step, "math", "code"), inputs)["x"] for step in (plain, deep)]
    same(*found)


def test_a_rank_recompresses_any_step(modules):
    math, code = modules["math"], modules["code"]
    want, _ = recompress(weighted_sum([math, code], [1, 1], space="delta"), 2)
    for step in (Expression("math + code", rank=2), Method("linear", ("math", "code"), rank=2)):
        found = evaluate(one(step, "math", "code"), modules)["x"]
        assert found[Q].a.shape[-1] == 2
        same(found, want, 1e-4)


def test_a_library_stands_for_its_members(modules, config, root, tmp_path, base_folder):
    library = Library(("math", "code"), (modules["math"], modules["code"]))
    save_library(tmp_path / "lib", library, config, base_name=str(base_folder))
    recipe = Recipe(
        {"lib": str(tmp_path / "lib"), "wiki": str(root / "wiki")},
        {
            "one": Method("linear", ("lib", "wiki"), (0.5, -1)),
            "each": Method("gks", ("lib", "wiki"), rank=2),
        },
        {str(tmp_path / "one"): "one", str(tmp_path / "each"): "each"},
    )
    made = run(recipe)
    members = [modules[name] for name in ("math", "code", "wiki")]
    same(made.values["one"], weighted_sum(members, [0.5, 0.5, -1], space="delta"))
    assert made.errors["each"].keys() == {"math", "code"}
    record = json.loads((tmp_path / "each" / "provenance.json").read_text())
    assert record["truncation_error"].keys() == {"each.math", "each.code"}


def test_only_what_an_output_needs_is_read_and_run(root, modules, tmp_path, base_folder):
    recipe = Recipe(
        {"math": str(root / "math"), "gone": str(tmp_path / "gone")},
        {"idle": Expression("gone + math"), "x": Expression("2*math")},
        {str(tmp_path / "o"): "x"},
        base=str(base_folder),
    )
    assert list(run(recipe).values) == ["x"]
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_inputs_that_cannot_be_read_are_told_with_their_lines(
    root, tmp_path, config, random_lora, base_folder
):
    for name in ("a", "b"):
        peft.save_adapter(tmp_path / name, random_lora(config), config)
        (tmp_path / name / peft.WEIGHTS).write_bytes(b"no tensors")
    inputs = f"inputs:\n  a: {tmp_path}/a\n  b: {tmp_path}/b\n"
    text = inputs + f"steps: {{x: a + b}}\noutputs: {{{tmp_path}/o: x}}\n"
    for base, words in (
        (base_folder, "line 3, column 6: inputs.a: .*\n  line 4, column 6: inputs.b: "),
        (root, "line 1, column 7: base: "),
    ):
        (tmp_path / "recipe.yaml").write_text(f"base: {base}\n{text}")
        with pytest.raises(InputError, match=words):
            run(read_recipe(tmp_path / "recipe.yaml"))


def test_what_cannot_be_saved_is_told_before_anything_is_written(
    root, modules, tmp_path, config, random_ia3, base_folder
):
    peft.save_adapter(tmp_path / "ia3", random_ia3(config), config, base_name=str(base_folder))
    recipe = Recipe(
        {"math": str(root / "math"), "scale": str(tmp_path / "ia3")},
        {"fine": Expression("math"), "mixed": Expression("math + scale")},
        {str(tmp_path / "o"): "fine", str(tmp_path / "p"): "mixed"},
    )
    with pytest.raises(InputError, match="PEFT's format holds LoRA, DoRA or IA3 modules; this"):
        run(recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["ia3"]


def test_an_input_may_be_on_the_hub(root, tmp_path, hub, base_folder):
    fetched = hub(root)
    steps, outputs = {"x": Expression("2*math")}, {str(tmp_path / "o"): "x"}
    run(Recipe({"math": "hf://ann/modules/math"}, steps, outputs, base=str(base_folder)))
    assert "math/provenance.json" in fetched[0] and "math/training.json" in fetched[0]
    assert "hf://ann/modules/math" in (tmp_path / "o" / "lineage.svg").read_text()
