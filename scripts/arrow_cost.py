"""What Arrow's routing costs: a routed forward pass against the plain one, and one routed
projection against the formulation that computes every expert's output and then mixes."""

from functools import partial
from statistics import median

import jax
import jax.numpy as jnp

from compose.library import Routing
from compose.routing.build import experts
from lora_jax import models
from lora_jax.bases import load_base
from lora_jax.modules import Experts, LoRA
from lora_jax.routing import mixture, routed
from scripts.timing import alternate, in_turns, interval, ratio, show

TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
RANK, TOP_K = 4, 3


def random_experts(key: jax.Array, lead: tuple[int, ...], fan_in: int, fan_out: int) -> Experts:
    """Random experts with their exact prototypes; `lead` is (layers, experts) or (experts,)."""
    left, right = jax.random.split(key)
    a = jax.random.normal(left, (*lead, fan_in, RANK)) / fan_in**0.5
    b = jax.random.normal(right, (*lead, RANK, fan_out)) * 0.01
    modules = [{"x": LoRA(a[..., m, :, :], b[..., m, :, :])} for m in range(lead[-1])]
    return experts(modules, Routing(top_k=TOP_K))["x"]


def routed_forward(counts: tuple[int, ...], rounds: int, rows: int = 8, length: int = 128) -> None:
    """Times SmolLM2's forward pass, to its logits, plain and routed over libraries."""
    base = load_base("smollm2-135m")
    shapes = models.projections(base.config)
    tokens = jax.random.randint(jax.random.key(0), (rows, length), 0, base.config.vocabulary)

    @jax.jit
    def logits(weights, adapter):
        hidden = models.forward(base.config, weights, adapter, tokens).hidden
        return models.unembed(base.config, weights, adapter, hidden)

    def library(count: int) -> dict[str, Experts]:
        key = jax.random.key(1)
        return {p: random_experts(key, (shapes[p][0], count), *shapes[p][1:]) for p in TARGETS}

    adapters = {"plain": {}} | {f"{n} experts": library(n) for n in counts}
    taken = in_turns({n: partial(logits, base.weights, a) for n, a in adapters.items()}, rounds)
    plain, cells = taken.pop("plain"), []
    for name, times in taken.items():
        more = [100 * (x - 1) for x in (ratio(times, plain), *interval(times, plain))]
        cells.append([name, f"{median(times):.3f} s", "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*more)])
    cells.insert(0, ["plain", f"{median(plain):.3f} s", ""])
    title = f"SmolLM2-135M, {rows}x{length} tokens, rank {RANK} on q, k, v, o, top {TOP_K}"
    show(title, ["forward", "median", "against plain, median of rounds [95 %]"], cells)


def outputs_then_mix(x: jax.Array, experts: Experts) -> jax.Array:
    """The usual formulation (PEFT's): every expert's output (T, M, O), then their weighted sum."""
    weights = mixture(x, experts)
    inner = jnp.einsum("TI,MIR->TMR", x, experts.a)
    outputs = jnp.einsum("TMR,MRO->TMO", inner, experts.b)
    return jnp.einsum("TM,TMO->TO", weights, outputs)


def routed_projection(
    counts: tuple[int, ...], tokens: int = 512, size: tuple[int, int] = (3072, 9216)
) -> None:
    """Times what routing adds to one projection, ours and the usual way, and the projection."""
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (tokens, size[0]))
    kernel = jax.random.normal(keys[1], size) / size[0] ** 0.5
    ours, usual, plain = jax.jit(routed), jax.jit(outputs_then_mix), jax.jit(jnp.matmul)
    rows = []
    for count in counts:
        experts = random_experts(keys[2], (count,), *size)
        error = float(jnp.max(jnp.abs(ours(x, experts) - usual(x, experts))))
        candidates = {
            "plain": partial(plain, x, kernel),
            "ours": partial(ours, x, experts),
            "usual": partial(usual, x, experts),
        }
        taken = alternate(candidates, rounds=9)
        milliseconds = [f"{1e3 * taken[name]:.1f} ms" for name in candidates]
        faster = f"{taken['usual'] / taken['ours']:.1f}x"
        rows.append([str(count), *milliseconds, faster, f"{error:.0e}"])
    title = f"One projection, {tokens} tokens, {size[0]} to {size[1]}, rank {RANK}"
    columns = ["experts", "plain product", "routed, ours", "outputs-then-mix", "ratio", "max diff"]
    show(title, columns, rows)
