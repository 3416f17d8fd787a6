"""`lora-compose diagnose`: what a composition does to its modules, measured and told."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console

from compose.commands.arguments import Diagnose
from compose.commands.given import read, seed_of
from compose.controls import untrained
from compose.diagnose import Routed, as_recipe, diagnose_recipe
from compose.diagnose_figure import FIGURE, draw
from compose.diagnose_report import FILE, as_json, tables
from compose.diagnose_words import words
from compose.inputs import located, named_folders
from compose.library import Library
from compose.recipe.check import notes
from compose.recipe.command import is_recipe
from compose.recipe.folders import folder_faults
from compose.recipe.plan import plan
from compose.recipe.problems import refuse
from compose.recipe.read import parsed, with_inputs
from compose.recipe.run import Inputs, evaluate, read_inputs
from compose.recipe.value import Recipe
from compose.routing.build import applied
from compose.routing.statistics import routing_statistics
from compose.summary import members
from compose.syntax import names, refuse_unknown
from lora_jax.bases import load_base
from lora_jax.errors import InputError, refuse_all
from lora_jax.files import new_folder, refuse_existing, write_json
from lora_jax.modules import IA3, Adapter, LoRA
from lora_jax.progress import say
from lora_jax.runtime import prepare
from lora_jax.tokens import encode, load_tokenizer

_ROWS, _LENGTH = 8, 128  # the batch that a routed result reads, at most


def run(command: Diagnose) -> None:
    """Prints the tables and the words, and writes them with the figure if asked."""
    if command.out is not None:
        refuse_existing(command.out, command.overwrite)
    of_file = is_recipe(command.expression, command.inputs)
    recipe, inputs = _recipe(command) if of_file else _expression(command)
    found = diagnose_recipe(recipe, inputs.values, initial=_first(inputs))
    if command.text is not None:
        found = replace(found, routing=_routing(recipe, inputs, command.text))
    elif any(result.routed for result in found.results.values()):
        say("note: routing entropy is measured on a text; add --text FILE")
    if command.out is not None:
        with new_folder(command.out, command.overwrite) as scratch:
            write_json(scratch / FILE, as_json(found))
            draw(found, scratch / FIGURE)
    console = Console(highlight=False, markup=False)
    console.print(*tables(found), *words(found), sep="\n")
    if command.out is not None:
        print(command.out)


def _expression(command: Diagnose) -> tuple[Recipe, Inputs]:
    """An expression as a recipe of one step, and the inputs that it names."""
    folders = named_folders(command.inputs)
    refuse_unknown(command.expression, folders)
    used = names(command.expression)
    recipe = as_recipe(command.expression, folders, command.space)
    prepare()
    places = {name: located(folder) for name, folder in folders.items() if name in used}
    found = read(places, command.base)
    return recipe, Inputs(found.places, found.base, found.config, found.values)


def _recipe(command: Diagnose) -> tuple[Recipe, Inputs]:
    """A recipe that is in order, and the inputs that its outputs need.

    Its outputs may exist: nothing is written to them.
    """
    said = {"space": command.space != "delta", "base": command.base is not None}
    refuse_all(
        [
            f"--{n} goes with an expression; say {n}: in the recipe"
            for n, is_said in said.items()
            if is_said
        ],
        command.expression,
    )
    recipe, problems = parsed(Path(command.expression).expanduser())
    recipe = with_inputs(recipe, named_folders(command.inputs))
    refuse([*problems, *folder_faults(recipe, overwrite=True)], recipe.source)
    for note in notes(recipe):
        say(f"note: {note}")
    prepare()
    inputs = read_inputs(recipe)
    plan(recipe, inputs.values)
    return recipe, inputs


def _first(inputs: Inputs) -> dict[str, Adapter]:
    """The modules whose records tell their seed, as they were before training."""
    found = {}
    for name, value in inputs.values.items():
        inner = value.names if isinstance(value, Library) else ("",)
        for (label, adapter), member in zip(members(name, value), inner, strict=True):
            seed = seed_of(inputs.folders[name] / member)
            if seed is not None and all(isinstance(m, LoRA | IA3) for m in adapter.values()):
                found[label] = untrained(adapter, seed)
    return found


def _routing(recipe: Recipe, inputs: Inputs, text: Path) -> dict[str, Routed]:
    """How every routed result routes the first tokens of a text."""
    values = evaluate(recipe, inputs.values)
    made = {name: values[name] for name in recipe.outputs.values()}
    routed = {n: v for n, v in made.items() if isinstance(v, Library) and v.routing is not None}
    if not routed:
        raise InputError("--text is for a routed result, such as arrow(...); this one routes none")
    base = load_base(inputs.base)
    ids = encode(load_tokenizer(base.folder), [text.read_text(encoding="utf-8")])[0]
    if not ids:
        raise InputError(f"{text} holds no text")
    length = min(_LENGTH, len(ids))
    rows = min(_ROWS, len(ids) // length)
    tokens = jnp.asarray(ids[: rows * length]).reshape(rows, length)
    found = {}
    for name, library in routed.items():
        adapter = applied(library)
        statistics = routing_statistics(base.config, base.weights, adapter, tokens)
        assert library.routing is not None
        found[name] = Routed(library.names, library.routing.top_k, statistics)
    return found
