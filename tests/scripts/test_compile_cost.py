import re

import pytest

from lora_jax import models
from scripts import compile_cost

KINDS = {file: kind for kind, file in models.FAMILIES.items()}.values()


@pytest.mark.parametrize("lower", [compile_cost.forward, compile_cost.training_step])
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_does_not_grow_with_depth(kind, lower):
    """Two layers and thirty-two are one program, but for the numbers in it."""
    shallow, deep = (program(lower, compile_cost.model(kind, layers)) for layers in (2, 32))
    assert len(shallow) == len(deep) > 150
    assert all(one == other for one, other in zip(shallow, deep, strict=True))


def program(lower, config) -> list[str]:
    """The lines of a program before it is compiled, without numbers and constants."""
    lines = lower(config).as_text().splitlines()
    return [re.sub(r"dense<[^>]*>|\d+", "", line) for line in lines]


def test_a_model_has_the_depth_asked_for_and_one_size():
    configs = [compile_cost.model(kind, 5) for kind in KINDS]
    assert {(c.layers, c.width, c.vocabulary) for c in configs} == {(5, 256, 4096)}


def test_the_fastest_round_counts(monkeypatch):
    """Shallow and deep take turns, so that a slow spell does not fall on one of them alone."""
    times = iter([3.0, 5.0, 2.0, 6.0])
    monkeypatch.setattr(compile_cost, "compile_seconds", lambda lower, config: next(times))
    assert compile_cost.fastest(compile_cost.forward, [None, None], 2) == [2.0, 5.0]


def test_a_compilation_takes_time():
    config = compile_cost.model("gpt2", 2)
    assert compile_cost.compile_seconds(compile_cost.forward, config) > 0.02
