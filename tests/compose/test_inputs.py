import pytest

from compose.folder import save_library
from compose.inputs import base_name, load_input, located, named_folders
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


def test_the_hub_id_of_a_packaged_base_is_that_base(tmp_path, config, random_lora):
    peft.save_adapter(tmp_path / "x", random_lora(config), config, base_name="google/gemma-3-270m")
    assert base_name(tmp_path / "x") == "gemma3-270m"


def test_what_is_neither_is_refused(tmp_path, config):
    with pytest.raises(InputError, match=r"holds neither adapter_config\.json"):
        load_input(tmp_path, config)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load_input(tmp_path / "nowhere", config)


def test_folders_are_read_by_their_names(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = named_folders(["b.2=x=y", "a=~/modules", "c=hf://ann/tiny@v1"])
    assert found == {"b.2": "x=y", "a": "~/modules", "c": "hf://ann/tiny@v1"}
    assert list(found) == ["b.2", "a", "c"] and named_folders([]) == {}
    assert located(found["a"]) == tmp_path / "modules"


def test_an_adapter_on_the_hub_comes_alone_and_a_library_with_its_modules(
    tmp_path, config, random_lora, hub
):
    adapter = random_lora(config)
    peft.save_adapter(tmp_path / "one", adapter, config)
    save_library(tmp_path / "lib", Library(("x",), (adapter,)), config)
    fetched = hub(tmp_path)
    assert load_input(located("hf://ann/tiny/one"), config).keys() == adapter.keys()
    assert fetched[0][1:3] == ["one/adapter_config.json", "one/adapter_model.safetensors"]
    assert load_input(located("hf://ann/tiny/lib"), config).names == ("x",)
    assert len(fetched) == 3 and "lib/*/adapter_model.safetensors" in fetched[2]


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
