import json

import jax
import numpy as np
import pytest

from compose.folder import INDEX, load_library, save_library
from compose.library import Library, Routing
from lora_jax.errors import InputError


@pytest.fixture(scope="module")
def library(config, random_lora, random_ia3) -> Library:
    """A library of both kinds, to be routed."""
    x, y = (random_lora(config, rank, targets=("q_proj",), rank=rank) for rank in (3, 2))
    members = (x, y, random_ia3(config))
    return Library(("boolq", "arc-easy.v2", "scaled"), members, Routing(2, 0.5, "factors"))


@pytest.fixture
def folder(tmp_path, config, library):
    """That library on disk."""
    save_library(tmp_path / "lib", library, config, base_name="tiny", extra={"note.json": {"n": 1}})
    return tmp_path / "lib"


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_library_comes_back_as_it_was(folder, config, library):
    found = load_library(folder, config)
    assert found.names == library.names and found.routing == library.routing
    for one, other in zip(found.adapters, library.adapters, strict=True):
        assert one.keys() == other.keys()
        # IA3 is stored as 1 + offset, which rounds.
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), one, dict(other))
    index = json.loads((folder / INDEX).read_text())
    assert index["base_model_name_or_path"] == "tiny" and len(index["modules"]) == 3
    assert json.loads((folder / "note.json").read_text()) == {"n": 1}


def test_a_library_without_routing_has_none(tmp_path, config, library):
    save_library(tmp_path / "lib", library.replace(routing=None), config)
    assert load_library(tmp_path / "lib", config).routing is None


def test_a_changed_file_is_refused(folder, config):
    weights = folder / "boolq" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"boolq: adapter_model.safetensors is not the file that"):
        load_library(folder, config)


def test_a_missing_file_is_refused(folder, config):
    (folder / "scaled" / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"scaled: adapter_config\.json is missing"):
        load_library(folder, config)


@pytest.mark.parametrize("name", ["../boolq", "/etc", "a/b", "..", ".", "", "-x", "a b", "ä"])
def test_no_name_leaves_the_folder(folder, config, library, tmp_path, name):
    edit(folder / INDEX, modules=[{"name": name, "sha256": {}}])
    with pytest.raises(InputError, match="no plain folder name"):
        load_library(folder, config)
    odd = library.replace(names=(name, "x", "y"))
    with pytest.raises(InputError, match="no plain folder name"):
        save_library(tmp_path / "odd", odd, config)
    assert not (tmp_path / "odd").exists()


def test_a_name_twice_is_refused(tmp_path, config, library):
    with pytest.raises(InputError, match="'x' appears twice"):
        save_library(tmp_path / "lib", library.replace(names=("x", "y", "x")), config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2 is not 1"),
        ({"modules": {"boolq": 1}}, "modules must be a list"),
        ({"modules": [{"name": "boolq"}]}, "with a name and a sha256"),
        ({"routing": {"top_k": 9}}, "between 1 and the library's 3 modules; got 9"),
        ({"routing": {"best": 1}}, "routing .* cannot be used"),
        ({"routing": {"top_k": "two"}}, "routing .* cannot be used"),
    ],
)
def test_an_index_that_says_something_else_is_refused(folder, config, changes, words):
    edit(folder / INDEX, **changes)
    with pytest.raises(InputError, match=words):
        load_library(folder, config)


def test_an_existing_folder_is_refused_unless_overwritten(folder, config, library):
    with pytest.raises(InputError, match="exists"):
        save_library(folder, library, config)
    save_library(folder, library.replace(routing=None), config, overwrite=True)
    assert load_library(folder, config).routing is None
