"""Metrics survive a kill and a resumption; the curve is drawn whatever there is to draw."""

import json
import math

import pytest

from lora_jax.progress import say
from lora_jax.provenance import environment
from train.record import append_metrics, draw_losses, forget_after, provenance, read_metrics


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        append_metrics(path, {"step": step, "loss": 1 / step})
    return path


def test_a_line_cut_off_by_a_kill_is_left_out(metrics):
    metrics.write_text(metrics.read_text()[:-9])
    assert [row["step"] for row in read_metrics(metrics)] == [1, 2, 3, 4]


def test_steps_that_are_taken_again_are_forgotten(metrics):
    metrics.write_text(metrics.read_text()[:-9])
    forget_after(metrics, 2)
    append_metrics(metrics, {"step": 3, "loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(metrics)] == [
        (1, 1),
        (2, 0.5),
        (3, 9),
    ]


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics(tmp_path / "absent.jsonl") == []
    forget_after(tmp_path / "absent.jsonl", 0)
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_numbers_that_json_lacks_are_null(tmp_path):
    append_metrics(tmp_path / "m.jsonl", {"step": 1, "loss": math.nan, "norm": math.inf})
    row = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"step": 1, "loss": None, "norm": None}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": None}],
        [{"step": 1, "loss": 2.0}, {"step": 1, "validation_loss": 1.0}],
        [{"step": n, "loss": 2.0} for n in range(3)],
    ],
)
def test_the_curve_is_a_picture(tmp_path, rows):
    draw_losses(rows, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_provenance_tells_the_data_apart(config_of, base, write_rows):
    def hashes(rows):
        told = provenance(config_of(data=(write_rows(rows), "hub:a/b")), base)
        return list(told["data_sha256"].values())

    assert hashes([{"n": 1}]) == hashes([{"n": 1}]) != hashes([{"n": 2}])


def test_provenance_tells_what_every_result_tells(config_of, base):
    told = provenance(config_of(), base)
    assert told.items() >= environment().items() and told["base_sha256"] == base.digest


def test_a_note_is_one_line_as_it_stands(capsys):
    note = "a [bold]name[/bold] " + "long " * 40
    say(note)
    assert capsys.readouterr().err == note + "\n"
