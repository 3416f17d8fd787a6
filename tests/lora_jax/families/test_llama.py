import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import decoder, models, table
from lora_jax.errors import InputError
from lora_jax.project import Dropout
from lora_jax.rope import Rope


def reach(config, weights, at, length):
    """For each of `length` distinct tokens, how strongly the hidden state `at` depends on it."""

    @jax.jit
    @jax.grad
    def gradient(embed):
        tokens = jnp.arange(length)[None]
        return models.forward(config, {**weights, "embed": embed}, {}, tokens).hidden[0, at].sum()

    return np.abs(gradient(weights["embed"])).sum(-1)[:length]


def test_a_state_depends_on_its_past_and_never_on_its_future(config, weights):
    strength = reach(config, weights, at=5, length=9)
    assert (strength[:6] > 0).all()
    assert not strength[6:].any()


def test_a_window_reaches_back_once_a_layer(config, random_weights):
    windowed = replace(config, window=3, layers=1)
    strength = reach(windowed, random_weights(windowed), at=6, length=9)
    assert ((strength > 0) == ((np.arange(9) >= 4) & (np.arange(9) <= 6))).all()
    windowed = replace(config, window=3, layers=2)
    strength = reach(windowed, random_weights(windowed), at=6, length=9)
    assert ((strength > 0) == ((np.arange(9) >= 2) & (np.arange(9) <= 6))).all()


@pytest.mark.parametrize("left", [0, 3])
def test_padding_on_either_side_changes_nothing(
    config, weights, hidden, random_lora, random_tokens, left
):
    adapter, tokens = random_lora(config), random_tokens(1, 6)
    around = ((0, 0), (left, 5 - left))
    padded = hidden(
        config,
        weights,
        adapter,
        jnp.pad(tokens, around, constant_values=99),
        segments=jnp.pad(jnp.ones_like(tokens), around),
    )
    alone = hidden(config, weights, adapter, tokens)
    np.testing.assert_allclose(padded[:, left : left + 6], alone, atol=1e-5)


def test_packed_texts_are_as_if_alone(config, weights, hidden, random_lora, random_tokens):
    adapter, first, second = random_lora(config), random_tokens(1, 5), random_tokens(1, 8, seed=1)
    packed = hidden(
        config,
        weights,
        adapter,
        jnp.concatenate([first, second], 1),
        segments=jnp.asarray([[1] * 5 + [2] * 8]),
    )
    np.testing.assert_allclose(packed[:, :5], hidden(config, weights, adapter, first), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], hidden(config, weights, adapter, second), atol=2e-5)


def test_only_relative_positions_count(config, weights, hidden, random_tokens):
    tokens = random_tokens(2, 7)
    shifted = hidden(config, weights, {}, tokens, positions=jnp.arange(7)[None] + jnp.array([[3]]))
    np.testing.assert_allclose(shifted, hidden(config, weights, {}, tokens), atol=2e-5)
    spread = hidden(config, weights, {}, tokens, positions=2 * jnp.arange(7)[None])
    assert not np.allclose(spread, shifted, atol=1e-2)


@pytest.mark.parametrize("window", [None, 4])
def test_step_by_step_through_the_cache_equals_the_whole(
    config, random_weights, random_lora, random_tokens, hidden, window
):
    """Rows of unequal prompts, right-padded, then three tokens at a time in one shared cache."""
    config = replace(config, window=window)
    weights, adapter, tokens = random_weights(config), random_lora(config), random_tokens(2, 11)
    prompts = np.array([5, 3])
    real = np.arange(5) < prompts[:, None]
    step = jax.jit(
        lambda tokens, segments, cache: models.forward(
            config, weights, adapter, tokens, segments=segments, cache=cache
        )
    )
    cache = models.new_cache(config, batch=2, slots=12)
    out = step(jnp.where(real, tokens[:, :5], 99), jnp.asarray(real, jnp.int32), cache)
    seen = [[out.hidden[row, : prompts[row]]] for row in range(2)]
    for start in range(0, 6, 3):
        at = prompts[:, None] + start + np.arange(3)
        out = step(jnp.take_along_axis(tokens, at, 1), jnp.ones((2, 3), jnp.int32), out.cache)
        for row in range(2):
            seen[row].append(out.hidden[row])
    assert out.cache.used == 11
    for row in range(2):
        length = prompts[row] + 6
        whole = hidden(config, weights, adapter, tokens[row : row + 1, :length])
        np.testing.assert_allclose(jnp.concatenate(seen[row]), whole[0], atol=2e-5)


def test_rematerialising_changes_no_state_and_no_gradient(
    config, weights, random_lora, random_tokens
):
    adapter, tokens = random_lora(config), random_tokens(2, 6)

    def loss(adapter, remat):
        return jnp.sum(models.forward(config, weights, adapter, tokens, remat=remat).hidden ** 2)

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, kept = (both(adapter, remat) for remat in (False, True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), plain, kept)


def test_observation_sees_every_projections_input_and_module_a_layer(
    config, weights, random_lora, random_tokens
):
    adapter, tokens = random_lora(config, targets=["q_proj"]), random_tokens(2, 6)
    modules_seen = {}

    def observe(path, module, x):
        modules_seen[path] = module is not None
        return {"input": x, "norm": jnp.linalg.norm(x)}

    seen = models.forward(config, weights, adapter, tokens, observe=observe).observed
    assert seen.keys() == models.projections(config).keys()
    assert [path for path, found in modules_seen.items() if found] == ["self_attn.q_proj"]
    for path, (_, size, _) in models.projections(config).items():
        assert seen[path]["input"].shape == (config.layers, 2, 6, size)
        assert seen[path]["norm"].shape == (config.layers,)
    embedded = weights["embed"][tokens]
    first = embedded / jnp.sqrt(jnp.mean(embedded**2, -1, keepdims=True) + config.eps)
    np.testing.assert_allclose(seen["self_attn.q_proj"]["input"][0], first, rtol=1e-4, atol=1e-5)


def test_an_observer_that_returns_nothing_leaves_nothing(config, weights, random_tokens):
    def observed(**options):
        run = lambda: models.forward(config, weights, {}, random_tokens(1, 3), **options)  # noqa: E731
        return jax.eval_shape(run).observed

    assert not jax.tree.leaves(observed(observe=lambda *_: None))
    assert observed() is None


def test_stacked_adapters_under_vmap_are_as_one_by_one(
    config, weights, hidden, random_lora, random_tokens
):
    adapters, tokens = [random_lora(config, seed) for seed in range(3)], random_tokens(2, 6)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *adapters)
    run = jax.vmap(lambda adapter: models.forward(config, weights, adapter, tokens).hidden)
    together = jax.jit(run)(stacked)
    for one, states in zip(adapters, together, strict=True):
        np.testing.assert_allclose(states, hidden(config, weights, one, tokens), atol=2e-5)


def test_a_new_adapter_is_the_base_and_a_random_one_is_not(
    config, weights, hidden, random_lora, random_tokens
):
    tokens = random_tokens(2, 6)
    fresh = {p: m.replace(b=0 * m.b) for p, m in random_lora(config).items()}
    base = hidden(config, weights, {}, tokens)
    np.testing.assert_allclose(hidden(config, weights, fresh, tokens), base, atol=1e-6)
    assert not np.allclose(hidden(config, weights, random_lora(config), tokens), base, atol=0.1)


@pytest.mark.parametrize("path", sorted(["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]))
def test_every_layer_and_projection_of_an_adapter_counts(
    config, weights, hidden, random_lora, random_tokens, path
):
    adapter, tokens = random_lora(config, targets=[path]), random_tokens(1, 6)
    full = hidden(config, weights, adapter, tokens)
    for layer in range(config.layers):
        less = {path: adapter[path].replace(b=adapter[path].b.at[layer].set(0))}
        assert not np.allclose(hidden(config, weights, less, tokens), full, atol=1e-3)


def test_a_module_without_a_place_is_refused(config, weights, random_lora, random_tokens):
    adapter = {"self_attn.qkv_proj": random_lora(config)["self_attn.q_proj"]}
    with pytest.raises(InputError, match=r"self_attn\.qkv_proj.*this model has self_attn\.q_proj"):
        models.forward(config, weights, adapter, random_tokens(1, 3))


def test_ia3_on_the_intermediate_is_the_same_on_either_side(
    config, weights, hidden, random_ia3, random_tokens
):
    """SwiGLU multiplies up_proj's output by the gate, so PEM's and PEFT's places are one."""
    peft = random_ia3(config, layout="peft")
    pem = {p: m for p, m in peft.items() if p != "mlp.down_proj"}
    pem["mlp.up_proj"] = peft["mlp.down_proj"].replace(on="output")
    tokens = random_tokens(2, 6)
    as_peft, as_pem = (hidden(config, weights, a, tokens) for a in (peft, pem))
    np.testing.assert_allclose(as_peft, as_pem, atol=2e-5)
    assert not np.allclose(as_peft, hidden(config, weights, {}, tokens), atol=0.1)


def test_dropout_depends_on_its_key_and_leaves_the_base_alone(
    config, weights, hidden, random_lora, random_tokens
):
    adapter, tokens = random_lora(config), random_tokens(2, 6)

    def states(adapter, seed, rate=0.5):
        dropout = Dropout(jax.random.key(seed), rate)
        return np.asarray(hidden(config, weights, adapter, tokens, dropout=dropout))

    assert (states(adapter, 0) == states(adapter, 0)).all()
    assert not np.allclose(states(adapter, 0), states(adapter, 1), atol=1e-2)
    none = hidden(config, weights, adapter, tokens)
    np.testing.assert_allclose(states(adapter, 0, rate=0.0), none, atol=1e-5)
    np.testing.assert_allclose(states({}, 0), hidden(config, weights, {}, tokens), atol=1e-5)


def test_bfloat16_states_are_bfloat16_and_near_float32(
    config, weights, hidden, random_lora, random_tokens
):
    adapter, tokens = random_lora(config), random_tokens(2, 6)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    rough, fine = (hidden(config, w, adapter, tokens) for w in (half, weights))
    assert rough.dtype == jnp.bfloat16 and fine.dtype == jnp.float32
    assert jnp.mean(jnp.abs(rough - fine)) < 0.03 * jnp.mean(jnp.abs(fine)) + 0.03


def test_float64_refines_float32(config, weights, hidden, random_tokens):
    tokens = random_tokens(2, 6)
    fine = hidden(config, weights, {}, tokens)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), weights)
        states = models.forward(config, wide, {}, tokens).hidden
        assert states.dtype == jnp.float64
        np.testing.assert_allclose(states, fine, atol=2e-5)


def test_biases_are_read_where_the_config_has_them(config, random_weights, hidden, random_tokens):
    biased = replace(config, qkv_bias=True, output_bias=True, mlp_bias=True)
    weights, tokens = random_weights(biased), random_tokens(1, 6)
    full = hidden(biased, weights, {}, tokens)
    for path in models.projections(biased):
        layers = {**weights["layers"], f"{path}.bias": 0 * weights["layers"][f"{path}.bias"]}
        less = hidden(biased, {**weights, "layers": layers}, {}, tokens)
        # A bias on k adds the same to all scores of a query but for the rotation.
        assert not np.allclose(less, full, atol=1e-4), path


def test_a_free_unembedding_is_its_own_weight(config, random_weights):
    free = replace(config, tied=False)
    weights = random_weights(free)
    tied = {name: value for name, value in weights.items() if name != "unembed"}
    states = jnp.ones((2, config.width))
    np.testing.assert_allclose(
        models.unembed(free, weights, {}, states), states @ weights["unembed"], rtol=1e-5
    )
    np.testing.assert_allclose(
        models.unembed(config, tied, {}, states), states @ weights["embed"].T, rtol=1e-5
    )


def test_kinds_round_trip_through_their_config_json(config):
    scaled = Rope(8, 5e5, "llama3", 8.0, 32, 1.0, 4.0)
    free = replace(config, tied=False, eps=1e-5, rope=scaled, output_bias=True, qkv_bias=True)
    mistral = replace(config, kind="mistral", window=9)
    qwen = replace(config, kind="qwen2", qkv_bias=True, layers=4)
    third = replace(config, kind="qwen3", qk_norm=True, layers=4)
    mixed = {"window": 9, "unwindowed": (0, 2)}
    for one in (
        config,
        free,
        mistral,
        qwen,
        replace(qwen, window=9),
        replace(qwen, **mixed),
        third,
    ):
        raw = json.loads(json.dumps(models.config_to_huggingface(one)))
        assert models.config_from_huggingface(raw) == one
        assert hash(models.config_from_huggingface(raw)) == hash(one)


def test_what_a_config_asks_in_vain_is_told_at_once(config):
    raw = models.config_to_huggingface(config)
    del raw["vocab_size"], raw["num_hidden_layers"]
    raw |= {"hidden_act": "gelu", "rope_parameters": {"rope_type": "spiral", "factor": 8}}
    raw |= {"layer_types": ["linear_attention"]}
    with pytest.raises(InputError) as caught:
        models.config_from_huggingface(raw, "there/config.json")
    message = str(caught.value)
    assert message.startswith("there/config.json: ")
    for part in ("vocab_size is missing", "num_hidden_layers is missing", "'spiral'", "'gelu'"):
        assert part in message
    assert "'linear_attention' is not supported" in message


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_qwen_has_its_window_in_the_layers_its_config_says(config, kind):
    raw = models.config_to_huggingface(replace(config, kind=kind, layers=4))
    raw |= {"use_sliding_window": True, "sliding_window": 9}

    def window(**changes):
        found = models.config_from_huggingface(raw | changes)
        return found.window, found.unwindowed

    windowed, full = "sliding_attention", "full_attention"
    assert window(layer_types=[full, windowed, full, windowed]) == (9, (0, 2))
    assert window(layer_types=[windowed] * 4) == (9, ())
    assert window(layer_types=[full] * 4) == (None, ())
    assert window(layer_types=[windowed] * 4, use_sliding_window=False) == (None, ())
    assert window(layer_types=None, max_window_layers=1) == (9, (0,))
    del raw["layer_types"], raw["max_window_layers"]  # by default the first 28 layers are without
    assert window() == (None, ())
    assert window(num_hidden_layers=30) == (9, tuple(range(28)))
    with pytest.raises(InputError, match="layer_types has 3 layers, not 4"):
        window(layer_types=[full] * 3)


def test_layers_without_the_window_see_farther(config, random_weights):
    """Three layers with a window of 2 reach 3 back in all; one of them without it, all the way."""
    windowed = replace(config, kind="qwen2", layers=3, window=2)
    weights = random_weights(windowed)
    for unwindowed, first in (((), 6), ((0,), 0), ((2,), 0)):
        mixed = replace(windowed, unwindowed=unwindowed)
        strength = reach(mixed, weights, at=9, length=10)
        assert np.flatnonzero(strength > 0).tolist() == list(range(first, 10))


def test_qwen3_norms_its_queries_and_keys(config, random_weights, hidden, random_tokens):
    """So their kernels' sizes count for nothing, and their gains for something."""
    normed = replace(config, kind="qwen3", qk_norm=True)
    weights, tokens = random_weights(normed), random_tokens(1, 6)
    states = hidden(normed, weights, {}, tokens)
    for name in ("q", "k"):
        kernel, gain = f"self_attn.{name}_proj", f"self_attn.{name}_norm"
        larger = {**weights["layers"], kernel: 5 * weights["layers"][kernel]}
        same = hidden(normed, {**weights, "layers": larger}, {}, tokens)
        np.testing.assert_allclose(same, states, atol=1e-3)
        sharper = {**weights["layers"], gain: 5 * weights["layers"][gain]}
        other = hidden(normed, {**weights, "layers": sharper}, {}, tokens)
        assert not np.allclose(other, states, atol=0.05)


# What the models' own cards and config.json say.
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
REAL = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3,
        },
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "model_type": "mistral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "use_sliding_window": False,
            "sliding_window": None,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_models_have_their_size_and_run_in_shape(name):
    parameters, raw = REAL[name]
    real = models.config_from_huggingface(raw)
    weights = table.abstract(models.table(real), jnp.bfloat16)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights)) == parameters
    tokens = jax.ShapeDtypeStruct((1, 5000), jnp.int32)
    run = lambda weights, tokens: models.forward(real, weights, {}, tokens).hidden  # noqa: E731
    states = jax.eval_shape(run, weights, tokens)
    assert (states.shape, states.dtype) == ((1, 5000, real.width), jnp.bfloat16)


def test_mistral_without_a_word_on_its_window_has_its_default(config):
    raw = models.config_to_huggingface(replace(config, kind="mistral"))
    assert models.config_from_huggingface(raw).window is None
    del raw["sliding_window"]
    assert models.config_from_huggingface(raw).window == 4096


def test_a_position_counts_on_from_the_cached_end_of_its_row(config):
    cache = models.new_cache(config, 2, 8)
    seen = cache.segments.at[0, :4].set(1).at[1, :2].set(1)
    cache = cache.replace(segments=seen, used=jnp.asarray(4))
    segments = jnp.asarray([[1, 1, 0], [0, 1, 1]])
    positions = decoder.place(segments, segments, None, cache).positions
    assert positions.tolist()[0][:2] == [4, 5]
    assert positions.tolist()[1][1:] == [2, 3]


def test_continuations_of_a_shared_prefix_are_as_if_alone(
    config, weights, hidden, random_lora, random_tokens
):
    """One row holds a prefix of 4 (segment -1) and two continuations, of 3 and 2 tokens."""
    adapter, tokens = random_lora(config), random_tokens(1, 9)
    packed = hidden(
        config,
        weights,
        adapter,
        tokens,
        segments=jnp.asarray([[-1] * 4 + [1] * 3 + [2] * 2]),
        positions=jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 4, 5]]),
    )
    first = hidden(config, weights, adapter, tokens[:, :7])
    second = hidden(config, weights, adapter, tokens[:, [0, 1, 2, 3, 7, 8]])
    np.testing.assert_allclose(packed[:, :7], first, atol=2e-5)
    np.testing.assert_allclose(packed[:, 7:], second[:, 4:], atol=2e-5)


def test_positions_count_a_shared_prefix(config, weights, hidden, random_tokens):
    tokens = random_tokens(1, 6)
    shared = hidden(config, weights, {}, tokens, segments=jnp.asarray([[-1] * 3 + [1] * 3]))
    np.testing.assert_allclose(shared, hidden(config, weights, {}, tokens), atol=2e-5)
