import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import files, peft
from lora_jax.errors import InputError
from lora_jax.modules import Experts


def test_a_scale_that_no_alpha_gives_back_is_folded(tmp_path, config, random_lora):
    ranks = [r for r in range(3, 60) if (0.1 * r) / r != 0.1]
    adapter = random_lora(config, targets=["q_proj"], rank=ranks[0], alpha=1.0)
    adapter = {path: m.replace(scale=0.1) for path, m in adapter.items()}
    peft.save_adapter(tmp_path / "a", adapter, config)
    loaded = peft.load_adapter(tmp_path / "a", config)["self_attn.q_proj"]
    wanted = adapter["self_attn.q_proj"]
    assert loaded.scale == 1.0
    np.testing.assert_allclose(loaded.b, 0.1 * wanted.b, rtol=1e-6)


def test_extra_files_lie_beside_the_adapter(tmp_path, config, random_lora):
    peft.save_adapter(tmp_path / "a", random_lora(config), config, extra={"from.json": {"x": 1}})
    assert files.read_json(tmp_path / "a" / "from.json") == {"x": 1}
    assert peft.load_adapter(tmp_path / "a", config)


def test_what_peft_has_no_format_for_is_refused(tmp_path, config, random_lora, random_ia3):
    expert = Experts(*(jnp.ones((2, 3, 4, 4)),) * 2, prototypes=jnp.ones((2, 3, 4)))
    mixed = random_lora(config) | random_ia3(config)
    for adapter in ({"self_attn.q_proj": expert}, mixed, {}):
        with pytest.raises(InputError, match="PEFT's format holds LoRA or IA3 modules"):
            peft.save_adapter(tmp_path / "a", adapter, config)
    assert not (tmp_path / "a").exists()
