import json
import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax import rope
from lora_jax.decoder import place
from lora_jax.errors import InputError
from lora_jax.rope import Rope

PLAIN = Rope(16, base=100.0)
LLAMA3 = Rope(16, 100.0, "llama3", factor=8.0, context=64, slow=1.0, fast=4.0)
YARN = Rope(16, 100.0, "yarn", factor=4.0, context=64, slow=1.0, fast=4.0, attention=1.25)
SHORT, LONG = tuple(np.linspace(1, 2, 8)), tuple(np.linspace(3, 9, 8))
LONGROPE = Rope(16, 100.0, "longrope", context=64, attention=1.5, short=SHORT, long=LONG)
DYNAMIC = Rope(16, 100.0, "dynamic", factor=2.0, context=64)
LINEAR = Rope(16, 100.0, "linear", factor=4.0)
EVERY = [PLAIN, LLAMA3, YARN, LONGROPE, DYNAMIC, LINEAR]


def angles(one, positions, longest=None):
    """Each position's angles (..., C/2), of which the fastest stay below a turn."""
    cos, sin = rope.tables(one, jnp.asarray(positions), longest)
    return np.arctan2(sin, cos)[..., 0, :]


def speeds(one, longest):
    """How much slower than plain each pair turns in a text whose last position is `longest`."""
    longest = jnp.full((1, 1), longest)
    return angles(one, [[1]], longest)[0, 0] / angles(PLAIN, [[1]])[0, 0]


def test_plain_angles_are_positions_times_powers_of_the_base():
    expected = 3 * 100.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(angles(PLAIN, [[3]])[0, 0], expected, rtol=1e-5)


def test_linear_scaling_divides_positions():
    np.testing.assert_allclose(
        angles(LINEAR, [[8, 4]]), angles(PLAIN, [[2, 1]]), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("one", [LLAMA3, YARN])
def test_slow_pairs_are_interpolated_and_fast_ones_kept(one):
    kept = speeds(one, 5)
    turns = one.context * 100.0 ** (-np.arange(8) / 8) / (2 * math.pi)
    assert (turns > one.fast).sum() >= 2 and (turns < one.slow).sum() >= 2
    # yarn's ramp is from pair to pair, so its ends are the whole pairs around the two limits.
    first, last = np.flatnonzero(turns > one.fast)[-1], np.flatnonzero(turns < one.slow)[0]
    np.testing.assert_allclose(kept[: first + 1], 1, rtol=1e-4)
    np.testing.assert_allclose(kept[last:], 1 / one.factor, rtol=1e-4)
    between = kept[first + 1 : last]
    assert len(between) and ((between < 1) & (between > 1 / one.factor)).all()
    assert (np.diff(kept) <= 1e-6).all()


def test_llama3_goes_by_turns_and_yarn_by_pairs():
    turns = 64 * 100.0 ** (-np.arange(8) / 8) / (2 * math.pi)
    at = np.flatnonzero((turns > 1) & (turns < 4))
    share = (turns[at] - 1) / 3
    np.testing.assert_allclose(speeds(LLAMA3, 5)[at], share + (1 - share) / 8, rtol=1e-4)
    exact = replace(YARN, truncate=False)
    first, last = (8 * math.log(64 / (2 * math.pi * n)) / math.log(100) for n in (4, 1))
    share = 1 - (at - first) / (last - first)
    np.testing.assert_allclose(speeds(exact, 5)[at], share + (1 - share) / 4, rtol=1e-4)
    assert not np.allclose(speeds(exact, 5), speeds(YARN, 5), rtol=1e-2)


def test_longrope_divides_by_its_short_factors_up_to_the_context_and_by_its_long_ones_beyond():
    np.testing.assert_allclose(speeds(LONGROPE, 63), 1 / np.array(SHORT), rtol=1e-4)
    np.testing.assert_allclose(speeds(LONGROPE, 64), 1 / np.array(LONG), rtol=1e-4)


def test_dynamic_scaling_begins_beyond_the_context_and_slows_the_slowest_pair_by_its_excess():
    np.testing.assert_allclose(speeds(DYNAMIC, 63), 1, rtol=1e-5)
    found = speeds(DYNAMIC, 95)  # 96 positions, half as many again
    np.testing.assert_allclose([found[0], found[-1]], [1, 1 / (2 * 1.5 - 1)], rtol=1e-4)


def test_a_row_is_one_text_unless_told():
    short, long = (angles(LONGROPE, [[0, 1, last]])[0, 1] for last in (63, 64))
    np.testing.assert_allclose(short / long, np.array(LONG) / np.array(SHORT), rtol=1e-4)


def test_the_attention_factor_is_on_cosines_and_sines():
    for one in EVERY:
        cos, sin = rope.tables(one, jnp.arange(4)[None])
        np.testing.assert_allclose(cos**2 + sin**2, one.attention**2, rtol=1e-5)
        assert cos.shape == sin.shape == (1, 4, 1, 8)


def test_texts_that_are_packed_end_where_they_would_alone():
    def ends(segments, **options):
        segments = jnp.array([segments])
        if "positions" in options:
            options["positions"] = jnp.array([options["positions"]])
        places = place(segments, segments, options.get("positions"), None)
        return places.ends()[0].tolist()

    assert ends([1, 1, 1, 2, 2], positions=[0, 1, 2, 0, 1]) == [2, 2, 2, 1, 1]
    assert ends([0, 1, 1, 0])[1:3] == [1, 1]
    assert ends([-1, -1, 1, 2, 2], positions=[0, 1, 2, 2, 3]) == [3] * 5


GIVEN = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0, "beta_fast": 16.0, "truncate": False},
    "longrope": {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]},
}
AROUND = {"max_position_embeddings": 64, "rope_theta": 500.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("kind", GIVEN)
def test_old_and_new_keys_say_the_same(kind):
    before = {"original_max_position_embeddings": 16}
    old = AROUND | {"rope_scaling": {"type": kind} | GIVEN[kind] | before}
    new = {"rope_type": kind, "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    new = {"max_position_embeddings": 64, "rope_parameters": new | GIVEN[kind] | before}
    assert rope.problems(old) == rope.problems(new) == []
    one = rope.from_huggingface(old, 8)
    assert one == rope.from_huggingface(new, 8)
    assert (one.width, one.base, one.kind) == (4, 500.0, kind)
    assert one.context == {"default": 0, "linear": 0, "dynamic": 64}.get(kind, 16)
    raw = json.loads(json.dumps({"max_position_embeddings": 64} | rope.to_huggingface(one, 8)))
    assert rope.from_huggingface(raw, 8) == one and hash(one)


def test_a_silent_config_turns_whole_heads_at_base_ten_thousand():
    assert rope.from_huggingface({}, 8) == Rope(8, 10_000.0)
    silent = {"rope_scaling": None, "rope_theta": None, "partial_rotary_factor": None}
    assert rope.from_huggingface(silent, 8) == Rope(8, 10_000.0)


def test_the_context_before_scaling_is_phi3s_key_or_the_inner_one_or_the_limit():
    def context(inner=None, **around):
        inner = {} if inner is None else {"original_max_position_embeddings": inner}
        given = {"rope_type": "llama3"} | GIVEN["llama3"] | inner
        raw = {"max_position_embeddings": 64, "rope_parameters": given} | around
        return rope.from_huggingface(raw, 8).context

    assert context() == 64
    assert context(16) == 16
    assert context(16, original_max_position_embeddings=32) == 32


def test_an_unsaid_attention_factor_is_its_papers():
    def attention(kind, **given):
        inner = {"rope_type": kind, "original_max_position_embeddings": 16} | GIVEN[kind] | given
        raw = {"max_position_embeddings": 64, "rope_parameters": inner}
        return rope.from_huggingface(raw, 4).attention

    assert attention("yarn") == pytest.approx(0.1 * math.log(4) + 1)
    assert attention("yarn", factor=0.5) == 1
    assert attention("yarn", attention_factor=2.5) == 2.5
    both = attention("yarn", mscale=2.0, mscale_all_dim=0.5)
    assert both == pytest.approx((0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    assert attention("longrope") == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))
    assert attention("longrope", factor=1.0) == 1
    assert attention("longrope", attention_factor=0.75) == 0.75


@given(st.integers(2, 512), st.data())
def test_a_share_of_a_head_is_read_as_it_was_written(head, data):
    one = Rope(data.draw(st.integers(1, head)))
    assert rope.from_huggingface(rope.to_huggingface(one, head), head) == one


def test_what_is_unknown_or_incomplete_is_named():
    kinds = "default, linear, dynamic, llama3, yarn, longrope"
    found = rope.problems({"rope_scaling": {"type": "mrope"}})
    assert found == [f"rope scaling 'mrope' is not supported ({kinds} are)"]
    lacking = rope.problems({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}})
    assert lacking == ["rope scaling 'llama3' lacks high_freq_factor, low_freq_factor"]
    with pytest.raises(InputError, match="longrope: short and long factors are 2 and 1, not 2"):
        Rope(4, kind="longrope", short=(1.0, 1.0), long=(1.0,))
