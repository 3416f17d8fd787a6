"""The example in docs/serving.md does what its comments say."""

import re
from pathlib import Path

import pytest

from lora_jax import bases

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("base", ["tiny", pytest.param("smollm2-135m", marks=pytest.mark.slow)])
def test_the_example_runs_as_printed(base, base_folder, capsys, monkeypatch):
    """On a tiny base, whose tokens are fewer; on the page's own where slow tests run."""
    code, load = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], bases.load_base
    if base == "tiny":
        monkeypatch.setattr(bases, "load_base", lambda name: load(str(base_folder)))
        code = code.replace("[504, 3575, 282, 4649, 314]", "[5, 35, 28, 46, 31]")
    exec(compile(code, "serving.md", "exec"), {})
    *changes, compiled = re.findall(r"[\d.]+(?:e-?\d+)?", capsys.readouterr().out)
    assert [float(change) > 0 for change in changes] == [True, True, False]
    assert compiled == "1"
