"""What lm-evaluation-harness's --model_args may say, and the model that they describe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from compose.arithmetic import Space
from compose.inputs import located, named_folders
from eval import columns
from eval.bench import Bench
from eval.config import Evaluation
from eval.devices import Devices
from lora_jax import bases, models
from lora_jax.errors import InputError, refuse_all
from lora_jax.tokens import load_tokenizer

LIBRARY = "lib"  # a library's name in expressions


@dataclass(frozen=True)
class Arguments:
    """What --model_args may say."""

    base: str = "smollm2-135m"  # a known name, a folder, a GGUF file or hf://USER/REPO
    adapter: str | Sequence[str] = ()  # NAME=FOLDER, or a list of them
    library: str = ""  # a library's folder; expressions call it lib
    expression: str = ""  # over the names; by default the library, or the one adapter, or base
    top_k: int | None = None  # Arrow's for the library
    temperature: float | None = None  # Arrow's for the library
    mixing: str | None = None  # Arrow's for the library: outputs or factors
    space: Space = "delta"  # delta or factor
    dtype: str | None = None  # of the weights; float32 on a CPU, else bfloat16
    batch_tokens: int | None = None  # in a batch; by default what suits the device
    devices: Devices = "mesh"  # mesh, pmap or one
    max_length: int | None = None  # tokens that the model reads; by default its context
    max_gen_toks: int = 256  # tokens in a reply, unless a task says so
    seed: int = 0  # of replies that are sampled


# What the harness itself always passes. Batches are counted in tokens, and JAX_PLATFORMS decides.
_FOREIGN = {"batch_size", "max_batch_size", "device"}


def _is_text_or_texts(value: Any) -> bool:
    """Whether a value is a text, or several."""
    several = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(one, str) for one in several)


_CHOICES = {
    "space": ("delta", "factor"),
    "devices": ("mesh", "pmap", "one"),
    "dtype": (None, "float32", "bfloat16", "float16"),
    "mixing": (None, "outputs", "factors"),
}
_COUNT = (lambda value: type(value) is int and value >= 1, "a whole number, at least 1")
_TEXT = (lambda value: isinstance(value, str), "a text")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("batch_tokens", "max_length", "max_gen_toks", "top_k"), _COUNT),
    **dict.fromkeys(("base", "library", "expression"), _TEXT),
    "adapter": (_is_text_or_texts, "NAME=FOLDER, or a list of them"),
    "temperature": (lambda value: type(value) in (int, float) and value > 0, "a number over 0"),
    "seed": (lambda value: type(value) is int and 0 <= value < 2**32, "in [0, 2**32)"),
}


def arguments(given: Mapping[str, Any]) -> Arguments:
    """The model's arguments; one error names all that cannot be."""
    known = {field.name for field in fields(Arguments)}
    problems = [
        f"{name} is unknown; known are {', '.join(sorted(known))}"
        for name in given.keys() - known - _FOREIGN
    ]
    problems += [
        f"{name}={given[name]} is not one of {', '.join(filter(None, allowed))}"
        for name, allowed in _CHOICES.items()
        if given.get(name, allowed[0]) not in allowed
    ]
    problems += [
        f"{name}={given[name]} must be {rule}"
        for name, (fits, rule) in _RULES.items()
        if given.get(name) is not None and not fits(given[name])
    ]
    arrow = [name for name in ("top_k", "temperature", "mixing") if given.get(name) is not None]
    if arrow and (given.get("expression") or not given.get("library")):
        problems.append(f"{', '.join(arrow)} are for a library alone; write arrow(...) instead")
    refuse_all(problems, "--model_args")
    return Arguments(**{name: value for name, value in given.items() if name in known})


def recipe(given: Arguments, names: Sequence[str]) -> str:
    """The expression that the arguments describe, over the adapters' `names`."""
    if given.expression:
        return given.expression
    settings = {"top_k": given.top_k, "temperature": given.temperature, "mixing": given.mixing}
    said = [f"{name}={value}" for name, value in settings.items() if value is not None]
    if said:
        return f"arrow({', '.join([LIBRARY, *said])})"
    if len(names) > 1:
        raise InputError(f"--model_args: say what to make of {', '.join(names)}: expression=...")
    return names[0] if names else columns.BASE


def open_bench(given: Arguments) -> Bench:
    """The base model and the one module that the arguments describe, in memory."""
    adapters = (given.adapter,) if isinstance(given.adapter, str) else tuple(given.adapter)
    named = named_folders(adapters, taken={columns.BASE, LIBRARY})
    named |= {LIBRARY: given.library} if given.library else {}
    text = recipe(given, list(named))
    folders = {name: located(folder) for name, folder in named.items()}
    base = bases.load_base(given.base, dtype=given.dtype)
    if models.kind(base.config) != "causal":
        raise InputError(f"the harness asks for a causal model; {given.base} is none")
    found = columns.build((text,), folders, base.config, given.space)
    if len(found) != 1:
        raise InputError(f"{text!r} is a library that is not routed; say top_k=3, or mean(...)")
    settings = Evaluation(
        base=given.base,
        adapters=tuple(f"{name}={folder}" for name, folder in folders.items()),
        compare=(text,),
        space=given.space,
        devices=given.devices,
        batch_tokens=given.batch_tokens,
    )
    return Bench(settings, base, load_tokenizer(base.folder), found)
