"""T5: what its two stacks compute, and that modules reach every part of them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from compose.arrow import route_library
from compose.library import Library, stack
from lora_jax import checkpoint, merge, models, modules, table
from lora_jax.errors import InputError
from lora_jax.families import t5
from lora_jax.modules import Saved
from lora_jax.project import Dropout

BASE = {  # t5-base, as its config.json has it
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_layers": 12,
    "num_heads": 12,
    "n_positions": 512,
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-6,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
FLAN = BASE | {  # flan-t5-base
    "d_ff": 2048,
    "num_decoder_layers": 12,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
SIZES = {"t5-base": (BASE, 222_903_552), "flan-t5-base": (FLAN, 247_577_856)}

OLD = t5.Config(264, 32, 48, encoder_layers=2, layers=3, heads=4, head_width=6, buckets=8, far=12)
NEW = replace(OLD, tied=False, scaled=False, activation="gelu_new", gated=True, head_width=8)


both = pytest.mark.parametrize("config", [OLD, NEW], ids=["v1.0", "v1.1"], indirect=True)


@pytest.fixture(scope="module")
def config(request):
    return getattr(request, "param", NEW)


@pytest.fixture(scope="module")
def weights(config, random_weights):
    return random_weights(config)


@pytest.fixture(scope="module")
def adapter(config, random_lora):
    """A LoRA on every projection of both stacks."""
    return random_lora(config, targets=["all-linear"])


@partial(jax.jit, static_argnums=0)
def _states(config, weights, adapter, source, segments, tokens, options):
    memory = models.encode(config, weights, adapter, source, segments)
    return models.forward(config, weights, adapter, tokens, memory=memory, **options).hidden


@pytest.fixture(scope="module")
def states(config, weights, adapter):
    """A function to the decoder's states (B, T, D), under the LoRA unless another is given."""

    def run(source, tokens, read=None, adapter=adapter, weights=weights, **options):
        """`read` are the source's segments, `options` the target's segments and positions."""
        read = jnp.ones_like(source) if read is None else jnp.asarray(read)
        return _states(config, weights, adapter, source, read, jnp.asarray(tokens), options)

    return run


@pytest.fixture(scope="module")
def source(random_tokens):
    return random_tokens(2, 20, seed=1)


@pytest.fixture(scope="module")
def target(random_tokens):
    return random_tokens(2, 16, seed=2)


@pytest.mark.parametrize("name", SIZES)
def test_the_real_models_have_their_sizes(name):
    raw, size = SIZES[name]
    config = models.config_from_huggingface(raw)
    weights = table.abstract(models.table(config))
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(weights)) == size
    tokens = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    run = partial(_states.__wrapped__, config)
    shape = jax.eval_shape(run, weights, {}, tokens, tokens, tokens, {}).shape
    assert shape == (2, 7, 768)


@both
def test_a_config_round_trips_through_its_json(config):
    assert models.config_from_huggingface(models.config_to_huggingface(config)) == config


def test_the_two_ways_to_say_that_the_head_is_free():
    old = FLAN
    new = FLAN | {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    found = models.config_from_huggingface(new)
    assert models.config_from_huggingface(old) == replace(found, shared=False) and found.shared
    untied = BASE | {"tie_word_embeddings": False, "scale_decoder_outputs": True}
    found = models.config_from_huggingface(untied)
    assert not found.tied and found.scaled


def test_a_free_head_that_is_not_stored_is_the_embedding_where_the_config_says_so(
    tmp_path, weights
):
    checkpoint.save_model(tmp_path / "t5", NEW, weights)
    path = tmp_path / "t5" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, path)
    with pytest.raises(InputError, match=r"lm_head\.weight is missing"):
        checkpoint.load_weights(tmp_path / "t5", NEW)
    raw = models.config_to_huggingface(NEW) | {"tie_word_embeddings": True}
    loaded = checkpoint.load_weights(tmp_path / "t5", models.config_from_huggingface(raw))
    wanted = weights | {"unembed": weights["embed"].T}
    jax.tree.map(np.testing.assert_array_equal, loaded, wanted)


def test_what_a_config_lacks_is_told_at_once():
    raw = {k: v for k, v in BASE.items() if k != "d_kv"} | {"feed_forward_proj": "gated-mish"}
    with pytest.raises(InputError, match=r"here: .*'gated-mish' is not.*; d_kv is missing"):
        models.config_from_huggingface(raw, "here")


@both
def test_a_model_saved_and_loaded_is_equal(tmp_path, config, weights):
    checkpoint.save_model(tmp_path / "model", config, weights)
    path = tmp_path / "model" / "model.safetensors"
    stored = load_file(path)
    # Copies that checkpoints of T5 carry along.
    copies = {f"{stack}.embed_tokens.weight": stored["shared.weight"] for stack in ("encoder",)}
    save_file(stored | copies, path)
    loaded = checkpoint.load_weights(path.parent, checkpoint.read_config(path.parent))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), loaded, weights))
    assert f"decoder.block.{config.layers - 1}.layer.1.EncDecAttention.o.weight" in stored


@both
def test_every_weight_counts(config, weights, source, target):
    @jax.jit
    @jax.grad
    def gradient(weights):
        memory = models.encode(config, weights, {}, source)
        out = models.forward(config, weights, {}, target, memory=memory)
        return jnp.sum(models.unembed(config, weights, {}, out.hidden) ** 2)

    for path, found in table.flatten(gradient(weights)).items():
        layers = found.reshape(len(found) if models.table(config)[path].stacked else 1, -1)
        assert (np.abs(layers).max(axis=1) > 1e-5).all(), path


@pytest.mark.parametrize("left", [0, 4])
def test_padding_of_the_source_changes_nothing(states, source, target, left):
    row, segments = np.full((2, 24), 99), np.zeros((2, 24), np.int32)
    row[:, left : left + 20], segments[:, left : left + 20] = source, 1
    padded = states(jnp.asarray(row), target, segments)
    np.testing.assert_allclose(padded, states(source, target), atol=1e-5)


def test_the_source_is_read_both_ways_and_the_target_one(config, weights, source, target):
    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradient(read, written):
        memory = models.encode(config, {**weights, "embed": read}, {}, jnp.arange(9)[None])
        given = jnp.arange(20, 29)[None]
        out = models.forward(config, {**weights, "embed": written}, {}, given, memory=memory)
        return out.hidden[0, 5, 0]

    read, written = (np.abs(x).sum(-1) for x in gradient(*[weights["embed"]] * 2))
    assert (read[:9] > 1e-5).all()
    assert (written[20:26] > 1e-5).all() and not written[26:29].any()


def test_texts_of_one_source_side_by_side_are_as_if_alone(states, source, target):
    """As choices are scored: each sees itself and the shared source (-1) alone."""
    apart = [states(source, part) for part in (target[:, :9], target[:, 9:])]
    number = jnp.broadcast_to(jnp.where(jnp.arange(16) < 9, 1, 2), (2, 16))
    step = jnp.broadcast_to(jnp.r_[jnp.arange(9), jnp.arange(7)], (2, 16))
    together = states(source, target, -np.ones((2, 20), int), segments=number, positions=step)
    np.testing.assert_allclose(together, jnp.concatenate(apart, axis=1), atol=5e-5)


def test_a_segment_sees_the_source_of_its_own_segment(states, source, target):
    apart = [states(source[:, :8], target[:, :9]), states(source[:, 8:], target[:, 9:])]
    read = np.where(np.arange(20) < 8, 1, 2) + np.zeros((2, 1), int)
    number = jnp.broadcast_to(jnp.where(jnp.arange(16) < 9, 1, 2), (2, 16))
    step = jnp.broadcast_to(jnp.r_[jnp.arange(9), jnp.arange(7)], (2, 16))
    together = states(source, target, read, segments=number, positions=step)
    np.testing.assert_allclose(together, jnp.concatenate(apart, axis=1), atol=5e-5)


def test_step_by_step_through_the_cache_equals_the_whole(
    config, weights, adapter, states, source, target
):
    step = jax.jit(
        lambda tokens, segments, cache, memory: models.forward(
            config, weights, adapter, tokens, segments=segments, cache=cache, memory=memory
        )
    )
    memory = jax.jit(partial(models.encode, config))(weights, adapter, source)
    cache, lengths = models.new_cache(config, 2, 16), np.array([4, 3])
    assert memory.keys.shape[0] == cache.keys.shape[0] == config.layers
    segments = (np.arange(4) < lengths[:, None]).astype(np.int32)
    found = [[], []]
    for n, start in enumerate(range(0, 16, 4)):
        given = segments if n == 0 else np.ones_like(segments)
        out = step(target[:, start : start + 4], given, cache, memory)
        cache = out.cache
        for row, seen in enumerate(found):
            seen.append(out.hidden[row, : lengths[row] if n == 0 else 4])
    whole = states(source, target)
    np.testing.assert_allclose(np.concatenate(found[0]), whole[0], atol=1e-5)
    short = np.delete(target[1], 3)[None]  # the slot of padding between its tokens
    alone = states(source[1:], short)[0]
    np.testing.assert_allclose(np.concatenate(found[1]), alone, atol=1e-5)


def test_a_name_stands_for_its_projection_in_every_attention(config):
    found = modules.resolve_targets(["q"], models.projections(config))
    assert found == [
        "encoder.layer.0.SelfAttention.q",
        "decoder.layer.0.SelfAttention.q",
        "decoder.layer.1.EncDecAttention.q",
    ]
    assert [models.projections(config)[path][0] for path in found] == [2, 3, 3]


@both
@pytest.mark.parametrize("layout", ["peft", "pem"])
def test_ia3_layouts_name_what_the_model_has(config, layout):
    sides = models.ia3_layouts(config)[layout]
    feeds = {path for path in sides if "Dense" in path}
    last = {"peft": "wo", "pem": "wi_1" if config.gated else "wi"}[layout]
    assert feeds == {f"{p}.DenseReluDense.{last}" for p in ("encoder.layer.1", "decoder.layer.2")}
    assert len(sides) == 8 and sides.keys() <= models.projections(config).keys()


@both
def test_merged_weights_compute_what_base_and_modules_do(
    config, weights, random_lora, random_ia3, states, source, target
):
    plain = states(source, target, adapter={})
    for module in (random_lora(config, targets=["all-linear"]), random_ia3(config)):
        found = states(source, target, adapter=module)
        merged = states(source, target, weights=merge.merge(weights, module), adapter={})
        np.testing.assert_allclose(found, merged, atol=2e-5)
        assert np.abs(found - plain).max() > 0.1


def test_an_embedding_and_norms_kept_whole(config, weights, states, source, target):
    gain = 1 + jnp.arange(config.width) / 9
    whole = {"embed": 0.5 * weights["embed"], "encoder_norm": gain, "decoder_norm": gain}
    bias = "encoder_bias"
    saved = {path: Saved(x) for path, x in whole.items()} | {bias: Saved(-weights[bias])}
    changed = {**weights, **whole, bias: -weights[bias]}
    found = states(source, target, adapter=saved)
    np.testing.assert_allclose(found, states(source, target, adapter={}, weights=changed))
    assert not np.allclose(found, states(source, target, adapter={}), atol=0.01)


def test_stacked_modules_are_each_as_if_alone(config, weights, random_lora, states, source, target):
    two = [random_lora(config, seed, targets=["all-linear"]) for seed in (0, 1)]
    ones = jnp.ones_like(source)
    run = jax.vmap(lambda a: _states(config, weights, a, source, ones, target, {}))
    for found, module in zip(run(stack(two)), two, strict=True):
        np.testing.assert_allclose(found, states(source, target, adapter=module), atol=5e-5)


def test_a_routed_library_reaches_both_stacks(config, random_lora, states, source, target):
    """Two equal modules are one however their tokens are routed; two that differ are not."""
    one, other = (random_lora(config, seed, targets=["q", "v", "wo"]) for seed in (0, 1))
    alike, mixed = (route_library(Library(("a", "b"), (one, b)), top_k=2) for b in (one, other))
    alone = states(source, target, adapter=one)
    np.testing.assert_allclose(states(source, target, adapter=alike), alone, atol=2e-5)
    assert np.abs(states(source, target, adapter=mixed) - alone).max() > 0.05


def test_everything_is_observed_by_its_whole_path(config, weights, adapter, source, target):
    def look(path, module, x):
        assert module is not None
        return jnp.mean(x), jnp.zeros(x.shape[1])

    memory = models.encode(config, weights, adapter, source, observe=look)
    out = models.forward(config, weights, adapter, target, memory=memory, observe=look)
    assert memory.observed.keys() | out.observed.keys() == models.projections(config).keys()
    assert not memory.observed.keys() & out.observed.keys()
    sizes = {path: found[1].shape for path, found in {**memory.observed, **out.observed}.items()}
    assert sizes["encoder.layer.1.DenseReluDense.wo"] == (2, 20)
    assert sizes["decoder.layer.1.EncDecAttention.k"] == (3, 20)
    assert sizes["decoder.layer.1.EncDecAttention.q"] == (3, 16)


def test_dropout_is_felt_in_every_part_and_remat_changes_nothing(
    config, weights, adapter, source, target
):
    @partial(jax.jit, static_argnames="remat")
    def run(key, adapter, remat=False):
        options = {"dropout": Dropout(key, 0.5), "remat": remat}
        memory = models.encode(config, weights, adapter, source, **options)
        found = models.forward(config, weights, adapter, target, memory=memory, **options)
        return jnp.sum(found.hidden[:, 3, ::2])

    parts = (
        "encoder.layer.1.DenseReluDense.wo",
        "decoder.layer.1.EncDecAttention.k",
        "decoder.layer.2.DenseReluDense.wo",
    )
    keys = [jax.random.key(n) for n in (0, 0, 1)]
    for part in parts:
        one, same, other = (float(run(key, {part: adapter[part]})) for key in keys)
        assert one == same != other, part
    some = {part: adapter[part] for part in parts}
    plain, again = (
        jax.grad(lambda a, remat=remat: run(keys[0], a, remat))(some) for remat in (False, True)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), again, plain)


def test_bfloat16_states_are_bfloat16_and_near_float32(weights, states, source, target):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    rough, fine = (states(source, target, weights=w) for w in (half, weights))
    assert rough.dtype == jnp.bfloat16 and fine.dtype == jnp.float32
    assert jnp.mean(jnp.abs(rough - fine)) < 0.06 * jnp.mean(jnp.abs(fine))


def test_a_pass_without_its_source_is_refused(config, weights, target):
    with pytest.raises(InputError, match="encoder-decoder models need the memory of a source"):
        models.forward(config, weights, {}, target)


def test_a_module_that_fits_nowhere_is_refused(config, weights, source):
    with pytest.raises(InputError, match=r"no projection encoder\.layer\.1\.EncDecAttention\.q"):
        models.encode(config, weights, {"encoder.layer.1.EncDecAttention.q": None}, source)


COMPARE = """
import jax, jax.numpy as jnp, numpy as np
from lora_jax import mesh, models, modules, table
from lora_jax.families import t5
c = t5.Config(264, 32, 48, encoder_layers=2, layers=3, heads=4, head_width=8)
w = table.init(jax.random.key(0), models.table(c))
a = modules.init_lora(jax.random.key(1), models.projections(c), targets=["q", "wo"], rank=2,
                      alpha=4)
a = jax.tree.map(lambda x: x + 0.1, a)
x = jax.random.randint(jax.random.key(2), (2, 8, 6), 0, 256)
@jax.jit
def run(a, w, x):
    def loss(a):
        states = models.forward(c, w, a, x[1], memory=models.encode(c, w, a, x[0])).hidden
        return jnp.mean(states[:, -1] ** 2 + states[:, -1]), states
    (_, states), gradient = jax.value_and_grad(loss, has_aux=True)(a)
    return states, gradient
one = run(a, w, x)
m = mesh.make_mesh(2, 2, 2)
placed = jax.device_put(w, table.shardings(models.table(c), m))
many = run(jax.device_put(a, mesh.replicated(m)), placed, mesh.put_batch(np.asarray(x), m, axis=1))
jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-3, atol=2e-5), many, one)
print(placed["encoder_bias"].sharding.spec[1], len(many[0].devices()))
"""


def test_eight_devices_compute_what_one_does(run_on_devices):
    assert run_on_devices(COMPARE).split() == ["tensor", "8"]
