"""The papers' training settings, where a base model of any size can run them.

`papers.md` tables 1.2 and 2.2 are the source: PEM is "Composing Parameter-Efficient Modules with
Arithmetic Operations" (2306.14870, code), GenKnowSub is 2505.10939 (code). What a paper leaves to a
grid is set to the run that its released checkpoints name.
"""

from typing import Any

from lora_jax.errors import InputError

_GENKNOWSUB = {
    "kind": "lora",
    "targets": ("q_proj", "k_proj", "v_proj", "o_proj"),  # Phi-3's qkv_proj and o_proj
    "rank": 4,
    "alpha": 16.0,
    "dropout": 0.05,
    "learning_rate": 1e-4,
    "schedule": "cosine",
    "warmup": 0.03,
    "weight_decay": 0.0,
    "init_seed": 1234,
    "seed": 1234,
    "validation": 0.1,
}
_PEM = {
    "optimizer_beta1": 0.9,
    "optimizer_beta2": 0.98,
    "optimizer_eps": 1e-6,
    "weight_decay": 0.01,
    "clip": 1.0,
    "schedule": "linear",
    "warmup": 0.06,
    "length": 128,
    "evaluate_every": 100,
    "init_seed": 42,
    "seed": 42,
}
_PEM_LORA = _PEM | {
    "kind": "lora",
    "targets": ("q_proj", "v_proj"),
    "rank": 8,
    "alpha": 8.0,
    "dropout": 0.1,
    "learning_rate": 1e-3,
    "batch": 32,
    "steps": 6000,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Task modules: the whole chat-formatted text is learned, one row at a time, 16 a step.
    "genknowsub-task": _GENKNOWSUB
    | {"chat": True, "loss_on": "all", "clip": 2.0, "batch": 1, "accumulate": 16, "epochs": 1.0},
    # General modules: 507 tokens of context, the next 5 learned, 256 a step, 17 steps.
    "genknowsub-general": _GENKNOWSUB
    | {
        "objective": "next-tokens",
        "context": 507,
        "predict": 5,
        "batch": 16,
        "accumulate": 16,
        "steps": 17,
        "clip": 2.0,
    },
    # The GLUE runs whose names survive: LoRA rank 8 at 1e-3, IA3 at 2e-2.
    "pem-lora": _PEM_LORA,
    "pem-lora-roberta": _PEM_LORA | {"targets": ("query", "value")},
    "pem-ia3": _PEM
    | {
        "kind": "ia3",
        "ia3_layout": "pem",
        "learning_rate": 2e-2,
        "batch": 64,
        "steps": 1500,
    },
}


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset, by name."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
