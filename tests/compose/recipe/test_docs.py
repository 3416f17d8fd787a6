import re
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from compose import cli
from compose.inputs import load_input
from lora_jax import peft

FOLDER = Path(__file__).parents[3] / "docs"
DOCS = (FOLDER / "recipes.md").read_text()
EXAMPLES = sorted((FOLDER / "examples").glob("*.yaml"))


def blocks(language):
    """The examples in a language."""
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def test_the_examples_run_and_say_the_same(
    tmp_path, monkeypatch, config, random_lora, base_folder, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compose.recipe.command.prepare", lambda: None)
    for seed, name in enumerate(("math", "code", "wiki")):
        adapter = random_lora(config, seed, targets=("q_proj", "up_proj", "o_proj"))
        peft.save_adapter(tmp_path / "adapters" / name, adapter, config)
    (text,) = blocks("yaml")
    Path("recipe.yaml").write_text(text.replace("smollm2-135m", str(base_folder)))
    monkeypatch.setattr("sys.argv", ["lora-compose", "recipe.yaml", "--dry-run"])
    cli.main()
    assert not Path("out").exists() and "LoRA of rank 4" in capsys.readouterr().out
    code = "".join(blocks("python")).replace('"smollm2-135m"', repr(str(base_folder)))
    scope = {}
    exec(code, scope)
    assert load_input(Path("out/routed"), config).names == ("clean", "code")
    assert Path("out/both/lineage.svg").exists() and Path("out/both/provenance.json").exists()
    assert {leaf.shape[0] for leaf in jax.tree.leaves(scope["many"])} == {5}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_worked_examples_run(
    tmp_path, monkeypatch, config, random_lora, base_folder, capsys, example
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compose.recipe.command.prepare", lambda: None)
    recipe = yaml.safe_load(example.read_text())
    for seed, folder in enumerate(recipe["inputs"].values()):
        peft.save_adapter(Path(folder), random_lora(config, seed), config)
    Path("recipe.yaml").write_text(
        yaml.safe_dump({"base": str(base_folder)} | recipe, sort_keys=False)
    )
    monkeypatch.setattr("sys.argv", ["lora-compose", "recipe.yaml"])
    cli.main()
    made = [load_input(Path(folder), config) for folder in recipe["outputs"]]
    assert all((Path(folder) / "lineage.svg").exists() for folder in recipe["outputs"])
    bits = [b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(value)) for value in made]
    assert len(set(bits)) == len(bits)  # no control is what it is to control
    assert "no output needs" not in capsys.readouterr().err
