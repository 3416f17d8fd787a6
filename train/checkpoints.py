"""A run's state on disk: Orbax checkpoints, written in the background, each whole or absent."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import jax
from orbax.checkpoint.experimental import v1 as ocp

from lora_jax.errors import InputError
from train.step import State

KEEP = 2  # the newest checkpoints; older ones are removed


@contextmanager
def open_checkpoints(folder: Path) -> Iterator[ocp.training.Checkpointer]:
    """The checkpoints of a run; leaving the block waits for the last write."""
    # Orbax narrates every write there, and shows the traceback of what `Saver` tells in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    folder.mkdir(parents=True, exist_ok=True)
    policies: dict[str, Any] = {
        "save_decision_policy": ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        "preservation_policy": ocp.training.preservation_policies.LatestN(KEEP),
    }
    checkpointer = ocp.training.Checkpointer(
        str(folder.absolute()), cleanup_tmp_directories=True, **policies
    )
    try:
        yield checkpointer
    finally:
        checkpointer.close()


class Saver:
    """Saves states in the background; a failed write surfaces at the next call as one error."""

    def __init__(self, checkpointer: ocp.training.Checkpointer):
        self._checkpointer = checkpointer
        self._last = checkpointer.latest.step if checkpointer.latest else None

    def save(self, state: State) -> None:
        """Begins to write the state under its step, unless it is there already."""
        step, tree = int(state.step), cast(Any, state)
        if step == self._last:
            return
        with _told(step, self._checkpointer):
            self.wait()
            self._checkpointer.save_async(step, tree)
        self._last = step

    def wait(self) -> None:
        """Returns when everything begun is on disk."""
        with _told(self._last, self._checkpointer):
            self._checkpointer.wait()


@contextmanager
def _told(step: int | None, checkpointer: ocp.training.Checkpointer) -> Iterator[None]:
    """Turns a failed write into one error that says what is still safe."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Orbax lets through whatever the file system or tensorstore raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        whole = [c.step for c in checkpointer.checkpoints if c.step != step]
        safe = f"the one of step {max(whole)} is whole" if whole else "there is none before it"
        raise InputError(
            f"could not write the checkpoint of step {step} in {checkpointer.directory}: "
            f"{reason[:300]}; {safe}: free some space and --resume"
        ) from error


def restore(checkpointer: ocp.training.Checkpointer, like: State) -> State | None:
    """The newest state on disk, shaped and placed as `like`; None if there is none."""
    if checkpointer.latest is None:
        return None
    abstract: Any = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    return cast(State, checkpointer.load(checkpointer.latest, abstract))
