import json
import sys

import jax

from lora_jax import __version__, files
from lora_jax.provenance import PACKAGES, environment, hashed


def test_the_environment_is_json_with_the_command_versions_and_devices(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/bin/lora-eval", "arc_easy", "--compare", "a - b"])
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == "lora-eval arc_easy --compare 'a - b'"
    assert found["versions"].keys() == {"lora_jax", "python", *PACKAGES}
    assert found["versions"]["lora_jax"] == __version__
    assert found["versions"]["jax"] == jax.__version__
    assert found["devices"] == f"{jax.device_count()} x cpu"


def test_folders_are_told_apart_by_their_hashes(base_folder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = hashed({"base": base_folder, "other": tmp_path})
    assert found["base"] == {"path": str(base_folder), "sha256": files.folder_digest(base_folder)}
    assert found["other"]["sha256"] != found["base"]["sha256"]
