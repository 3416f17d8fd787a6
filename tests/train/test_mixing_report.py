from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lora_jax.files import read_json
from train import mixing_report
from train.config import Mixing
from train.mixing import Mix

NAMES = ("x", "y")


def texts(table) -> list[list[str]]:
    return [list(column.cells) for column in table.columns]


def test_weights_of_every_kind_are_tables_of_modules_by_layers():
    assert mixing_report.rows(jnp.ones(2))[""].shape == (2, 1)
    assert mixing_report.rows(jnp.ones((2, 5)))[""].shape == (2, 5)
    by_path = mixing_report.rows({"q": jnp.ones((2, 5)), "head": jnp.ones(2)})
    assert by_path["q"].shape == (2, 5) and by_path["head"].shape == (2, 1)


def test_a_table_has_the_mean_and_the_ends():
    [names, means, low, high] = texts(
        mixing_report.weight_table(NAMES, jnp.array([[0.0, 1.0], [0.5, -0.5]]))
    )
    assert names == list(NAMES) and means == ["+0.500", "+0.000"]
    assert (low, high) == (["+0.000", "-0.500"], ["+1.000", "+0.500"])
    assert texts(mixing_report.weight_table(NAMES, jnp.ones(2)))[2] == ["", ""]


def test_the_record_has_every_weight_by_name(tmp_path):
    (tmp_path / "a").mkdir()
    weights = {"q": jnp.array([[0.25, 1.0], [0.5, -0.5]]), "head": jnp.array([1.0, 0.0])}
    mix = Mix(NAMES, ({}, {}), {"x": Path(tmp_path / "a")})
    lost = {"q": np.array([0.1, 0.2])}
    mixing_report.write_mixing(tmp_path, Mixing(per="projection"), mix, weights, lost)
    record = read_json(tmp_path / mixing_report.FILE)
    assert record["weights"] == {
        "x": {"head": 1.0, "q": [0.25, 1.0]},
        "y": {"head": 0.0, "q": [0.5, -0.5]},
    }
    assert record["per"] == "projection" and record["truncation_error"] == {"q": [0.1, 0.2]}
    assert record["modules"]["x"]["sha256"]
    assert (tmp_path / mixing_report.FIGURE).stat().st_size > 1000
