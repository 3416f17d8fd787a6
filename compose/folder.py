"""Libraries on disk: a folder of PEFT adapter folders, and a `library.json` that accounts for them.

{"version": 1, "base_model_name_or_path": "smollm2-135m",
 "modules": [{"name": "boolq", "sha256": {"adapter_config.json": "…", …}}, …],
 "routing": {"top_k": 3, "temperature": 1.0, "mixing": "outputs", "router": "arrow", …} or null}
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compose.library import Library, Routing
from compose.routing.settings import refuse_routing
from compose.routing.vectors import FILES, load_vectors, save_vectors
from lora_jax import models, peft
from lora_jax.errors import InputError, refuse_all
from lora_jax.files import new_folder, read_json, sha256, write_beside

INDEX = "library.json"
_VERSION = 1
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # a folder's name, and never a way out of the library


def save_library(
    folder: Path,
    library: Library,
    config: models.Config,
    *,
    base_name: str = "",
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a library as a folder, whole or not at all.

    `extra` maps names of files to texts, or values for JSON, written beside `library.json`.
    """
    _refuse_names(list(library.names), "the library")
    with new_folder(folder, overwrite) as scratch:
        for name, adapter in zip(library.names, library.adapters, strict=True):
            (scratch / name).mkdir()
            peft.write_adapter(scratch / name, adapter, config, base_name=base_name)
        save_vectors(scratch, library)
        routing = library.routing
        index = {
            "version": _VERSION,
            "base_model_name_or_path": base_name,
            "modules": [{"name": n, "sha256": _hashes(scratch / n)} for n in library.names],
            "routing": None if routing is None else dataclasses.asdict(routing),
        }
        write_beside(scratch, {INDEX: index, **(extra or {})})


def load_library(folder: Path, config: models.Config) -> Library:
    """The library in a folder, each file as `library.json` hashed it."""
    index, where = read_json(folder / INDEX), str(folder / INDEX)
    if index.get("version") != _VERSION:
        raise InputError(f"{where}: version {index.get('version')!r} is not {_VERSION}")
    modules = index.get("modules")
    if not isinstance(modules, list) or not all(_is_entry(entry) for entry in modules):
        raise InputError(f"{where}: modules must be a list of objects with a name and a sha256")
    names = [entry["name"] for entry in modules]
    _refuse_names(names, where)
    for entry in modules:
        _verify(folder / entry["name"], entry["sha256"])
    adapters = tuple(peft.load_adapter(folder / name, config) for name in names)
    routing = _routing(index.get("routing"), len(names), where)
    return Library(tuple(names), adapters, routing, load_vectors(folder, names, config))


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("sha256"), dict)
    )


def _refuse_names(names: list[str], where: str) -> None:
    problems = [
        f"module name {name!r} is no plain folder name (letters, digits, _ . -)"
        for name in names
        if not _NAME.fullmatch(name) or name == INDEX
    ]
    problems += [f"module name {n!r} appears twice" for n in set(names) if names.count(n) > 1]
    refuse_all(problems, where)


def _hashes(folder: Path) -> dict[str, str]:
    extra = [name for name in FILES.values() if (folder / name).exists()]
    return {name: sha256(folder / name) for name in (peft.CONFIG, peft.WEIGHTS, *extra)}


def _verify(folder: Path, expected: Mapping[str, str]) -> None:
    """Refuses an adapter folder whose files are missing or not the ones that were saved."""
    problems = []
    extra = [name for name in FILES.values() if name in expected or (folder / name).exists()]
    for name in (peft.CONFIG, peft.WEIGHTS, *extra):
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256(folder / name) != expected.get(name):
            problems.append(f"{name} is not the file that {INDEX} recorded; save the library again")
    refuse_all(problems, str(folder))


def _routing(settings: Any, count: int, where: str) -> Routing | None:
    """The routing that an index describes; one that cannot be used is refused."""
    if settings is None:
        return None
    try:
        routing = Routing(**settings)
        refuse_routing(routing, count)
    except (TypeError, InputError) as error:
        raise InputError(f"{where}: routing {settings!r} cannot be used: {error}") from None
    return routing
