import pytest

from compose.folder import save_library
from compose.inputs import base_name, load_input
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
