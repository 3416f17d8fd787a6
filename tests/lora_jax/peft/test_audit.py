"""What is told of tensors that are not what a config says, or that the base has no place for."""

from dataclasses import replace

import numpy as np
import pytest

from lora_jax.peft import audit, names

EMBED, NORM = "model.embed_tokens", "model.norm.weight"
FIRST, SECOND = (f"model.layers.{n}" for n in (0, 1))
Q, DOWN = f"{FIRST}.self_attn.q_proj", f"{FIRST}.mlp.down_proj"
STORED = [Q, DOWN, f"{SECOND}.self_attn.q_proj", f"{SECOND}.mlp.down_proj"]
RESIZED = "; if the adapter's vocabulary was resized, give the resized model as the base"


@pytest.fixture
def slots(config):
    return names.slots(config)


@pytest.fixture
def weights(config):
    return names.weights(config)


def ones(*shape):
    return np.ones(shape, np.float32)


def lora(size_in, size_out, rank=3, **others):
    """The factors of a LoRA, and what else it has."""
    return {"lora_A": ones(rank, size_in), "lora_B": ones(size_out, rank), **others}


def test_targets_with_tensors_and_nothing_else_are_as_they_should_be(settings, slots):
    assert audit.target_problems(settings(), slots, STORED) == []
    assert audit.target_problems(settings(), slots, [*STORED, "model.layers.0.c_attn"]) == []


def test_a_target_without_tensors(settings, slots):
    some = settings(targets=("q_proj", "down_proj", "v_proj"))
    assert audit.target_problems(some, slots, STORED) == [
        f"{layer}.self_attn.v_proj is among the targets of {some.where} and has no tensor"
        for layer in (FIRST, SECOND)
    ]
    assert some.where.endswith("adapter_config.json")


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"targets": ("q_proj",)}, [DOWN, f"{SECOND}.mlp.down_proj"]),
        ({"excluded": ("layers.1.mlp.down_proj",)}, [f"{SECOND}.mlp.down_proj"]),
        ({"targets": None}, []),  # what was trained is not said
    ],
)
def test_tensors_of_what_is_no_target(settings, slots, changes, lost):
    some = settings(**changes)
    assert audit.target_problems(some, slots, STORED) == [
        f"{name} has tensors and is not among the targets of {some.where}" for name in lost
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embeddings_module_may_be_stored_for_the_unembedding_too(settings, slots, tied):
    some = settings(targets=("q_proj", "down_proj", "embed_tokens"), tied=tied)
    found = audit.target_problems(some, slots, [*STORED, EMBED, "lm_head"])
    assert [text.split()[0] for text in found] == ([] if tied else ["lm_head"])


@pytest.mark.parametrize(
    ("changes", "roles", "told"),
    [
        ({}, "lora_A lora_B", []),
        ({}, "lora_A", ["it lacks lora_B"]),
        ({"dora": True}, "lora_A lora_B", ["it lacks lora_magnitude_vector"]),
        ({"lora_bias": True}, "lora_A lora_B", ["it lacks lora_B.bias"]),
        (
            {},
            "lora_A lora_B lora_magnitude_vector",
            ["it has lora_magnitude_vector, for which use_dora does not ask"],
        ),
        (
            {},
            "lora_A lora_B lora_B.bias",
            ["it has lora_B.bias, for which lora_bias does not ask"],
        ),
        ({"kind": "IA3"}, "ia3_l", []),
        (
            {"kind": "IA3"},
            "lora_A",
            ["it lacks ia3_l", "it has lora_A, for which peft_type does not ask"],
        ),
    ],
)
def test_what_the_config_asks_for_must_be_there_and_nothing_else(settings, changes, roles, told):
    tensors = dict.fromkeys(roles.split(), ones(1))
    assert audit.role_problems(settings(**changes), "it", tensors) == told


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (lora(64, 32), []),
        (
            lora(64, 32) | {"lora_A": ones(2, 64)},
            ["it: factors (2, 64) and (32, 3) do not meet"],
        ),
        (lora(64, 32) | {"lora_B": ones(3)}, ["it: factors (3, 64) and (3,) do not meet"]),
        (lora(48, 32), ["it maps 48 to 32, the base 64 to 32"]),
        (lora(64, 32, rank=4), ["it has rank 4, the config says 3"]),
        (
            lora(64, 16, rank=0),
            ["it maps 64 to 16, the base 64 to 32", "it has rank 0, the config says 3"],
        ),
        (
            lora(64, 32, lora_magnitude_vector=ones(5)),
            ["it has lora_magnitude_vector of shape (5,), not (32,)"],
        ),
        (
            lora(64, 32, **{"lora_B.bias": ones(64)}),
            ["it has lora_B.bias of shape (64,), not (32,)"],
        ),
        (
            lora(64, 32, lora_magnitude_vector=0 * ones(32)),
            ["it has a lora_magnitude_vector with a 0, which no kernel's column gives"],
        ),
    ],
)
def test_factors_are_of_the_bases_sizes_and_the_configs_rank(slots, tensors, told):
    assert audit.lora_problems(slots[DOWN], "it", tensors, 3) == told


def test_a_rank_of_zero_is_refused_even_if_the_config_says_it(slots):
    told = audit.lora_problems(slots[DOWN], "it", lora(64, 32, rank=0), 0)
    assert told == ["it has rank 0, the config says 0"]


def test_an_adapter_of_another_vocabulary_is_told_the_likely_reason(slots):
    told = audit.lora_problems(slots[EMBED], "it", lora(300, 32), 3)
    assert told == [f"it maps 300 to 32, the base 264 to 32{RESIZED}"]


@pytest.mark.parametrize(
    ("shape", "on_input", "wanted"),
    [
        ((1, 64), True, None),
        ((32, 1), False, None),
        ((1, 64), None, None),
        ((32, 1), None, None),
        ((1, 5), True, (1, 64)),
        ((32, 1), True, (1, 64)),
        ((1, 64), False, (32, 1)),
        ((1, 32), None, (1, 64)),
        ((64, 1), None, (32, 1)),
        ((32,), None, (32, 1)),
    ],
)
def test_scales_are_of_the_bases_size_and_on_the_configs_side(slots, shape, on_input, wanted):
    told = audit.ia3_problems(slots[DOWN], "it", ones(*shape), on_input)
    assert told == ([f"it has ia3_l of shape {shape}, not {wanted}"] if wanted else [])


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        (None, [None, None]),
        ((), [None, None]),
        (("down_proj",), [False, True]),
        (r".*\.self_attn\..*", [True, False]),
        ("down_proj", [False, False]),  # a pattern matches the whole name
    ],
)
def test_the_side_of_ia3_is_what_the_config_says(settings, inputs, wanted):
    assert list(audit.sides(settings(inputs=inputs), [Q, DOWN]).values()) == wanted


def test_an_embedding_takes_no_scales(slots):
    assert audit.ia3_problems(slots[EMBED], EMBED, ones(32, 1), False) == [
        f"{EMBED} is an embedding, which PEFT's IA3 does not rescale"
    ]


def test_base_weights_are_stored_where_the_config_asks_for_them(settings, weights):
    def told(*stored, **changes):
        tensors = {name: ones(*weights[name].leaf.stored_shape()) for name in stored}
        return audit.saved_problems(settings(**changes), weights, tensors, [Q])

    why = "though modules_to_save or bias asks for one"
    assert told() == told(NORM, saved=("model.norm",)) == []
    assert told(saved=("model.norm",)) == [f"{NORM} has no tensor, {why}"]
    assert told(NORM) == [f"{NORM} is stored, though neither modules_to_save nor bias asks for it"]
    found = told(NORM, saved=("norm",))  # as in PEFT the layers' norms end so too
    assert f"{FIRST}.input_layernorm.weight has no tensor, {why}" in found and len(found) == 4


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("none", []), ("lora_only", [Q]), ("all", [Q, f"{FIRST}.self_attn.k_proj"])],
)
def test_biases_are_stored_where_the_config_asks_for_them(settings, config, kind, wanted):
    weights = names.weights(replace(config, qkv_bias=True))
    found = audit.saved_problems(settings(biases=kind), weights, {}, [Q])
    told = [text.split()[0] for text in found]
    assert set(told) >= {f"{name}.bias" for name in wanted}
    assert len(told) == {"none": 0, "lora_only": 1, "all": 6}[kind]


def test_the_weights_of_tokens_may_always_be_stored(settings, weights):
    """PEFT stores them beside a module of theirs, and one of a tied pair."""
    tokens = {f"{EMBED}.weight": ones(264, 32)}
    assert audit.saved_problems(settings(), weights, tokens, [Q]) == []
    tied = settings(tied=True, saved=("embed_tokens", "lm_head"))
    assert audit.saved_problems(tied, weights, tokens, [Q]) == []


def test_a_stored_weight_is_of_the_bases_shape_and_of_all_layers(settings, weights):
    some = settings(saved=("layers.0.input_layernorm", "embed_tokens"))
    stored = {f"{FIRST}.input_layernorm.weight": ones(32), f"{EMBED}.weight": ones(300, 32)}
    assert audit.saved_problems(some, weights, stored, [Q]) == [
        f"{FIRST}.input_layernorm.weight is stored, but {SECOND}.input_layernorm.weight is not: "
        "all layers or none",
        f"{EMBED}.weight has shape (300, 32), the base (264, 32){RESIZED}",
    ]


def test_a_copy_shows_that_the_base_is_the_right_one(weights):
    same = {f"{EMBED}.weight": ones(264, 32), NORM: ones(32)}
    assert audit.copy_problems(weights, same) == []
    assert audit.copy_problems(weights, {f"{EMBED}.weight": ones(265, 32), NORM: ones(31)}) == [
        f"{EMBED}.weight has shape (265, 32), the base (264, 32){RESIZED}",
        f"{NORM} has shape (31,), the base (32,)",
    ]
