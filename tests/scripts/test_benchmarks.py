import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.families import llama
from lora_jax.rope import Rope
from lora_jax.routing import routed
from scripts import (
    arrow_cost,
    benchmark_merging,
    benchmark_routing,
    benchmark_training,
    routing_cost,
    timing,
)


@pytest.mark.parametrize(
    "name",
    [
        "benchmark_arrow",
        "benchmark_compile",
        "benchmark_merging",
        "benchmark_per_example",
        "benchmark_routing",
        "benchmark_sweep",
        "benchmark_training",
    ],
)
def test_help_is_told_before_anything_heavy_is_imported(name, pytestconfig):
    code = f"import sys; from scripts.{name} import main\ntry: main()\nexcept SystemExit: pass\n"
    command = [sys.executable, "-c", code + "print(*sys.modules)", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pytestconfig.rootpath)
    assert f"usage: python -m scripts.{name}" in done.stdout
    assert not {"jax", "numpy", "torch", "transformers"} & set(done.stdout.split())


def test_without_peft_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark_training"])
    monkeypatch.setattr(benchmark_training, "find_spec", lambda name: None)
    monkeypatch.setattr(benchmark_training, "report", lambda *_: pytest.fail("worked"))
    with pytest.raises(SystemExit, match="torch and peft not installed; run `make bench`"):
        benchmark_training.main()


def test_the_benchmarked_formulations_agree():
    experts = arrow_cost.random_experts(jax.random.key(0), (5,), 32, 48)
    x = jax.random.normal(jax.random.key(1), (7, 32))
    usual = arrow_cost.outputs_then_mix(x, experts)
    np.testing.assert_allclose(routed(x, experts), usual, atol=1e-6)


def test_the_ways_to_route_agree_and_are_drawn(tmp_path, capsys):
    path = tmp_path / "routing.svg"
    sizes = ((24, 16), (8, 32))
    settings = benchmark_routing.Settings(
        (4, 40), sizes, tokens=6, rank=2, top_k=2, ragged=4, rounds=1, figure=path
    )
    routing_cost.report(settings)
    told = capsys.readouterr().out
    assert all(f"{inside} to {out}, 6 tokens" in told for inside, out in sizes)
    assert "chosen alone" in told and path.read_text().count("experts in the library") == 2
    broken = {"all": jnp.ones(3), "chosen": jnp.zeros(3)}
    with pytest.raises(SystemExit, match="computing chosen differs from all by 1"):
        routing_cost._refuse_difference(broken)


def test_alternate_tells_the_slow_from_the_fast():
    taken = timing.alternate({"fast": lambda: 0, "slow": lambda: time.sleep(0.02)}, rounds=3)
    assert taken["slow"] >= 0.02 > taken["fast"]


def test_step_flops_count_both_passes_of_every_frozen_product():
    config = llama.Config("llama", 100, 8, 16, 2, 2, 1, 4, 64, Rope(4))
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    tokens = benchmark_training.ROWS * benchmark_training.LENGTH
    expected = 4 * (2 * layer * tokens + 8 * 100 * 10)
    assert benchmark_training._step_flops(config, labels=10) == expected


def test_each_side_is_run_by_the_command_that_the_benchmark_gives(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_training, "ours", lambda steps: {"completion": steps})
    monkeypatch.setattr("sys.argv", ["benchmark_training", "--worker", "ours", "--steps", "2"])
    benchmark_training.main()
    assert capsys.readouterr().out == '{"completion": 2}\n'


def test_a_ratio_is_told_with_the_interval_of_its_order():
    times = [n / 100 for n in range(81)]
    assert timing.ratio(times, [1] * 81) == 0.4
    low, high = timing.interval(times, [1] * 81)
    assert (low, high) == pytest.approx((0.31, 0.49), abs=0.011)  # 40 +- 1.96 sqrt(81) / 2 places


def test_merging_is_measured_once_and_drawn(tmp_path, monkeypatch, capsys):
    asked = []

    def worker(side, settings):
        asked.append((side, settings.methods, settings.layers))
        seconds = {"peft": 2.0, "ours": 0.5}[side] * settings.layers
        return {"first": 3.0, "again": seconds, "cpu": 1.0, "peak": 2.0**21}

    monkeypatch.setattr(benchmark_merging, "_worker", worker)
    files = {"results": tmp_path / "costs.json", "figure": tmp_path / "merging.svg"}
    settings = benchmark_merging.Settings(("svd", "cat"), ("o_proj",), 4, 1, **files)
    for _ in range(2):
        benchmark_merging.report(settings)
        told = capsys.readouterr().out
        assert "4.0x" in told and "2 s (1 of CPU)" in told
    every = [(side, layers) for layers, side in ((1, "ours"), (4, "ours"), (1, "peft"))]
    assert asked == [(side, (name,), n) for name in ("svd", "cat") for side, n in every]
    drawn = files["figure"].read_text()
    assert all(words in drawn for words in ("ours, 4 layers", "seconds", "MiB added"))
