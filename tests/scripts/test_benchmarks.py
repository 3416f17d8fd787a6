import time

import jax
import numpy as np

from lora_jax.families import llama
from lora_jax.routing import routed
from scripts import benchmark_arrow, benchmark_training, timing


def test_the_benchmarked_formulations_agree():
    experts = benchmark_arrow.random_experts(jax.random.key(0), (5,), 32, 48)
    x = jax.random.normal(jax.random.key(1), (7, 32))
    usual = benchmark_arrow.outputs_then_mix(x, experts)
    np.testing.assert_allclose(routed(x, experts), usual, atol=1e-6)


def test_alternate_tells_the_slow_from_the_fast():
    taken = timing.alternate({"fast": lambda: 0, "slow": lambda: time.sleep(0.02)}, rounds=3)
    assert taken["slow"] >= 0.02 > taken["fast"]


def test_step_flops_count_both_passes_of_every_frozen_product():
    config = llama.Config("llama", 100, 8, 16, 2, 2, 1, 4, 64)
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    tokens = benchmark_training.ROWS * benchmark_training.LENGTH
    expected = 4 * (2 * layer * tokens + 8 * 100 * 10)
    assert benchmark_training._step_flops(config, labels=10) == expected
