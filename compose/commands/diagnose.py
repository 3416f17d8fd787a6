"""`lora-compose diagnose`: what a composition does to its modules, measured and told."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from compose.commands.arguments import Diagnose
from compose.commands.given import Given, read, seed_of
from compose.controls import untrained
from compose.diagnose import diagnose
from compose.diagnose_report import FIGURE, FILE, as_json, draw, table, words
from compose.expression import resolve
from compose.inputs import located, named_folders
from compose.library import Library
from compose.routing.build import applied
from compose.routing.statistics import routing_statistics
from compose.syntax import names, refuse_unknown
from lora_jax.bases import load_base
from lora_jax.errors import InputError
from lora_jax.files import new_folder, refuse_existing, write_json
from lora_jax.modules import IA3, Adapter, LoRA
from lora_jax.runtime import prepare
from lora_jax.tokens import encode, load_tokenizer

_ROWS, _LENGTH = 8, 128  # the batch that a routed result reads, at most

Statistics = dict[str, dict[str, np.ndarray]]


def run(command: Diagnose) -> None:
    """Prints the table, the words and, of a routed result that reads a text, each layer's share."""
    if command.out is not None:
        refuse_existing(command.out, command.overwrite)
    folders = named_folders(command.inputs)
    refuse_unknown(command.expression, folders)
    used = names(command.expression)
    prepare()
    places = {name: located(folder) for name, folder in folders.items() if name in used}
    found = read(places, command.base)
    values, space = found.values, command.space
    diagnosis = diagnose(command.expression, values, space=space, initial=_first(found))
    statistics = {} if command.text is None else _routing(command, command.text, found)
    if command.out is not None:
        with new_folder(command.out, command.overwrite) as scratch:
            write_json(scratch / FILE, as_json(diagnosis) | _as_json(statistics))
            draw(diagnosis, scratch / FIGURE)
    console = Console(highlight=False, markup=False)
    console.print(table(diagnosis))
    if statistics:
        console.print(_by_layer(statistics))
    for sentence in words(diagnosis):
        console.print(sentence)
    if command.out is not None:
        print(command.out)


def _first(found: Given) -> dict[str, Adapter]:
    """The modules whose records tell their seed, as they were before training."""
    seeds = {name: seed_of(folder) for name, folder in found.folders.items()}
    return {
        name: untrained(adapter, seed)
        for name, adapter in found.modules.items()
        if (seed := seeds[name]) is not None
        and all(isinstance(module, LoRA | IA3) for module in adapter.values())
    }


def _routing(command: Diagnose, text: Path, found: Given) -> Statistics:
    """How the result routes the first tokens of a text, by projection and layer."""
    value = resolve(command.expression, found.values, space=command.space)
    if not isinstance(value, Library) or value.routing is None:
        raise InputError("--text is for a routed result, such as arrow(...); this one routes none")
    base = load_base(found.base)
    ids = encode(load_tokenizer(base.folder), [text.read_text(encoding="utf-8")])[0]
    if not ids:
        raise InputError(f"{text} holds no text")
    length = min(_LENGTH, len(ids))
    rows = min(_ROWS, len(ids) // length)
    tokens = jnp.asarray(ids[: rows * length]).reshape(rows, length)
    return routing_statistics(base.config, base.weights, applied(value), tokens)


def _by_layer(statistics: Statistics) -> Table:
    """A row for every layer: the mean over projections of tokens' entropy, and of its share.

    The share is of the largest entropy that weights of so many modules can have.
    """
    shown = Table("layer", "routing entropy (nats)", "of its largest")
    parts = ("entropy", "relative_entropy")
    means = [np.mean([found[part] for found in statistics.values()], axis=0) for part in parts]
    for layer, (entropy, share) in enumerate(zip(*means, strict=True)):
        shown.add_row(str(layer), f"{entropy:.3f}", f"{share:.1%}")
    return shown


def _as_json(statistics: Statistics) -> dict[str, Any]:
    """The routing as JSON values; nothing where there is none."""
    plain = {
        path: {name: np.asarray(values).tolist() for name, values in found.items()}
        for path, found in statistics.items()
    }
    return {"routing": plain} if plain else {}
