"""What every command does before JAX starts its work."""

import os

from lora_jax.files import cache_folder


def prepare() -> None:
    """Quiets the runtime's log, and keeps compiled programs so that a second run starts at once."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
