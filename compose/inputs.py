"""What a user points at: a PEFT adapter folder, or a library of them, here or on the hub."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from compose import provenance
from compose.folder import INDEX, load_library
from compose.library import Library
from compose.routing import vectors
from compose.syntax import NAME
from lora_jax import bases, hub, models, peft
from lora_jax.errors import InputError
from lora_jax.files import read_json
from lora_jax.modules import Adapter
from lora_jax.wheels import packaged

# What is fetched of an adapter or a library on the hub, and of a library's modules.
_FILES = (peft.CONFIG, peft.WEIGHTS, "adapter_model.bin")
_WANTED = (INDEX, *_FILES, provenance.FILE, provenance.TRAINED)
_MEMBERS = tuple(f"*/{name}" for name in (*_FILES, *vectors.FILES.values()))
DEFAULT_BASE = "smollm2-135m"


def named_folders(given: Sequence[str], taken: Collection[str] = ()) -> dict[str, str]:
    """The folders of `NAME=FOLDER` arguments as written, by name; none of the names in `taken`."""
    folders: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder or not NAME.fullmatch(name):
            raise InputError(
                f"{text!r} is not NAME=FOLDER; a name is letters, digits, _ and ., no digit first"
            )
        if name in folders or name in taken:
            raise InputError(f"{text!r}: the name {name!r} is taken; choose another")
        folders[name] = folder
    return folders


def located(folder: str | Path) -> Path:
    """The folder of an adapter or a library, given as a path or as an address on the hub."""
    found = hub.local(folder, _WANTED)
    if hub.is_address(folder) and (found / INDEX).exists():
        return hub.fetch(str(folder), _WANTED + _MEMBERS)
    return found


def load_input(path: Path, config: models.Config) -> Adapter | Library:
    """The adapter or library in a folder.

    A library that was saved with Arrow's settings has them as `routing`; `arrow.applied` makes it
    the routed adapter.
    """
    return load_library(path, config) if _is_library(path) else peft.load_adapter(path, config)


def base_name(path: Path) -> str:
    """The base model that the adapter or library in a folder says it belongs to, or "".

    A base that is packaged has the name by which `bases.load_base` knows it.
    """
    index = read_json(path / (INDEX if _is_library(path) else peft.CONFIG))
    return packaged(str(index.get("base_model_name_or_path") or ""))


def base_and_config(given: str | None, folders: Mapping[str, Path]) -> tuple[str, models.Config]:
    """The base model's name and config: the one asked for, or else the one the inputs name."""
    if given is not None:
        return given, bases.load_config(given)
    named = {name: base_name(folder) for name, folder in folders.items()}
    if len({base for base in named.values() if base}) > 1:
        told = ", ".join(f"{name} is of {base}" for name, base in named.items() if base)
        remedy = "if not, say --base (in a recipe, base:)"
        raise InputError(f"the inputs are of different base models ({told}); {remedy}")
    for name in filter(None, dict.fromkeys(named.values())):
        try:
            return name, bases.load_config(name)
        except InputError as error:
            lost = ", ".join(path for path, base in named.items() if base == name)
            raise InputError(
                f"{lost}: the base model {name} is out of reach ({error}); say where it is by "
                f"--base (in a recipe, base:)"
            ) from None
    return DEFAULT_BASE, bases.load_config(DEFAULT_BASE)


def _is_library(path: Path) -> bool:
    """Whether a folder is a library or an adapter; any other is refused."""
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give an adapter's or a library's")
    if not (path / INDEX).exists() and not (path / peft.CONFIG).exists():
        raise InputError(f"{path} holds neither {peft.CONFIG} (an adapter) nor {INDEX} (a library)")
    return (path / INDEX).exists()
