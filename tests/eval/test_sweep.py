import pytest

from eval import sweep
from lora_jax.errors import InputError


def test_values_are_a_list_or_a_range():
    found = sweep.read_sweep(["x=0:1:5", "y=0.3,-2"])
    assert found == {"x": (0, 0.25, 0.5, 0.75, 1), "y": (0.3, -2)}
    assert sweep.read_sweep(["x=0:0.3:4"])["x"] == (0, 0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["x"], "'x' is not NAME=VALUES"),
        (["2=1"], "'2=1' is not NAME=VALUES"),
        (["x=1", "x=2"], "'x=2' is not NAME=VALUES of a new name"),
        (["x=a"], "write x=0,0.5,1 or x=0:1:11"),
        (["x=0:1"], "write x=0,0.5,1"),
        (["x=0:1:1"], "write x=0,0.5,1"),
        (["x=1,1"], "write x=0,0.5,1"),
        (["x=nan"], "write x=0,0.5,1"),
    ],
)
def test_other_values_are_refused(texts, told):
    with pytest.raises(InputError, match=told):
        sweep.read_sweep(texts)


def test_settings_are_all_combinations_of_what_is_open():
    over = {"x": (0.0, 1.0), "y": (2.0, 3.0), "z": (9.0,)}
    assert sweep.settings("a - {x}*b + { y }*c", over) == [
        {"x": 0, "y": 2},
        {"x": 0, "y": 3},
        {"x": 1, "y": 2},
        {"x": 1, "y": 3},
    ]
    assert sweep.settings("a + b", over) == [{}]
    assert sweep.filled("a - {x}*b + { y }*{x}*c", {"x": 0.1, "y": -3}) == "a - 0.1*b + -3*0.1*c"
    assert sweep.told({"x": 0.1, "y": 3.0}) == "x=0.1 y=3"


def test_what_is_open_and_not_swept_and_the_reverse_are_refused():
    with pytest.raises(InputError, match="no values for y in"):
        sweep.settings("{x}*a - {y}*b", {"x": (1.0,)})
    with pytest.raises(InputError, match=r"--sweep y: no --compare has \{y\} in it"):
        sweep.refuse_unused(["{x}*a"], {"x": (1.0,), "y": (1.0,)})
    with pytest.raises(InputError, match="would become 1600 columns"):
        sweep.settings("{x} {y}", {"x": tuple(range(40)), "y": tuple(range(40))})
