import os
import subprocess
import sys
import time

CODE = """
from lora_jax import runtime
runtime.prepare()
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.eye(3)).sum())
"""


def test_compiled_programs_are_kept_in_the_cache(tmp_path):
    environment = os.environ | {"LORA_JAX_CACHE": str(tmp_path), "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", CODE], env=environment, check=True, capture_output=True)
    assert any((tmp_path / "compiled").iterdir())


def test_importing_the_runtime_starts_no_backend_and_is_quick():
    """Every command imports it before it parses its flags."""
    code = (
        "import sys, lora_jax.runtime; print('jax' in sys.modules, 'transformers' in sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert time.perf_counter() - start < 5
