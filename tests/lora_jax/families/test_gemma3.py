from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import bases, models, table, tokens
from lora_jax.decoder import place
from lora_jax.errors import InputError
from lora_jax.families import gemma3
from lora_jax.modules import LoRA
from lora_jax.rope import Rope

LOCAL, GLOBAL = (True,), (False,)


@pytest.fixture(scope="module")
def config():
    """Two local layers around a global one."""
    return gemma3.Config(
        vocabulary=64,
        width=32,
        hidden=48,
        layers=3,
        heads=4,
        kv_heads=2,
        head_width=8,
        context=128,
        local=LOCAL + GLOBAL + LOCAL,
        rope=Rope(8, 1e6),
        local_rope=Rope(8, 1e4),
        window=3,
        query_scalar=8,
    )


@pytest.fixture
def tokens_(random_tokens):
    return random_tokens(2, 11) % 64


def reach(config, weights, at, length):
    """For each of `length` distinct tokens, whether the hidden state `at` depends on it."""

    @jax.jit
    @jax.grad
    def gradient(embed):
        row = jnp.arange(length)[None]
        bound = {**weights, "embed": embed}
        return models.forward(config, bound, {}, row).hidden[0, at, 0]

    return np.flatnonzero(np.abs(gradient(weights["embed"])).sum(-1)[:length]).tolist()


@pytest.mark.parametrize(
    ("local", "seen"),
    [
        (LOCAL, [4, 5, 6]),
        (GLOBAL, [*range(7)]),
        (LOCAL + GLOBAL, [*range(7)]),
    ],
)
def test_local_layers_reach_back_a_window_and_global_ones_to_the_start(
    config, random_weights, local, seen
):
    config = replace(config, local=local, layers=len(local))
    assert reach(config, random_weights(config), at=6, length=9) == seen


def test_each_kind_of_layer_turns_by_its_own_rope(config, random_weights, hidden, tokens_):
    weights = random_weights(config)
    for local, counts in ((LOCAL, "local_rope"), (GLOBAL, "rope")):
        alike = replace(config, local=local * 3)
        states = hidden(alike, weights, {}, tokens_)
        for name in ("rope", "local_rope"):
            other = hidden(replace(alike, **{name: Rope(8, 50.0)}), weights, {}, tokens_)
            assert np.allclose(states, other, atol=1e-5) == (name != counts)


def test_the_query_scalar_counts(config, random_weights, hidden, tokens_):
    weights = random_weights(config)
    states = [hidden(replace(config, query_scalar=s), weights, {}, tokens_) for s in (8, 32)]
    assert not np.allclose(*states, atol=1e-2)


def test_a_norm_of_zero_has_a_gain_of_one(config):
    x = jnp.asarray([[3.0, -4.0, 0.0, 5.0]])
    plain = gemma3.finish(config, {"norm": jnp.zeros(4)}, x)
    np.testing.assert_allclose(plain, x / jnp.sqrt(12.5), rtol=1e-5)
    more = gemma3.finish(config, {"norm": jnp.asarray([0.5, 0, 0, -1.0])}, x)
    np.testing.assert_allclose(more, plain * jnp.asarray([1.5, 1, 1, 0]), rtol=1e-5)


def test_a_norm_multiplies_before_it_rounds(config):
    """In bfloat16; rounding first, as Llama does, gives other bits."""
    x, weight = (jax.random.normal(jax.random.key(n), (512,), jnp.bfloat16) for n in (0, 1))
    rounded = gemma3.finish(config, {"norm": weight}, x)
    wide = gemma3.finish(config, {"norm": weight.astype(jnp.float32)}, x.astype(jnp.float32)[None])[
        0
    ]
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, wide.astype(jnp.bfloat16))


def test_embeddings_are_scaled_by_a_root_of_their_own_type(config):
    wide = replace(config, width=640)
    places = place(jnp.zeros((1, 1), jnp.int32), None, None, None)
    for dtype, root in ((jnp.float32, 640**0.5), (jnp.bfloat16, 25.25)):
        scaled, _ = gemma3.begin(wide, {}, jnp.ones((1, 1, 640), dtype), places)
        assert scaled.dtype == dtype
        np.testing.assert_allclose(scaled.astype(jnp.float32), root, rtol=1e-7)


def test_a_lora_of_the_embedding_is_scaled_too(config, random_weights, hidden, tokens_):
    """It is the LoRA of the matrix, though the unembedding shares that."""
    weights = random_weights(config)
    a, b = (jax.random.normal(jax.random.key(n), size) for n, size in ((0, (64, 2)), (1, (2, 32))))
    merged = {**weights, "embed": weights["embed"] + 0.5 * a @ b}
    np.testing.assert_allclose(
        hidden(config, weights, {"embed": LoRA(a, b, 0.5)}, tokens_),
        hidden(config, merged, {}, tokens_),
        atol=1e-4,
    )


def test_layers_are_listed_or_follow_a_pattern(config):
    raw = models.config_to_huggingface(config) | {"num_hidden_layers": 7}
    del raw["layer_types"]
    assert models.config_from_huggingface(raw).local == (*LOCAL * 5, *GLOBAL, *LOCAL)
    raw |= {"sliding_window_pattern": 3}
    assert models.config_from_huggingface(raw).local == (True, True, False) * 2 + LOCAL


def test_what_a_config_leaves_unsaid_is_as_transformers_has_it(config):
    raw = models.config_to_huggingface(config)
    for key in ("max_position_embeddings", "sliding_window", "query_pre_attn_scalar"):
        del raw[key]
    found = models.config_from_huggingface(raw)
    assert (found.context, found.window, found.query_scalar) == (131_072, 4096, 256)


def test_configs_of_transformers_4_and_5_say_the_same(config):
    new = models.config_to_huggingface(replace(config, rope=Rope(8, 2e5, "linear", 4.0)))
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": 2e5, "rope_local_base_freq": 1e4}
    for key in ("type", "rope_type"):
        scaled = old | {"rope_scaling": {key: "linear", "factor": 4.0}}
        assert models.config_from_huggingface(scaled) == models.config_from_huggingface(new)
    del new["rope_parameters"]
    plain = models.config_from_huggingface(new)
    assert (plain.rope, plain.local_rope) == (Rope(8, 1e6), Rope(8, 1e4))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 layers, not 3"),
        ({"layer_types": ["chunked_attention"] * 3}, "a layer of type 'chunked_attention' is"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}}},
         "rope scaling 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "lacks factor"),
    ],
)  # fmt: skip
def test_what_a_config_asks_in_vain_is_refused_by_name(config, change, told):
    raw = models.config_to_huggingface(config) | change
    with pytest.raises(InputError) as caught:
        models.config_from_huggingface(raw, "there/config.json")
    assert str(caught.value).startswith("there/config.json: ")
    assert told in str(caught.value)


def test_keys_that_are_missing_are_told_at_once(config):
    raw = models.config_to_huggingface(config)
    del raw["head_dim"], raw["vocab_size"]
    with pytest.raises(InputError, match=r"vocab_size is missing.*head_dim is missing"):
        models.config_from_huggingface(raw)


def test_the_model_with_pictures_is_refused_by_its_name():
    with pytest.raises(InputError, match=r"model_type 'gemma3' is not one of .*gemma3_text"):
        models.config_from_huggingface({"model_type": "gemma3", "text_config": {}})


def test_the_270m_model_has_its_parameters_and_shapes():
    config = gemma3.Config(
        vocabulary=262_144,
        width=640,
        hidden=2048,
        layers=18,
        heads=4,
        kv_heads=1,
        head_width=256,
        context=32_768,
        local=tuple(bool((n + 1) % 6) for n in range(18)),
        rope=Rope(256, 1e6),
        local_rope=Rope(256, 1e4),
        window=512,
    )
    weights = table.abstract(models.table(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == 268_098_176
    row = jax.ShapeDtypeStruct((2, 700), jnp.int32)
    states = jax.eval_shape(lambda w, row: models.forward(config, w, {}, row).hidden, weights, row)
    assert states.shape == (2, 700, 640)


# Written for this test, in three languages.
TEXTS = {
    "en": """The market opens at seven on Saturdays. By eight the fishmonger has sold most of his
herring, and the woman with the apples is pouring tea from a flask. Children run between the stalls
while their parents argue about the price of potatoes. When it rains, everybody crowds under the
roof of the old town hall and waits, because nobody wants to go home before the bakery has brought
out the second batch of bread.""",
    "fr": """Le marché ouvre à sept heures le samedi. À huit heures, le poissonnier a déjà vendu
presque tous ses harengs, et la marchande de pommes se verse du thé chaud. Les enfants courent entre
les étals pendant que leurs parents discutent du prix des pommes de terre. Quand il pleut, tout le
monde se serre sous le toit de la vieille mairie et attend, car personne ne veut rentrer avant que
la boulangerie ait sorti la deuxième fournée de pain.""",
    "de": """Der Markt öffnet samstags um sieben Uhr. Um acht hat der Fischhändler die meisten
seiner Heringe verkauft, und die Frau mit den Äpfeln gießt sich Tee aus einer Kanne ein. Kinder
laufen zwischen den Ständen umher, während ihre Eltern über den Preis der Kartoffeln streiten.
Wenn es regnet, drängen sich alle unter dem Dach des alten Rathauses und warten, denn niemand will
nach Hause gehen, bevor die Bäckerei das zweite Blech Brot gebracht hat.""",
}


@pytest.fixture
def bits(hidden):
    """A function to a text's bits a character under a model, after its beginning-of-text token."""

    def measure(base, text):
        tokenizer = tokens.load_tokenizer(base.folder)
        row = np.array([[tokenizer.bos_token_id, *tokens.encode(tokenizer, [text])[0]]])
        states = hidden(base.config, base.weights, {}, row)[0, :-1]
        chances = jax.nn.log_softmax(models.unembed(base.config, base.weights, {}, states))
        nats = -jnp.take_along_axis(chances, row[0, 1:, None], axis=-1).sum()
        return float(nats) / np.log(2) / len(text)

    return measure


@pytest.mark.slow
def test_the_real_model_knows_three_languages_and_smollm_one(gemma, bits):
    smollm = bases.load_base("smollm2-135m")
    texts = {language: text.replace("\n", " ") for language, text in TEXTS.items()}
    ours, theirs = ({k: bits(base, text) for k, text in texts.items()} for base in (gemma, smollm))
    assert ours == pytest.approx({"en": 1.10, "fr": 1.24, "de": 1.30}, abs=0.01)
    assert theirs["en"] < 1.2 * ours["en"]
    assert all(theirs[language] > 1.6 * ours[language] for language in ("fr", "de"))


@pytest.mark.slow
def test_the_real_model_needs_each_of_its_parts(gemma, bits):
    """Without any of them it still runs, and only worse numbers tell."""
    text, config, weights = TEXTS["en"].replace("\n", " "), gemma.config, gemma.weights
    bare = {p: v - 1 if p.endswith("norm") else v for p, v in weights["layers"].items()}
    small = weights["embed"] / config.width**0.5
    broken = {
        "one rope for all": replace(gemma, config=replace(config, local_rope=config.rope)),
        "norms without their one": replace(gemma, weights={**weights, "layers": bare}),
        "embeddings not scaled": replace(gemma, weights={**weights, "embed": small}),
    }
    right = bits(gemma, text)
    for name, base in broken.items():
        assert bits(base, text) > 1.1 * right, name
