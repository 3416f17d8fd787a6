"""The examples of docs/flax_models.md are run as they stand, and show what they say."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "flax_models.md").read_text(encoding="utf-8")
LINEN, NNX = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("code", [LINEN, NNX], ids=["linen", "nnx"])
def test_an_example_has_at_most_thirty_lines_of_code(code):
    assert len([line for line in code.splitlines() if line.strip()]) <= 30


def printed(code, capsys):
    exec(compile(code, "flax_models.md", "exec"), {})
    return ast.literal_eval(capsys.readouterr().out)


def test_two_modules_of_a_linen_model_do_both_tasks_in_sum(capsys):
    base, both = printed(LINEN, capsys)
    assert both < base / 2


def test_arrow_finds_an_inputs_module_in_an_nnx_model(capsys):
    losses = np.array(printed(NNX, capsys))
    told = np.array(ast.literal_eval(re.search(r"```\n(\[\[.*?)\n```", TEXT)[1]))
    np.testing.assert_allclose(losses, told, atol=0.02)
    base, *own, routed = losses.T
    assert (np.diag(own) < base / 2).all() and (routed < 1.3 * np.diag(own)).all()
