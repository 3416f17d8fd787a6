"""A run's data: what is held out is never trained on, and what is cut is told."""

from dataclasses import replace

import pytest

from lora_jax.errors import InputError
from train.config import Config
from train.data import plan_data, split


def places(plan):
    return {e.place for e in plan.examples}


def test_the_held_out_share_is_apart_and_of_the_seed(config_of, base):
    plans = [plan_data(config_of(validation=0.2, seed=seed), base, None) for seed in (0, 0, 1)]
    for plan, held_out in plans:
        assert len(held_out.examples) == 8 and len(plan.examples) == 32
        assert not places(plan) & places(held_out)
    held = [places(held_out) for _, held_out in plans]
    assert held[0] == held[1] != held[2]


def test_validation_data_takes_the_place_of_a_share(config_of, base, write_rows):
    other = write_rows([{"prompt": "a", "completion": "b"}])
    plan, held_out = plan_data(config_of(validation_data=(other,)), base, None)
    assert len(plan.examples) == 40
    assert places(held_out) == {f"{other} line 1"}


def test_without_validation_nothing_is_held_out(config_of, base):
    plan, held_out = plan_data(config_of(validation=0.0), base, None)
    assert held_out is None and len(plan.examples) == 40


def test_a_limit_leaves_so_many_rows(config_of, base):
    plan, held_out = plan_data(config_of(limit=10), base, None)
    assert len(plan.examples) + len(held_out.examples) == 10


def test_a_share_of_everything_is_refused():
    with pytest.raises(InputError, match=r"1 examples are too few to hold out 0\.9"):
        split((object(),), 0.9, 0)


def test_rows_longer_than_the_context_are_refused(config_of, base):
    with pytest.raises(InputError, match=r"rows of 511 .* context of 128; lower --length"):
        plan_data(config_of(length=511), base, None)
    with pytest.raises(InputError, match=r"rows of 512 .* lower --context and --predict"):
        plan_data(config_of(objective="next-tokens"), base, None)


def test_unless_told_rows_are_at_most_as_long_as_the_context(config_of, base, write_rows, capsys):
    path = write_rows(
        [{"prompt": "p" * 200, "completion": "c"}, {"prompt": "p", "completion": "c"}]
    )
    config = replace(config_of(data=(path,), validation=0.0), length=Config.length)
    plan_data(config, base, None)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "--length is 128, the base model's context"
    assert f"{path}: 1 of 2 rows are cut to --length 128" in told


def test_what_is_cut_is_told(config_of, base, write_rows, capsys):
    rows = [{"prompt": "p" * n, "completion": "c"} for n in (1, 7, 20)]
    path = write_rows(rows)
    plan_data(config_of(data=(path,), length=8, validation=0.0), base, None)
    assert capsys.readouterr().err.splitlines() == [
        f"{path}: 2 of 3 rows are cut to --length 8",
        f"{path}: 1 of 3 rows are left out, with nothing to learn in reach",
    ]


def test_nothing_is_told_where_nothing_is_cut(config_of, base, capsys):
    plan_data(config_of(), base, None)
    assert capsys.readouterr().err == ""


def test_packing_makes_fewer_rows(config_of, base):
    plan, _ = plan_data(config_of(pack=True), base, None)
    assert len(plan.rows) < len(plan.examples) / 2
