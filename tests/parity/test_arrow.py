"""Arrow and GenKnowSub, against PEFT's `create_arrow_model`.

PEFT finds a prototype by 15 power iterations from a random start, which settle only where one
direction dominates. So either the modules here have such a direction, or PEFT is given as many
iterations as it takes.
"""

from functools import partialmethod

import jax
import numpy as np
import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer

from compose import arrow
from compose.genknowsub import genknowsub
from compose.library import Library
from lora_jax import models, peft, selected

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make_modules(config, random_lora, count, *, dominant, seed, size):
    """Random modules; in a dominant one, the first of the rank-one parts outweighs the rest."""

    def lift(m):
        return m.replace(b=m.b.at[:, 0].multiply(8.0)) if dominant else m

    made = [
        random_lora(config, seed + n, targets=TARGETS, rank=4, alpha=6.0, size=size)
        for n in range(count)
    ]
    return [{path: lift(m) for path, m in adapter.items()} for adapter in made]


def saved(folder, adapters, config):
    """The adapters as PEFT folders."""
    for n, adapter in enumerate(adapters):
        peft.save_adapter(folder / str(n), adapter, config)
    return [str(folder / str(n)) for n in range(len(adapters))]


def test_prototypes(tmp_path, config, base_folder, torch_model, random_lora, rows, agree):
    tasks = make_modules(config, random_lora, 3, dominant=True, seed=1, size=0.1)
    ours = arrow.route_library(Library(("a", "b", "c"), tuple(tasks)))
    settings = ArrowConfig(top_k=2, rng_seed=0)
    model = create_arrow_model(
        torch_model(base_folder), saved(tmp_path, tasks, config), settings
    ).eval()
    with torch.no_grad():
        model(torch.tensor(rows))
    for layer in range(config.layers):
        for path in ours:
            module = model.get_submodule(f"base_model.model.model.layers.{layer}.{path}")
            theirs = module.lora_arrow["arrow_router"].prototypes.numpy()
            aligned = np.abs(np.sum(theirs * np.asarray(ours[path].prototypes[layer]), axis=-1))
            np.testing.assert_allclose(aligned, 1, atol=1e-5)


@pytest.fixture
def rows(random_tokens):
    return np.asarray(random_tokens(2, 12))


@pytest.mark.parametrize("general", [False, True], ids=["Arrow", "GenKnowSub"])
@pytest.mark.parametrize("dominant", [True, False], ids=["as it is", "iterated to the end"])
@pytest.mark.parametrize(("top_k", "temperature"), [(2, 1.0), (4, 0.5)])
def test_routed_logits(
    tmp_path,
    monkeypatch,
    config,
    weights,
    base_folder,
    torch_model,
    random_lora,
    rows,
    logits,
    torch_logits,
    general,
    dominant,
    top_k,
    temperature,
    agree,
):
    if not dominant:
        settle = partialmethod(ArrowLoraLinearLayer.top_right_singular_vec_from_BA, iters=2000)
        monkeypatch.setattr(ArrowLoraLinearLayer, "top_right_singular_vec_from_BA", settle)
    tasks = make_modules(config, random_lora, 4, dominant=dominant, seed=1, size=0.1)
    generals = make_modules(config, random_lora, 3, dominant=False, seed=50, size=0.02)
    library = Library(tuple("abcd"), tuple(tasks))
    if general:
        library = genknowsub(library, generals, space="factor")
    routed = arrow.route_library(library, top_k=top_k, temperature=temperature)
    settings = ArrowConfig(top_k=top_k, router_temperature=temperature, use_gks=general, rng_seed=0)
    model = create_arrow_model(
        torch_model(base_folder),
        saved(tmp_path / "tasks", tasks, config),
        settings,
        saved(tmp_path / "generals", generals, config) if general else None,
    ).eval()
    theirs = torch_logits(model, rows)
    name = "GenKnowSub + Arrow" if general else "Arrow"
    how = "15 iterations, a dominant direction" if dominant else "2000 iterations"
    ours = logits(config, weights, routed, rows)
    assert np.abs(ours - logits(config, weights, {}, rows)).max() > 0.1
    agree(f"{name}, top {top_k} at {temperature}, {how}", ours, theirs, 1e-3)


@pytest.mark.parametrize("general", [False, True], ids=["Arrow", "GenKnowSub"])
def test_the_real_model(
    tmp_path, smollm, torch_smollm, random_lora, rows, logits, torch_logits, general, agree
):
    config = smollm.config
    tasks = make_modules(config, random_lora, 4, dominant=True, seed=1, size=0.01)
    generals = make_modules(config, random_lora, 3, dominant=False, seed=50, size=0.003)
    library = Library(tuple("abcd"), tuple(tasks))
    if general:
        library = genknowsub(library, generals, space="factor")
    routed = arrow.route_library(library, top_k=3)
    model = create_arrow_model(
        torch_smollm,
        saved(tmp_path / "tasks", tasks, config),
        ArrowConfig(top_k=3, use_gks=general, rng_seed=0),
        saved(tmp_path / "generals", generals, config) if general else None,
    ).eval()
    ours = logits(config, smollm.weights, routed, rows)
    theirs = torch_logits(model, rows)
    changed = np.abs(ours - logits(config, smollm.weights, {}, rows)).max()
    assert changed > 0.5
    name = "SmolLM2 under GenKnowSub + Arrow" if general else "SmolLM2 under Arrow"
    agree(f"{name} (which moves logits by {changed:.2g})", ours, theirs, 1e-3)
    assert jax.tree.leaves(routed) and models.projections(config).keys() >= routed.keys()


def test_the_chosen_experts_alone_give_the_same_logits(
    tmp_path,
    monkeypatch,
    config,
    weights,
    base_folder,
    torch_model,
    random_lora,
    rows,
    logits,
    torch_logits,
    agree,
):
    monkeypatch.setattr(selected, "worthwhile", lambda *_: True)
    tasks = make_modules(config, random_lora, 5, dominant=True, seed=7, size=0.1)
    routed = arrow.route_library(Library(tuple("abcde"), tuple(tasks)), top_k=2)
    model = create_arrow_model(
        torch_model(base_folder),
        saved(tmp_path, tasks, config),
        ArrowConfig(top_k=2, rng_seed=0),
    ).eval()
    theirs = torch_logits(model, rows)
    jax.clear_caches()  # what was compiled with every expert would be taken again
    ours = logits(config, weights, routed, rows)
    assert np.abs(ours - logits(config, weights, {}, rows)).max() > 0.1
    agree("Arrow, the chosen experts alone", ours, theirs, 1e-3)
