"""What `lora-compose` does once its arguments are read."""

import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from compose import provenance, summary
from compose.cli import Command
from compose.expression import refuse_rank, resolve
from compose.folder import save_library
from compose.functions import Value
from compose.geometry import recompress_members
from compose.inputs import base_name, load_input, located, named_folders
from compose.library import Library
from compose.syntax import names, refuse_unknown
from lora_jax import bases, export, models, peft
from lora_jax.errors import InputError
from lora_jax.files import refuse_existing
from lora_jax.progress import say
from lora_jax.runtime import prepare
from lora_jax.wheels import published

DEFAULT_BASE = "smollm2-135m"


def run(command: Command) -> None:
    """Composes, saves the result with its provenance, and prints what came out."""
    refuse_existing(command.out, command.overwrite)
    folders = _used(command)
    prepare()
    base, config = _base(command.base, folders)
    inputs = {name: load_input(folder, config) for name, folder in folders.items()}
    result, errors = resolve(command.expression, inputs, space=command.space), {}
    if command.rank is not None:
        result, errors = recompress_members(result, command.rank)
    record = provenance.record(
        command.expression,
        folders,
        space=command.space,
        rank=command.rank,
        base_name=base,
        errors=errors,
    )
    _save(command, result, config, base, {provenance.FILE: record})
    _print(inputs, result, errors)
    print(command.out)


def _used(command: Command) -> dict[str, Path]:
    """The folders of the inputs in use, once all that can be checked without them is in order."""
    folders = named_folders(command.inputs)
    refuse_unknown(command.expression, folders)
    if command.rank is not None:
        refuse_rank(command.space, command.rank)
    wanted = names(command.expression)
    return {name: located(folder) for name, folder in folders.items() if name in wanted}


def _base(given: str | None, folders: Mapping[str, Path]) -> tuple[str, models.Config]:
    """The base model's name and config: the one asked for, or else the one the inputs name."""
    if given is not None:
        return given, bases.load_config(given)
    named = {name: base_name(folder) for name, folder in folders.items()}
    if len({base for base in named.values() if base}) > 1:
        told = ", ".join(f"{name} is of {base}" for name, base in named.items() if base)
        raise InputError(f"the inputs are of different base models ({told}); if not, say --base")
    for name in filter(None, dict.fromkeys(named.values())):
        try:
            return name, bases.load_config(name)
        except InputError as error:
            note = f"note: the inputs' base model is out of reach ({error})"
            print(f"{note}; taking {DEFAULT_BASE}, or say --base", file=sys.stderr)
    return DEFAULT_BASE, bases.load_config(DEFAULT_BASE)


def _save(command: Command, result: Value, config: models.Config, base: str, extra: dict) -> None:
    out, over, name = command.out, command.overwrite, published(base)
    if isinstance(result, Library):
        if command.merged:
            raise InputError("--merged takes one module, not a library; write mean() of it")
        save_library(out, result, config, base_name=name, extra=extra, overwrite=over)
    elif command.merged:
        say(f"merging into the base model {base}")
        export.save_merged(out, base, result, extra=extra, overwrite=over)
    else:
        peft.save_adapter(out, result, config, base_name=name, extra=extra, overwrite=over)


def _print(inputs: Mapping[str, Value], result: Value, errors: provenance.Errors) -> None:
    console = Console(highlight=False)
    console.print(summary.sizes(inputs, result, errors))
    if (cosines := summary.cosines(inputs)) is not None:
        console.print(cosines)
