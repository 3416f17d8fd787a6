"""A state on disk is the one that was saved, whatever happens after or to the disk."""

import errno
import os
import resource
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.errors import InputError
from train.checkpoints import Saver, open_checkpoints, restore
from train.step import State


def state_of(step, size=2000):
    adapter = {"x": jax.random.normal(jax.random.key(step), (size,))}
    return State(
        step=jnp.asarray(step, jnp.int32),
        adapter=adapter,
        optimizer=(jnp.asarray(step), adapter["x"] * 2),
        best={"x": adapter["x"] * 3},
        best_loss=jnp.asarray(0.5, jnp.float32),
        failed=jnp.asarray(False),
    )


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def test_a_state_comes_back_to_the_bit(folder):
    with open_checkpoints(folder) as checkpointer:
        assert restore(checkpointer, state_of(0)) is None
        Saver(checkpointer).save(state_of(7))
    with open_checkpoints(folder) as checkpointer:
        same(restore(checkpointer, state_of(0)), state_of(7))


def test_steps_taken_while_a_state_is_written_do_not_reach_it(folder):
    @partial(jax.jit, donate_argnums=0)
    def step(state):  # as the training step does, in the buffers of the state before
        return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)

    state = state_of(7, size=1_000_000)
    wanted = jax.tree.map(lambda x: np.array(x, copy=True), state)
    with open_checkpoints(folder) as checkpointer:
        Saver(checkpointer).save(state)
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
    with open_checkpoints(folder) as checkpointer:
        same(restore(checkpointer, state_of(0, size=1_000_000)), wanted)


def test_the_two_newest_are_kept(folder):
    with open_checkpoints(folder) as checkpointer:
        saver = Saver(checkpointer)
        for step in (1, 2, 2, 3):
            saver.save(state_of(step))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_a_half_written_checkpoint_is_passed_over(folder):
    with open_checkpoints(folder) as checkpointer:
        Saver(checkpointer).save(state_of(1))
    (folder / "2.orbax-checkpoint-tmp").mkdir()
    with open_checkpoints(folder) as checkpointer:
        same(restore(checkpointer, state_of(0)), state_of(1))


@contextmanager
def small_files(limit):
    """Lets no file grow beyond a limit, as a full disk would not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_in_one_line_and_spares_the_state_before(folder, capfd):
    with open_checkpoints(folder) as checkpointer:
        saver = Saver(checkpointer)
        saver.save(state_of(1))
        saver.wait()
        with small_files(4096), pytest.raises(InputError) as refusal:
            saver.save(state_of(2))
            saver.wait()
    told = str(refusal.value)
    assert "checkpoint of step 2" in told and "step 1 is whole: free some space" in told
    assert "\n" not in told
    assert capfd.readouterr().err == ""
    with open_checkpoints(folder) as checkpointer:
        same(restore(checkpointer, state_of(0)), state_of(1))
        Saver(checkpointer).save(state_of(2))
    with open_checkpoints(folder) as checkpointer:
        same(restore(checkpointer, state_of(0)), state_of(2))


def test_no_space_at_the_first_checkpoint_is_told(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_checkpoints(folder) as checkpointer:
        monkeypatch.setattr(checkpointer, "save_async", full)
        with pytest.raises(InputError, match=r"step 3 .*No space left.*there is none before it"):
            Saver(checkpointer).save(state_of(3))
