from dataclasses import replace

import pytest

from lora_jax.peft.targets import by_pattern, kept_whole, targeted

LAYERS = [f"model.layers.{n}.{p}" for n in (0, 1, 11) for p in ("attn.q_proj", "mlp.up_proj")]
MODULES = dict.fromkeys(LAYERS, True) | {"lm_head": False, "model.embed_tokens": False}


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (("q_proj",), [name for name in MODULES if "q_proj" in name]),
        (("proj", "head"), []),
        (("layers.1.mlp.up_proj", "lm_head"), ["model.layers.1.mlp.up_proj", "lm_head"]),
        (r".*\.1\..*", [name for name in MODULES if ".1." in name]),
        ("q_proj", []),
        ("all-linear", LAYERS),
        ("ALL-LINEAR", LAYERS),
    ],
)
def test_targets_are_endings_or_a_pattern_or_all_linear(settings, targets, wanted):
    assert targeted(settings(targets=targets), MODULES) == set(wanted)


def test_no_targets_say_nothing(settings):
    assert targeted(settings(targets=None), MODULES) is None


@pytest.mark.parametrize(
    "excluded", [("model.layers.0.attn.q_proj",), ("layers.0.attn.q_proj",), r".*\.0\..*"]
)
def test_what_is_excluded_is_no_target(settings, excluded):
    found = targeted(settings(targets=("q_proj",), excluded=excluded), MODULES)
    assert found == {"model.layers.1.attn.q_proj", "model.layers.11.attn.q_proj"}


def test_what_is_kept_whole_is_no_target(settings):
    some = settings(targets=("q_proj", "lm_head"), saved=("lm_head", "layers.1"))
    found = targeted(some, MODULES)
    assert found == {"model.layers.0.attn.q_proj", "model.layers.11.attn.q_proj"}


@pytest.mark.parametrize("names", [(), ("layers",), ("blocks", "layers")])
def test_some_layers(settings, names):
    some = settings(targets=("q_proj", "lm_head"), layers=(1,), layer_names=names)
    assert targeted(some, MODULES) == {"model.layers.1.attn.q_proj"}
    assert not targeted(replace(some, layer_names=("h",)), MODULES)


def test_a_layers_number_is_the_first_in_its_name(settings):
    modules = {f"encoder.block.{n}.layer.{m}.q": True for n in range(2) for m in range(2)}
    some = settings(targets=("q",), layers=(1,))
    assert targeted(some, modules) == {n for n in modules if n.startswith("encoder.block.1.")}


def test_the_first_pattern_gives_the_number():
    patterns = {r"layers\.0\..*": 1, "q_proj": 2, "attn.q_proj": 3, "roj": 4}
    found = by_pattern(patterns, 9, LAYERS)
    assert found == dict(zip(LAYERS, (1, 1, 2, 9, 2, 9), strict=True))


def test_modules_kept_whole_are_known_by_their_end_as_in_peft(settings):
    some = settings(saved=("head", "model.norm"))
    assert kept_whole(some, "lm_head") and kept_whole(some, "lm_head.dense")
    assert kept_whole(some, "model.norm") and not kept_whole(some, "model.layers.0.norm")
