import json

import numpy as np

from compose.controls import untrained
from compose.diagnose import initial_share
from compose.expression import evaluate
from compose.inputs import load_input
from compose.routing.statistics import routing_statistics
from lora_jax.tokens import encode, load_tokenizer

Q = "self_attn.q_proj"


def two(folders):
    return [f"{name}={folders / name}" for name in ("x", "y")]


def test_a_composition_is_measured_and_told(command, folders, tmp_path, config, capsys):
    out = tmp_path / "out"
    unused = f"unused={tmp_path / 'nowhere'}"
    command("diagnose", "x - y", *two(folders), unused, "--space", "factor", "--out", out)
    said = capsys.readouterr().out
    found = json.loads((out / "diagnosis.json").read_text())
    assert (
        found["norms"].keys() == {"x", "y", "result"}
        and found["results"]["result"]["space"] == "factor"
    )
    assert found["interaction"]["result"] > 0.1 and "cross terms" in said
    x = load_input(folders / "x", config)
    want = initial_share(x, untrained(x, 0))
    assert abs(found["initial"]["x"] - want) < 1e-6 < want and found["initial"]["y"] > 0.9
    assert (out / "diagnosis.png").exists() and found["routing"] == {}
    assert said.splitlines()[-1] == str(out)


def test_a_library_has_its_members_first_draws_only_by_record(command, folders, tmp_path):
    command("diagnose", "mean(lib)", f"lib={folders / 'lib'}", "--out", tmp_path / "o")
    found = json.loads((tmp_path / "o" / "diagnosis.json").read_text())
    assert found["initial"] == {} and found["norms"].keys() == {"lib.x", "lib.y", "result"}


def test_a_routed_result_reads_a_text(
    command, folders, tmp_path, config, weights, base_folder, capsys
):
    text = tmp_path / "text.txt"
    text.write_text("one and two and three. " * 20)
    expression, out = "arrow(x, y, top_k=2)", tmp_path / "out"
    command("diagnose", expression, *two(folders), "--text", text, "--out", out)
    found = json.loads((out / "diagnosis.json").read_text())["routing"]["result"]
    assert found["modules"] == ["x", "y"] and found["top_k"] == 2
    found = found["projections"][Q]
    inputs = {name: load_input(folders / name, config) for name in ("x", "y")}
    ids = encode(load_tokenizer(base_folder), [text.read_text()])[0]
    tokens = np.array(ids[: len(ids) // 128 * 128]).reshape(-1, 128)[:8]
    assert len(tokens) == 3
    want = routing_statistics(config, weights, evaluate(expression, inputs), tokens)[Q]
    np.testing.assert_allclose(found["entropy"], want["entropy"], rtol=1e-4)
    said = capsys.readouterr().out
    for entropy in want["entropy"]:
        assert f"{entropy:.3f}" in said
    told = "".join(said.split())
    assert (
        "Theweightsofatokeninresulthaveameanentropyof" in told and "ofthemostthattherecanbe" in told
    )


def test_a_recipe_is_measured_and_its_outputs_are_left_alone(
    command, refused, folders, tmp_path, base_folder
):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "measured"
    text = (
        f"base: {base_folder}\ninputs: {{x: {folders / 'x'}, y: {folders / 'y'}}}\n"
        "steps:\n  both: {linear: [x, y], weights: [1, [0, 1]]}\n"
        f"outputs: {{{tmp_path}/o: both}}\n"
    )
    recipe.write_text(text)
    command("diagnose", recipe, "--out", out)
    found = json.loads((out / "diagnosis.json").read_text())
    assert found["norms"].keys() == {"x", "y", "both"} and not (tmp_path / "o").exists()
    assert found["results"]["both"]["made_by"] == "linear of x (1), y (0 to 1)"
    recipe.write_text(text.replace("linear", "linaer"))
    assert "line 4, column 10: steps.both.linaer: unknown method" in refused("diagnose", recipe)
    assert "say space: in the recipe" in refused("diagnose", recipe, "--space", "factor")


def test_a_text_wants_something_that_routes_and_words(refused, folders, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "routes none" in refused("diagnose", "x", *two(folders), "--text", empty)
    words = ("diagnose", "arrow(x, y, top_k=1)", *two(folders), "--text", empty)
    assert "holds no text" in refused(*words)
    assert "No such file" in refused(*words[:-1], tmp_path / "none.txt")


def test_what_is_wrong_is_told(refused, folders, tmp_path):
    assert "exists" in refused("diagnose", "x", *two(folders), "--out", folders)
    assert "is called result" in refused("diagnose", "result", f"result={folders / 'x'}")
