import re
import time

import pytest

from lora_jax.errors import InputError
from lora_jax.peft import patterns
from lora_jax.peft.patterns import Patience, matching

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
def test_a_pattern_that_would_take_for_ever_is_given_up(monkeypatch, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(InputError, match="takes too long to match model"):
        matching(pattern, NAMES)
    assert time.monotonic() - began < 10


def test_patterns_that_take_long_together_are_given_up(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    patience = Patience()
    slow = r"(?:[a-z._\d]|[a-z._\d][a-z._\d]){0,9}[A-Z]"
    with pytest.raises(InputError, match="takes too long"):
        for n in range(10_000):
            matching(f"{slow}|{n}", NAMES, patience)
    assert 0 < n < 9_999


@pytest.mark.parametrize("pattern", ["q_prox{e<=1}", "q_pro{i}j", "{", r"a\{2\}", "a{}", "a{,}"])
def test_a_brace_that_begins_no_count_is_refused(pattern):
    """Where `re` reads a brace, `regex` reads "with at most one error"."""
    with pytest.raises(InputError, match="has a brace that begins no count"):
        matching(pattern, ["q_proj"])
    assert set(matching("q{1}_{,2}p{1,}roj{1,3}", ["q_proj"])) == {"q_proj"}


@pytest.mark.parametrize("pattern", ["((a{9999}){9999}){9999}", "(a{1,200}){200}", "a" * 5001])
def test_a_pattern_that_would_take_all_memory_is_not_compiled(pattern):
    with pytest.raises(InputError, match="is too large; name the modules in a list"):
        matching(pattern, NAMES)


def test_a_pattern_is_told_with_its_file():
    with pytest.raises(InputError, match=r"^a/adapter_config\.json: pattern '\(' is no regular"):
        matching("(", NAMES, Patience(where="a/adapter_config.json"))


@pytest.mark.parametrize("pattern", ["(", "*q_proj", "(" * 900 + ")" * 900, "(?R)", "[a"])
def test_what_python_does_not_take_for_a_pattern_is_refused(pattern):
    with pytest.raises(InputError, match="is no regular expression"):
        matching(pattern, NAMES)
