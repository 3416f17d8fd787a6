import re
from pathlib import Path

import jax

from compose import cli
from compose.inputs import load_input
from lora_jax import peft

DOCS = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text()


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
