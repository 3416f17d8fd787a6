import json

import jax.numpy as jnp

from compose import provenance
from lora_jax import peft
from lora_jax.provenance import environment


def test_the_record_is_json_that_can_make_the_module_again(tmp_path, config, random_lora):
    for name, seed in (("a", 0), ("b", 1)):
        peft.save_adapter(tmp_path / name, random_lora(config, seed), config)
    found = provenance.record(
        {"expression": "a - b", "space": "delta", "rank": 2},
        {name: tmp_path / name for name in "ab"},
        base_name="tiny",
        errors={"": {"self_attn.q_proj": jnp.array([0.5, 0.25])}},
    )
    assert json.loads(json.dumps(found)) == found
    assert (found["expression"], found["space"], found["rank"]) == ("a - b", "delta", 2)
    hashes = {one["sha256"] for one in found["inputs"].values()}
    assert len(hashes) == 2 and all(len(digest) == 64 for digest in hashes)
    assert found["inputs"]["a"]["path"] == str(tmp_path / "a")
    assert found["truncation_error"] == {"": {"self_attn.q_proj": [0.5, 0.25]}}
    assert found.items() >= environment().items()
