"""What `lora-compose` does once its arguments are read."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from compose import provenance, summary
from compose.cli import Command
from compose.expression import refuse_rank, resolve_with_losses
from compose.folder import save_library
from compose.functions import Value
from compose.geometry import recompress_members
from compose.inputs import base_and_config, load_input, located, named_folders
from compose.library import Library
from compose.recipe import command as recipes
from compose.recipe import lineage
from compose.syntax import names, refuse_unknown
from lora_jax import export, models, peft
from lora_jax.errors import InputError
from lora_jax.files import refuse_existing
from lora_jax.progress import say
from lora_jax.runtime import prepare
from lora_jax.wheels import published


def run(command: Command) -> None:
    """Composes, saves the result with its provenance, and prints what came out."""
    if recipes.is_recipe(command.expression, command.inputs):
        return recipes.run(command)
    if command.out is None:
        raise InputError("--out is missing: the folder to write")
    if command.dry_run:
        raise InputError("--dry-run is for recipes; an expression is checked before it runs")
    refuse_existing(command.out, command.overwrite)
    folders = _used(command)
    prepare()
    base, config = base_and_config(command.base, folders)
    inputs = {name: load_input(folder, config) for name, folder in folders.items()}
    result, lost = resolve_with_losses(command.expression, inputs, space=command.space)
    errors = {}
    if command.rank is not None:
        result, errors = recompress_members(result, command.rank)
    made = {key: getattr(command, key) for key in ("expression", "space", "rank")}
    record = provenance.record(made, folders, base_name=base, errors=lost | errors)
    extra = {provenance.FILE: record, lineage.FILE: lineage.drawn(record, command.out.name)}
    _save(command, command.out, result, config, base, extra)
    _print(inputs, result, errors, lost)
    print(command.out)


def _used(command: Command) -> dict[str, Path]:
    """The folders of the inputs in use, once all that can be checked without them is in order."""
    folders = named_folders(command.inputs)
    refuse_unknown(command.expression, folders)
    if command.rank is not None:
        refuse_rank(command.space, command.rank)
    wanted = names(command.expression)
    return {name: located(folder) for name, folder in folders.items() if name in wanted}


def _save(
    command: Command, out: Path, result: Value, config: models.Config, base: str, extra: dict
) -> None:
    over, name = command.overwrite, published(base)
    if isinstance(result, Library):
        if command.merged:
            raise InputError("--merged takes one module, not a library; write mean() of it")
        save_library(out, result, config, base_name=name, extra=extra, overwrite=over)
    elif command.merged:
        say(f"merging into the base model {base}")
        export.save_merged(out, base, result, extra=extra, overwrite=over)
    else:
        peft.save_adapter(out, result, config, base_name=name, extra=extra, overwrite=over)


def _print(
    inputs: Mapping[str, Value],
    result: Value,
    errors: provenance.Errors,
    merges: provenance.Errors,
) -> None:
    console = Console(highlight=False, markup=False)
    console.print(summary.sizes(inputs, result, errors, merges))
    if (cosines := summary.cosines(inputs)) is not None:
        console.print(cosines)
