import re

import pytest

from lora_jax import models
from scripts import benchmark_compile

KINDS = {file: kind for kind, file in models.FAMILIES.items()}.values()


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_does_not_grow_with_depth(kind):
    """Two layers and thirty-two are one program, but for the numbers in it."""
    shallow, deep = (program(benchmark_compile.model(kind, layers)) for layers in (2, 32))
    assert len(shallow) == len(deep) > 500
    assert all(one == other for one, other in zip(shallow, deep, strict=True))


def program(config) -> list[str]:
    """The lines of the step before it is compiled, without numbers and constants."""
    lines = benchmark_compile.traced(config).as_text().splitlines()
    return [re.sub(r"dense<[^>]*>|\d+", "", line) for line in lines]


def test_a_model_has_the_depth_asked_for_and_one_size():
    configs = [benchmark_compile.model(kind, 5) for kind in KINDS]
    assert {(c.layers, c.width, c.vocabulary) for c in configs} == {(5, 256, 4096)}


def test_a_compilation_takes_time():
    assert benchmark_compile.compile_seconds(benchmark_compile.model("gpt2", 2)) > 0.05
