import re
import time

import pytest

from lora_jax.errors import InputError
from lora_jax.peft.patterns import matching

NAMES = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(12) for p in "qkvo"]


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj",
        r"model\.layers\.(1|2|3).*",
        r"(.*\.)?(self_attn.q_proj)",
        r".*layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:k_proj|gate_proj)",
        r"q_proj",
        r"(?i).*Q_PROJ$",
    ],
)
def test_it_matches_as_python_does(pattern):
    assert set(matching(pattern, NAMES)) == {n for n in NAMES if re.fullmatch(pattern, n)}


def test_a_match_gives_its_groups():
    found = matching(r".*\.(?P<number>\d+)\..*", NAMES[:1] + NAMES[-1:])
    assert [match["number"] for match in found.values()] == ["0", "11"]


@pytest.mark.parametrize("pattern", [r"(.|..|...)*[A-Z]", r"([a-z._\d]|[a-z._\d][a-z._\d])*[A-Z]"])
def test_a_pattern_that_would_take_for_ever_is_given_up(pattern):
    began = time.monotonic()
    with pytest.raises(InputError, match="takes over 1 s to match model"):
        matching(pattern, NAMES)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("pattern", ["((a{9999}){9999}){9999}", "(a{1,200}){200}", "a" * 5001])
def test_a_pattern_that_would_take_all_memory_is_not_compiled(pattern):
    with pytest.raises(InputError, match="is too large; name the modules in a list"):
        matching(pattern, NAMES)


@pytest.mark.parametrize("pattern", ["(", "*q_proj", "(" * 900 + ")" * 900, "(?R)", "[a"])
def test_what_python_does_not_take_for_a_pattern_is_refused(pattern):
    with pytest.raises(InputError, match="is no regular expression"):
        matching(pattern, NAMES)
