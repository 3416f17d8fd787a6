"""The functions that an expression may call; their parameters are the ones a user sees."""

from collections.abc import Callable
from dataclasses import replace

from compose import arithmetic, controls
from compose.arithmetic import Space
from compose.genknowsub import centred as without_mean
from compose.genknowsub import project_out as projected
from compose.genknowsub import without
from compose.library import Library, Routing, each, join
from compose.routing.settings import ACTIVATIONS, GATES, SPECTR, UNIFORM, routing_for
from lora_jax.errors import InputError, nearest
from lora_jax.modules import Adapter

Value = Adapter | Library


def mean(*modules: Library, space: Space) -> Adapter:
    """The average of modules; a library stands for its members."""
    return arithmetic.average(join(modules).adapters, space=space)


def negate(module: Value, strength: float = 1.0, *, space: Space) -> Value:
    """-strength times the module's delta, in either space (PEM, arXiv 2306.14870)."""
    return each(lambda m: arithmetic.negate(m, strength), module)


def analogy(task: Value, target: Value, source: Value, weight: float, *, space: Space) -> Value:
    """weight·task + (1 - weight)·(target - source), PEM's domain transfer (arXiv 2306.14870)."""
    return each(
        lambda x, y, z: arithmetic.analogy(x, y, z, weight, space=space), task, target, source
    )


def detox(instructed: Value, toxic: Value, strength: float, *, space: Space) -> Value:
    """instructed + strength·(instructed - toxic), PEM's for Alpaca-LoRA (arXiv 2306.14870)."""
    return each(lambda x, y: arithmetic.detox(x, y, strength, space=space), instructed, toxic)


def gks(task: Value, general: Value, strength: float = 1.0, *, space: Space) -> Value:
    """The task module less strength times the general one: GenKnowSub (arXiv 2505.10939)."""
    return each(lambda x, y: without(x, y, strength=strength, space=space), task, general)


def project_out(task: Value, general: Value, strength: float = 1.0, *, space: Space) -> Value:
    """The task module less strength times its projection on what the general one spans.

    It is in GenKnowSub's code, and not the paper's own method (arXiv 2505.10939).
    """
    return each(lambda x, y: projected(x, y, strength=strength, space=space), task, general)


def centred(*modules: Library, strength: float = 1.0, space: Space) -> Library:
    """The modules as one library, each less strength times their mean, as by gks.

    It is the mean normalisation that GenKnowSub compares itself with (arXiv 2505.10939).
    """
    return without_mean(join(modules), strength=strength, space=space)


def library(*modules: Library, space: Space) -> Library:
    """The modules as one library."""
    return join(modules)


def member(library: Library, *, name: str, space: Space) -> Adapter:
    """The module of this name out of a library: what an oracle that knows the task routes to."""
    if not isinstance(library, Library):
        raise InputError("member takes a library; this is one module, so leave member() out")
    if name not in library.names:
        raise InputError(f"no module {name!r} in this library; {nearest(name, library.names)}")
    return library.adapters[library.names.index(name)]


def arrow(
    *modules: Library,
    top_k: int | None = None,
    temperature: float | str = 1.0,
    mixing: str = "outputs",
    inputs: str = "raw",
    prototypes: str = "own",
    weighting: str = "softmax",
    space: Space,
) -> Library:
    """The modules as one library that is routed by Arrow (arXiv 2405.11157) when it is used."""
    usual = Routing(
        temperature=temperature,
        mixing=mixing,
        inputs=inputs,
        prototypes=prototypes,
        weighting=weighting,
    )
    return _routed(modules, usual, top_k)


def spectr(
    *modules: Library,
    top_k: int | None = None,
    score: str = "paper",
    mixing: str = "factors",
    weighting: str = "uniform",
    temperature: float | str = 1.0,
    space: Space,
) -> Library:
    """The modules as one library that is routed by SpectR, as its paper or its code scores.

    The paper is arXiv 2504.03454.
    """
    known = {"paper": "spectr", "code": "spectr-code"}
    if score not in known:
        raise InputError(f"unknown score {score!r}; choose {' or '.join(known)}")
    settings = {"mixing": mixing, "weighting": weighting, "temperature": temperature}
    return _routed(modules, replace(SPECTR, router=known[score], **settings), top_k)


def gates(
    *modules: Library,
    top_k: int | None = None,
    temperature: float | str = "sqrt(d)",
    mixing: str = "outputs",
    space: Space,
) -> Library:
    """The modules as one library routed by their trained gates: PHATGOOSE (arXiv 2402.05859)."""
    return _routed(modules, replace(GATES, temperature=temperature, mixing=mixing), top_k)


def activations(
    *modules: Library,
    top_k: int | None = None,
    temperature: float | str = "sqrt(d)",
    mixing: str = "outputs",
    space: Space,
) -> Library:
    """The modules as one library that is routed by the mean input of each on its own data.

    It is a baseline in MTTL, Arrow's code (arXiv 2405.11157).
    """
    return _routed(modules, replace(ACTIVATIONS, temperature=temperature, mixing=mixing), top_k)


def uniform(*modules: Library, mixing: str = "outputs", space: Space) -> Library:
    """The modules as one library, each with the same weight for every token."""
    return _routed(modules, replace(UNIFORM, mixing=mixing), None)


def untrained(module: Value, seed: int = 0, *, space: Space) -> Value:
    """The module as it was before training, of the seed of its initialisation: a control."""
    return each(lambda m: controls.untrained(m, seed), module)


def random(module: Value, seed: int = 0, *, space: Space) -> Value:
    """A random module as large as this one: a control."""
    return each(lambda m: controls.random_like(m, seed), module)


def rescaled(module: Value, like: Value, *, space: Space) -> Value:
    """The module made as large as another: a control."""
    return each(controls.rescaled, module, like)


def _routed(modules: tuple[Library, ...], usual: Routing, top_k: int | None) -> Library:
    """The modules as one library that is routed when it is used."""
    whole = join(modules)
    return replace(whole, routing=routing_for(whole, usual, top_k))


FUNCTIONS: dict[str, Callable[..., Value]] = {
    "mean": mean,
    "negate": negate,
    "analogy": analogy,
    "detox": detox,
    "gks": gks,
    "project_out": project_out,
    "centred": centred,
    "library": library,
    "member": member,
    "arrow": arrow,
    "spectr": spectr,
    "gates": gates,
    "activations": activations,
    "uniform": uniform,
    "untrained": untrained,
    "random": random,
    "rescaled": rescaled,
}
