import json
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import bases, checkpoint, export, models
from lora_jax.errors import InputError
from lora_jax.files import read_json, write_json
from lora_jax.modules import LoRA, Saved


@pytest.fixture
def base(tmp_path, base_folder):
    """A copy of the tiny model's folder, with settings and code that lie beside it."""
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    raw = read_json(folder / "config.json") | {"eos_token_id": 257, "auto_map": {"x": "code.X"}}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "modeling.py").write_text("boom")
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return folder


def test_the_bases_settings_and_tokenizer_go_along_and_its_code_does_not(
    tmp_path, base, config, random_lora
):
    export.save_merged(tmp_path / "out", str(base), random_lora(config), extra={"x.json": {}})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "x.json",
    }
    raw = read_json(tmp_path / "out" / "config.json")
    assert raw["eos_token_id"] == 257 and "auto_map" not in raw
    assert raw["tie_word_embeddings"] is True


@pytest.mark.parametrize("path", ["embed", "unembed"])
@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_a_changed_embedding_parts_the_two(
    tmp_path, base, config, weights, random_tokens, path, kind
):
    shape = weights["embed"].shape if path == "embed" else weights["embed"].T.shape
    factors = jnp.full((shape[0], 1), 0.1), jnp.linspace(0, 1, shape[1])[None]
    value = weights["embed"] if path == "embed" else weights["embed"].T
    adapter = {path: LoRA(*factors) if kind == "lora" else Saved(value + factors[0] @ factors[1])}
    export.save_merged(tmp_path / "out", str(base), adapter)
    found = checkpoint.read_config(tmp_path / "out")
    assert found == replace(config, tied=False)
    held, tokens = checkpoint.load_weights(tmp_path / "out", found), random_tokens(1, 5)
    seen = []
    for of, those, module in ((config, weights, adapter), (found, held, {})):
        out = models.forward(of, those, module, tokens).hidden
        seen.append(models.unembed(of, those, module, out))
    np.testing.assert_allclose(seen[0], seen[1], atol=1e-4)


def test_the_bases_type_is_kept(tmp_path, base, config, random_lora):
    raw = read_json(base / "config.json") | {"torch_dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(raw))
    export.save_merged(tmp_path / "out", str(base), random_lora(config))
    with checkpoint.open_safetensors(tmp_path / "out" / "model.safetensors") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize(("told", "kept"), [("torch.bfloat16", "BF16"), ("auto", None), (8, None)])
def test_a_type_is_read_as_transformers_spells_it_or_refused(tmp_path, base, told, kept):
    write_json(base / "config.json", read_json(base / "config.json") | {"dtype": told})
    if kept is None:
        with pytest.raises(InputError, match=f"dtype {told!r} is none of float32, bfloat16, floa"):
            export.save_merged(tmp_path / "merged", str(base), {})
        return
    export.save_merged(tmp_path / "merged", str(base), {})
    with checkpoint.open_safetensors(tmp_path / "merged" / "model.safetensors") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {kept}  # noqa: SIM118


def test_one_embedding_that_is_scaled_is_not_parted(tmp_path, t5_folder, monkeypatch):
    config = replace(checkpoint.read_config(t5_folder), tied=True)
    with pytest.raises(InputError, match="this base scales what its one embedding unembeds"):
        export._untied(config, {"embed": LoRA(jnp.ones((264, 1)), jnp.ones((1, 32)))})
    assert export._untied(config, {"encoder.layer.0.SelfAttention.q": LoRA(1, 2)}) is config


def test_a_head_of_the_adapters_own_goes_along_with_its_labels(
    tmp_path, classifier_folder, random_lora
):
    base = bases.load_base(str(classifier_folder))
    last, value = "classifier.out_proj", jnp.ones((32, 3))
    adapter = random_lora(base.config, targets=["query"])
    adapter |= {last: Saved(value), f"{last}.bias": Saved(jnp.arange(3.0))}
    export.save_merged(tmp_path / "out", str(classifier_folder), adapter)
    found = checkpoint.read_config(tmp_path / "out")
    assert found.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    np.testing.assert_array_equal(checkpoint.load_weights(tmp_path / "out", found)[last], value)
    raw = read_json(tmp_path / "out" / "config.json")
    assert raw["architectures"] == ["RobertaForSequenceClassification"]
