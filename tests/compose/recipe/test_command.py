import json
import re

import pytest

from compose.cli import Command
from compose.command import run
from compose.inputs import load_input
from compose.recipe.command import is_recipe
from lora_jax.errors import InputError


@pytest.fixture
def compose(written, tmp_path, monkeypatch):
    """A function that runs the command on a recipe's text and gives the folder of its outputs."""
    monkeypatch.setattr("compose.recipe.command.prepare", lambda: None)
    monkeypatch.setenv("COLUMNS", "300")

    def go(*inputs, text=None, **options):
        path = written() if text is None else written(text)
        run(Command(str(path), inputs, **options))
        return tmp_path / "out"

    return go


def test_a_recipe_is_a_file_and_a_name_may_end_like_one(tmp_path):
    (tmp_path / "r.yml").touch()
    assert is_recipe(str(tmp_path / "r.yml"), ["a=b"]) and is_recipe("gone.yaml", [])
    assert not is_recipe("a - b.yaml", ["a=x", "b.yaml=y"]) and not is_recipe("a - b", [])


def test_outputs_are_written_and_told(compose, config, capsys):
    out = compose()
    told = capsys.readouterr().out
    assert told.splitlines()[-2:] == [str(out / "both"), str(out / "routed")]
    assert "LoRA of rank 4" in told and "lost to rank" in told
    assert load_input(out / "both", config) and load_input(out / "routed", config)


def test_a_dry_run_tells_all_and_writes_nothing(compose, tmp_path, capsys):
    compose(dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    told = capsys.readouterr().out
    for words in ("both", "clean", "routed.clean", "LoRA of rank 4", "parameters", "holds both"):
        assert words in told
    assert "norm" not in told


def test_a_dry_run_counts_as_many_parameters_as_are_made(compose, capsys):
    counts = []
    for dry in (True, False):
        compose(dry_run=dry)
        counts.append(re.findall(r"\(?([\d,]+)\s+parameters", capsys.readouterr().out))
    assert counts[0] == counts[1] and len(counts[0]) >= 5


def test_inputs_may_be_given(compose, root):
    out = compose(f"wiki={root / 'math'}")
    record = json.loads((out / "routed" / "provenance.json").read_text())
    assert record["inputs"]["wiki"] == record["inputs"]["math"]
    assert f"wiki: {root / 'math'}" in record["recipe"]
    with pytest.raises(InputError, match=r"recipe\.yaml has no input 'wikki'; did you mean wiki"):
        compose("wikki=x")


def test_an_output_that_exists_is_replaced_only_if_asked(compose):
    out = compose()
    (out / "both" / "mark").touch()
    with pytest.raises(
        InputError, match=r"line 13, column 3: .*both exists; choose another folder"
    ):
        compose()
    assert (out / "both" / "mark").exists()
    compose(overwrite=True)
    assert not (out / "both" / "mark").exists()


def test_text_and_folders_are_told_together(compose):
    text = "inputs: {{math: gone, b: 1}}\nsteps: {{x: math - c}}\noutputs: {{o: x}}\n"
    with pytest.raises(InputError) as caught:
        compose(text=text)
    places = [part.split(":")[0] for part in str(caught.value).split("line ")[1:]]
    assert places == ["1, column 16", "1, column 25", "2, column 19"]


def test_what_has_no_effect_is_noted(compose, capsys):
    text = (
        "inputs: {{math: {root}/math, b: x}}\nsteps: {{y: math, x: math}}\noutputs: {{{out}: x}}\n"
    )
    compose(text=text)
    told = capsys.readouterr().err
    assert "note: no output needs the step y (line 2); it is left out" in told
    assert "the input b (line 1)" in told


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ({"out": "o"}, "a recipe's folders stand under its outputs"),
        ({"rank": 2}, "say rank: in a step"),
        ({"space": "factor"}, "say space: in the recipe"),
        ({"base": "b"}, "say base: in the recipe"),
        ({"merged": True}, "merge an output afterwards"),
    ],
)
def test_what_a_recipe_says_itself_is_no_flag(compose, option, remedy):
    with pytest.raises(InputError, match=rf"--{next(iter(option))} goes with an .*; {remedy}"):
        compose(**option)


def test_an_expression_needs_a_folder_and_has_no_dry_run():
    with pytest.raises(InputError, match="--out is missing"):
        run(Command("a", ("a=x",)))
    with pytest.raises(InputError, match="--dry-run is for recipes"):
        run(Command("a", ("a=x",), "o", dry_run=True))


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"gone\.yaml does not exist"):
        run(Command("gone.yaml", ()))
