"""One device, a mesh and pmap give the same numbers."""

import json

CODE = """
import json, jax, numpy as np
from eval import batches, compare, devices, items, perplexity, scoring
from lora_jax import models, modules, table
from lora_jax.families import llama
from lora_jax.rope import Rope

config = llama.Config(kind="llama", vocabulary=64, width=32, hidden=64, layers=2, heads=4,
                       kv_heads=2, head_width=8, context=128, rope=Rope(8), tied=True)
weights = table.init(jax.random.key(0), models.table(config))
draw = np.random.default_rng(0)

def span(size):
    return items.Span(draw.integers(0, 64, size).astype(np.int32), np.ones(size, bool))

questions = [items.Item(span(p), tuple(map(span, draw.integers(1, 6, 3))), (1.0,) * 3)
             for p in draw.integers(0, 30, 21)]
lora = modules.init_lora(jax.random.key(1), models.projections(config), targets=["q_proj"],
                         rank=2, alpha=4)
lora = {path: m.replace(b=m.b + 0.1) for path, m in lora.items()}
text = draw.integers(0, 64, 300)
found = {}
for how in ("one", "mesh", "pmap"):
    placed, multiple = devices.place(weights, how), devices.row_multiple(how)
    size = {"tokens": 2000, "multiple": multiple}
    score = devices.spread(scoring.score, config, placed, how)
    read = devices.spread(perplexity.window_nll, config, placed, how)
    planned = batches.plan(questions, program=500, **size)
    windows = perplexity.batches(perplexity.windows(text, 32, 16), **size)
    parts = [compare.measure(score, compare.stacks([{}, lora]), planned, how),
             compare.measure(read, compare.stacks([{}]), windows, how)]
    found[how] = [np.array(part).tolist() for part in parts]
print(json.dumps([jax.device_count(), found]))
"""


def test_one_mesh_and_pmap_agree(run_on_devices):
    import numpy as np

    count, found = json.loads(run_on_devices(CODE).splitlines()[-1])
    assert count == 8
    for how in ("mesh", "pmap"):
        for part, right in zip(found[how], found["one"], strict=True):
            np.testing.assert_allclose(part, right, rtol=1e-5, atol=1e-5)
