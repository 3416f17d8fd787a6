"""Which modules an adapter's config names, by PEFT's rules."""

from collections.abc import Iterable, Mapping

from lora_jax.peft.patterns import Patience, matching
from lora_jax.peft.settings import Settings


def named(
    names: tuple[str, ...] | str, modules: Iterable[str], patience: Patience | None = None
) -> set[str]:
    """The modules that a list names, whole or by their last parts, or that a pattern matches."""
    if isinstance(names, str):
        return set(matching(names, modules, patience)) if names else set()
    return {m for m in modules if any(f".{m}".endswith(f".{name}") for name in names)}


def kept_whole(settings: Settings, module: str) -> bool:
    """Whether a module is stored whole: it, or one that it is part of, ends as modules_to_save."""
    parts = module.split(".")
    names = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(name.endswith(end) for name in names for end in settings.saved)


def targeted(settings: Settings, modules: Mapping[str, bool]) -> set[str] | None:
    """The modules that the config says were trained; None if it does not say.

    `modules` maps every one that there is to whether "all-linear" means it.
    """
    if settings.targets is None:
        return None
    if isinstance(settings.targets, str) and settings.targets.lower() == "all-linear":
        found = {name for name, linear in modules.items() if linear}
    else:
        found = named(settings.targets, modules, settings.patience)
    found -= named(settings.excluded, modules, settings.patience)
    found -= {m for m in found if any(f".{name}." in f".{m}." for name in settings.saved)}
    return found & _of_layers(settings, found) if settings.layers else found


def _of_layers(settings: Settings, modules: Iterable[str]) -> set[str]:
    """The modules of the layers that the config names, by the first number in a module's name."""
    numbers: dict[str, int] = {}
    for name in reversed(settings.layer_names or (r"[^.]*",)):
        stem = rf"(?:^|.*?\.){name}" if settings.layer_names else rf".*?\.{name}"
        found = matching(rf"{stem}\.(?P<number>\d+)\..*", modules, settings.patience)
        numbers |= {module: int(match["number"]) for module, match in found.items()}
    return {module for module, number in numbers.items() if number in settings.layers}


def by_pattern(
    patterns: Mapping[str, float],
    default: float,
    modules: Iterable[str],
    patience: Patience | None = None,
) -> dict[str, float]:
    """Each module's number: that of the first pattern that its name ends on, or the default."""
    table, patience = dict.fromkeys(modules, default), patience or Patience()
    for pattern, value in reversed(list(patterns.items())):
        table |= dict.fromkeys(matching(rf"(.*\.)?({pattern})", table, patience), value)
    return table
