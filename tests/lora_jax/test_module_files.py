import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.errors import InputError
from lora_jax.files import folder_digest
from lora_jax.module_files import load_modules, save_modules
from lora_jax.modules import IA3, DoRA, Experts, LoRA, Saved

A, B = jnp.arange(24.0).reshape(2, 4, 3), jnp.ones((2, 3, 5), jnp.bfloat16)
ADAPTER = {
    "blocks.0.attn": LoRA(A, B, 1 / 3),
    "up": LoRA(A[0], B[0], bias=jnp.ones(5)),
    "down": DoRA(A, B, jnp.ones((2, 5)), 2.0),
    "gate": IA3(jnp.ones(4), "input"),
    "routed": Experts(A, B, A[..., 0], top_k=1, temperature=0.5, mixing="factors"),
    "": Saved(A),
}


def test_every_kind_of_module_comes_back_bit_for_bit(tmp_path):
    save_modules(tmp_path / "out", ADAPTER)
    loaded = load_modules(tmp_path / "out")
    assert list(loaded) == list(ADAPTER)
    assert jax.tree.structure(loaded) == jax.tree.structure(ADAPTER)
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and (x == y).all(), loaded, ADAPTER)
    assert all(jax.tree.leaves(same))
    digest = folder_digest(tmp_path / "out")
    save_modules(tmp_path / "out", {"up": LoRA(A, B, 2)}, overwrite=True)
    assert folder_digest(tmp_path / "out") != digest


def test_an_existing_folder_and_endless_numbers_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"up\.a holds NaN"):
        save_modules(tmp_path / "out", {"up": LoRA(A * np.nan, B)})
    assert not (tmp_path / "out").exists()
    save_modules(tmp_path / "out", ADAPTER)
    with pytest.raises(InputError, match="exists"):
        save_modules(tmp_path / "out", ADAPTER)


@pytest.mark.parametrize(
    "path, change, words",
    [
        ("up", {"kind": "os.system"}, "up is none of LoRA"),
        (
            "up",
            {"kind": "IA3", "on": "output"},
            r"up\.offset is missing.*up: scale is not expected",
        ),
        ("up", {"scale": "big"}, "up: scale cannot be 'big'"),
        ("up", {"kind": None}, "up is none of LoRA"),
        ("gate", {"on": "sideways"}, "gate: on cannot be 'sideways'"),
        ("routed", {"top_k": True}, "routed: top_k cannot be True"),
        ("other", {"kind": "LoRA", "scale": 1.0}, r"other\.a is missing"),
    ],
)
def test_a_record_that_is_amiss_is_refused_by_name(tmp_path, path, change, words):
    save_modules(tmp_path / "out", ADAPTER)
    record = json.loads((tmp_path / "out/modules.json").read_text())
    record["modules"][path] = record["modules"].get(path, {}) | change
    (tmp_path / "out/modules.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=words):
        load_modules(tmp_path / "out")


def test_prototypes_that_lead_are_the_first_rank(tmp_path):
    routed = Experts(A, B, A[..., 0], leading=True)
    save_modules(tmp_path / "good", {"routed": routed})
    assert load_modules(tmp_path / "good")["routed"].leading
    save_modules(tmp_path / "out", {"routed": routed.replace(prototypes=A[..., 1])})
    with pytest.raises(InputError, match="routed: leading is true, and prototypes are not"):
        load_modules(tmp_path / "out")


def test_tensors_of_other_than_plain_numbers_are_refused(tmp_path):
    save_modules(tmp_path / "out", {"up": LoRA(A, B)})
    path = tmp_path / "out" / "modules.safetensors"
    save_file({name: value.astype(np.int8) for name, value in load_file(path).items()}, path)
    with pytest.raises(InputError, match=r"modules\.safetensors: up\.a is I8, not one of F16"):
        load_modules(tmp_path / "out")


def test_tensors_that_no_module_has_are_refused(tmp_path):
    save_modules(tmp_path / "out", ADAPTER)
    (tmp_path / "out/modules.json").write_text('{"modules": {}}')
    with pytest.raises(InputError, match=r"gate\.offset is not expected"):
        load_modules(tmp_path / "out")
    (tmp_path / "out/modules.json").write_text("{}")
    with pytest.raises(InputError, match="has no modules"):
        load_modules(tmp_path / "out")
