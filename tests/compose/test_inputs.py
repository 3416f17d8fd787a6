from pathlib import Path

import pytest

from compose.folder import save_library
from compose.inputs import base_name, load_input, named_folders
from compose.library import Library
from lora_jax import peft
from lora_jax.errors import InputError


def test_adapters_and_libraries_are_told_apart(tmp_path, config, random_lora):
    adapter = random_lora(config)
    peft.save_adapter(tmp_path / "one", adapter, config, base_name="tiny")
    save_library(tmp_path / "lib", Library(("x",), (adapter,)), config, base_name="other")
    assert load_input(tmp_path / "one", config).keys() == adapter.keys()
    assert load_input(tmp_path / "lib", config).names == ("x",)
    assert base_name(tmp_path / "one") == "tiny" and base_name(tmp_path / "lib") == "other"


def test_what_is_neither_is_refused(tmp_path, config):
    with pytest.raises(InputError, match=r"holds neither adapter_config\.json"):
        load_input(tmp_path, config)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load_input(tmp_path / "nowhere", config)


def test_folders_are_read_by_their_names(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = named_folders(["b.2=x=y", "a=~/modules"])
    assert found == {"b.2": Path("x=y"), "a": tmp_path / "modules"}
    assert list(found) == ["b.2", "a"] and named_folders([]) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a"], "'a' is not NAME=FOLDER"),
        (["a="], "'a=' is not NAME=FOLDER"),
        (["=x"], "'=x' is not NAME=FOLDER"),
        (["1a=x"], "'1a=x' is not NAME=FOLDER"),
        (["a=x", "a=y"], "'a=y': the name 'a' is taken; choose another"),
        (["base=x"], "'base=x': the name 'base' is taken"),
    ],
)
def test_folders_without_a_name_of_their_own_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        named_folders(given, taken={"base"})
