from dataclasses import replace

import pytest

from lora_jax import models
from lora_jax.peft import names


@pytest.mark.parametrize(
    ("tensor", "module", "role"),
    [
        ("base_model.model.h.0.q.lora_A.weight", "h.0.q", "lora_A"),
        ("h.0.q.lora_B.default.weight", "h.0.q", "lora_B"),
        ("h.0.q.lora_B.bias", "h.0.q", "lora_B.bias"),
        ("base_model.model.wte.lora_embedding_A", "wte", "lora_embedding_A"),
        ("wte.lora_embedding_B.default", "wte", "lora_embedding_B"),
        ("h.0.q.lora_magnitude_vector", "h.0.q", "lora_magnitude_vector"),
        ("h.0.q.lora_magnitude_vector.default.weight", "h.0.q", "lora_magnitude_vector"),
        ("h.0.q.ia3_l", "h.0.q", "ia3_l"),
        ("base_model.model.lm_head.weight", "lm_head", "weight"),
        ("lm_head.modules_to_save.default.weight", "lm_head", "weight"),
        ("classifier.modules_to_save.default.dense.bias", "classifier.dense", "bias"),
        ("h.0.q.base_layer.bias", "h.0.q", "base_layer.bias"),
        ("wte.base_layer.weight", "wte", "base_layer.weight"),
        ("prompt_embeddings", "prompt_embeddings", ""),
    ],
)
def test_a_tensors_name_tells_its_module_and_its_role(tensor, module, role):
    assert names.parsed(tensor) == (module, role)


def test_the_shortest_endings_that_no_other_has():
    every = [f"h.{n}.{p}" for n in range(2) for p in ("a.out", "b.out", "b.in")]
    assert set(names.shortest(every[::3], every[1::3] + every[2::3]).values()) == {"a.out"}
    assert set(names.shortest(every, []).values()) == {"out", "in"}
    assert names.shortest(["h.0.b.in"], ["h.1.b.in"]) == {"h.0.b.in": "h.0.b.in"}


def test_patterns_give_back_every_number():
    numbers = {f"h.{n}.{p}": 4 for n in range(3) for p in ("q", "v")}
    numbers |= {"h.0.q": 2, "h.1.q": 3, "h.2.q": 3}
    assert names.patterns(numbers) == (4, {"h.0.q": 2, "h.1.q": 3, "h.2.q": 3})
    assert names.patterns(dict.fromkeys(numbers, 5)) == (5, {})
    assert names.patterns({"h.0.q": 1, "h.0.v": 2, "h.1.v": 2}) == (2, {"q": 1})


def test_every_projection_and_both_embeddings_take_modules(config):
    slots = names.slots(config)
    assert config.tied and slots["lm_head"].path == "unembed"
    assert slots["model.embed_tokens"].embedding and not slots["model.embed_tokens"].linear
    inside = {slot.path for slot in slots.values() if slot.linear}
    assert inside == set(models.projections(config))
    assert len(slots) == len(inside) * config.layers + 2
    assert names.slots(replace(config, tied=False)) == slots
