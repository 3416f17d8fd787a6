"""Merging against PEFT's add_weighted_adapter and against mergekit's merge methods."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils

from compose.merging.elementwise import ELEMENTWISE
from compose.merging.merge import merge
from lora_jax.modules import LoRA

MERGEKIT = Path(sys.prefix) / "mergekit"  # where `make parity` puts it
SIZES = {"wide": (24, 40), "tall": (36, 20)}
ALPHAS = (8.0, 2.0, 6.0)
WEIGHTS = [1.0, -0.6, 0.8]


def holder(alphas, targets):
    """A PEFT model of two projections under random adapters of rank 4."""
    torch.manual_seed(0)
    layers = {name: torch.nn.Linear(*size, bias=False) for name, size in SIZES.items()}
    model = None
    for number, (alpha, names) in enumerate(zip(alphas, targets, strict=True)):
        settings = LoraConfig(r=4, lora_alpha=alpha, target_modules=names, init_lora_weights=False)
        if model is None:
            model = get_peft_model(torch.nn.ModuleDict(layers), settings, str(number))
        else:
            model.add_adapter(str(number), settings)
    return model


def read(model, name):
    """One of a PEFT model's adapters as a module of ours."""
    found = {}
    for path in SIZES:
        layer = model.base_model.model[path]
        if name in getattr(layer, "lora_A", {}):
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            a, b = (jnp.asarray(x.detach().numpy().T)[None] for x in (a, b))
            found[path] = LoRA(a, b, layer.scaling[name])
    return found


def delta(module):
    a, b = (np.asarray(x, np.float64) for x in (module.a, module.b))
    return module.scale * a @ b


CASES = [
    ("linear", "factor", {}),
    ("cat", "delta", {}),
    ("svd", "delta", {}),
    ("svd", "delta", {"rank": 7}),
    ("ties", "factor", {"density": 0.4}),
    ("ties", "factor", {"density": 0.7, "majority": "frequency"}),
    ("ties", "delta", {"density": 0.4, "rank": 4}),
    ("ties", "delta", {"density": 0.7, "majority": "frequency", "rank": 20}),
    ("magnitude_prune", "factor", {"density": 0.3}),
    ("magnitude_prune", "delta", {"density": 0.3, "rank": 4}),
    ("dare_linear", "factor", {"density": 1.0}),
    ("dare_ties", "delta", {"density": 1.0, "rank": 6}),
]


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize("targets", ["all", "one lacks a projection"])
@pytest.mark.parametrize(("method", "space", "options"), CASES)
def test_pefts_add_weighted_adapter(agree, method, space, options, targets):
    both = list(SIZES)
    model = holder(ALPHAS, [both, ["wide"] if targets != "all" else both, both])
    ours, _ = merge(
        [read(model, str(n)) for n in range(3)], method, weights=WEIGHTS, space=space, **options
    )
    theirs = dict(options)
    if "majority" in theirs:
        theirs["majority_sign_method"] = theirs.pop("majority")
    if "rank" in theirs:
        theirs["svd_rank"] = theirs.pop("rank")
    dense = space == "delta" and method not in ("cat", "svd")
    name = f"{method}_svd" if dense else method
    model.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "merged", name, **theirs)
    merged = read(model, "merged")
    for path in SIZES:
        wanted = delta(merged[path])
        size = np.abs(wanted).max()
        told = f"PEFT's {name} {options}, {targets}, {path}"
        agree(told, delta(ours[path]) / size, wanted / size, 1e-5)
        if space == "factor":
            agree(f"{told}, a", ours[path].a, merged[path].a, 1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_pefts_dare_under_our_masks(monkeypatch, agree, method):
    xs = np.random.default_rng(0).standard_normal((3, 24, 40)).astype(np.float32)
    masks = iter(torch.tensor(drawn("dare_linear", xs, density=0.4), dtype=torch.float32))
    monkeypatch.setattr(torch, "bernoulli", lambda chances: next(masks))
    theirs = getattr(merge_utils, method)(list(torch.tensor(xs)), torch.tensor(WEIGHTS), 0.4)
    ours = ELEMENTWISE[method](xs, jnp.array(WEIGHTS), key=jax.random.key(0), density=0.4)
    agree(f"PEFT's {method}", ours, theirs, 1e-5)


def drawn(method, xs, **options):
    """Which entries of each module a seeded method keeps."""
    one = ELEMENTWISE[method]
    alone = (one(xs, w, key=jax.random.key(0), **options) for w in jnp.eye(len(xs)))
    return np.stack([np.asarray(x) != 0 for x in alone])


# Ours, mergekit's name, options, and the method of ours that shows which entries are kept.
OF_MERGEKIT = [
    ("linear", "task_arithmetic", {}, None),
    ("ties_mergekit", "ties", {"density": 0.4}, None),
    ("dare_linear_mergekit", "dare_linear", {"density": 0.4}, "dare_linear_mergekit"),
    ("dare_ties_mergekit", "dare_ties", {"density": 0.4}, "dare_linear_mergekit"),
    ("breadcrumbs", "breadcrumbs", {"density": 0.5, "gamma": 0.1}, None),
    ("breadcrumbs_ties", "breadcrumbs_ties", {"density": 0.5, "gamma": 0.1}, None),
    ("della_mergekit", "della", {"density": 0.5, "epsilon": 0.2}, "della_linear_mergekit"),
    (
        "della_linear_mergekit",
        "della_linear",
        {"density": 0.5, "epsilon": 0.2},
        "della_linear_mergekit",
    ),
    ("slerp", "slerp", {"t": 0.3}, None),
]


@pytest.mark.skipif(not MERGEKIT.exists(), reason="mergekit is not there; `make parity` fetches it")
@pytest.mark.parametrize(("ours", "theirs", "options", "shows"), OF_MERGEKIT)
def test_mergekit(tmp_path, agree, ours, theirs, options, shows):
    """Its matrices are (out, in), ours (in, out): what goes by rows there goes by columns here."""
    count = 2 if ours == "slerp" else 3
    weights = [1.0] * 2 if ours == "slerp" else [1.0, 0.5, 0.8]
    xs = np.random.default_rng(0).standard_normal((count, 24, 40)).astype(np.float32)
    key = {} if shows is None else {"key": jax.random.key(0)}
    masks = np.zeros(0) if shows is None else drawn(shows, xs, **options).mT
    told = json.dumps({"method": theirs, "options": options, "weights": weights})
    np.savez(tmp_path / "case.npz", tensors=xs.mT, masks=masks, told=told)
    files = [str(tmp_path / "case.npz"), str(tmp_path / "found.npy")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("mergekit_side.py")), *files],
        env=os.environ | {"PYTHONPATH": str(MERGEKIT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = ELEMENTWISE[ours](xs, jnp.array(weights), **key, **options)
    agree(f"mergekit's {theirs}", found, np.load(files[1]).T, 1e-5)
