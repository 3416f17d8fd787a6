"""Adapters from and to PEFT's folders: adapter_config.json and safetensors.

Nothing is ever unpickled. What a config asks for and this library lacks is refused by its key.
`settings` and `targets` are the config, `names` what things are called, `audit` whether a file is
what its config says, `build` and `fused` the way to our modules, `parts` and `whole` the way back.
"""

from lora_jax.peft.read import WEIGHTS, load_adapter
from lora_jax.peft.settings import CONFIG
from lora_jax.peft.write import kind_of, save_adapter, write_adapter

__all__ = ["CONFIG", "WEIGHTS", "kind_of", "load_adapter", "save_adapter", "write_adapter"]
