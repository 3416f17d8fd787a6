"""Numbers that make no sense are refused together, before anything is read."""

import pytest

from eval.config import Evaluation, checked
from lora_jax.errors import InputError


def test_the_defaults_are_sound():
    assert checked(Evaluation()) == Evaluation()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"limit": 0}, "--limit must be at least 1; got 0"),
        ({"batch_tokens": 0}, "--batch-tokens must be at least 1; got 0"),
        ({"seed": -1}, r"--seed must lie in \[0, 2\*\*32\); got -1"),
        ({"window": 1}, "--window must be at least 2; got 1"),
        ({"stride": 0}, r"--stride must lie in \[1, --window 1024\); got 0"),
        ({"stride": 1024}, "--stride must lie"),
        ({"limit": -1, "seed": -1}, "--limit .*; --seed"),
    ],
)
def test_wrong_numbers_are_refused(changes, message):
    with pytest.raises(InputError, match=f"lora-eval: .*{message}"):
        checked(Evaluation(**changes))
