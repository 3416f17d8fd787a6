"""What is wrong with a recipe's step, as far as that can be said without its modules."""

import re
from collections.abc import Iterator, Sequence

from compose.expression import refuse_rank
from compose.interpreter import wrong_calls
from compose.merging.refusals import unknown_inner
from compose.option_values import fault
from compose.recipe.methods import METHODS, misfit, options
from compose.recipe.problems import Key, Problem, in_expression, problem
from compose.recipe.shares import WANTED, is_share
from compose.recipe.value import FISHERS, SPACES, Expression, Method, Recipe, Step, reached
from compose.syntax import NAME, ExpressionError, parse
from lora_jax.errors import InputError, nearest

SPACE = f"space {{!r}} is none of {', '.join(SPACES)}"


def step_faults(recipe: Recipe, name: str, step: Step) -> Iterator[Problem]:
    """What is wrong with the step called `name`."""
    key = ("steps", name)
    if step.space not in (*SPACES, None):
        yield problem(recipe.source, (*key, "space"), SPACE.format(step.space))
    if step.rank is not None and (message := _rank(step, recipe)):
        yield problem(recipe.source, (*key, "rank"), message)
    if isinstance(step, Expression):
        yield from _expression(recipe, name, step)
    elif step.name not in METHODS:
        message = f"unknown method {step.name!r}; {nearest(step.name, METHODS)}"
        yield problem(recipe.source, key, message)
    else:
        yield from _members(recipe, name, step)
        yield from _weights(recipe, (*key, "weights"), step)
        yield from _options(recipe, key, step)


def _rank(step: Step, recipe: Recipe) -> str:
    if not isinstance(step.rank, int) or isinstance(step.rank, bool):
        return f"a whole number is wanted; got {step.rank!r}"
    try:
        refuse_rank(step.space or recipe.space, step.rank)
    except InputError as error:
        return str(error)
    return ""


def _expression(recipe: Recipe, name: str, step: Expression) -> Iterator[Problem]:
    """What is wrong with an expression, at its very character."""
    try:
        tree = parse(step.text)
    except ExpressionError as error:
        yield in_expression(recipe.source, ("steps", name), step.text, error)
        return
    wrong = wrong_calls(step.text)
    for node in tree.find_data("name"):
        if message := _unknown(recipe, name, str(node.children[0])):
            wrong.append(ExpressionError(step.text, node.meta.start_pos, message))
    for error in wrong:
        yield in_expression(recipe.source, ("steps", name), step.text, error)


def _members(recipe: Recipe, name: str, step: Method) -> Iterator[Problem]:
    """What is wrong with what a method is given, and with how many there are."""
    form, count, key = METHODS[step.name], len(step.members), ("steps", name, step.name)
    yield from _used(recipe, name, key, step.members)
    if not form.least <= count <= (form.most or count):
        many = f"{form.least}" if form.least == form.most else f"at least {form.least}"
        yield problem(recipe.source, key, f"takes {many} modules; got {count}", on_key=True)


def _used(recipe: Recipe, step: str, key: Key, names: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with names, a list of them or a single one at a key."""
    for n, name in enumerate(names):
        if message := _unknown(recipe, step, name):
            place = (*key, n)
            yield problem(recipe.source, place if place in recipe.source.values else key, message)


def _weights(recipe: Recipe, key: Key, step: Method) -> Iterator[Problem]:
    if step.weights is None:
        return
    if not METHODS[step.name].weighted:
        weighted = ", ".join(name for name, form in METHODS.items() if form.weighted)
        message = f"{step.name} takes no weights; these do: {weighted}"
        yield problem(recipe.source, key, message, on_key=True)
    elif len(step.weights) != len(step.members):
        message = f"{len(step.members)} members need as many weights; got {len(step.weights)}"
        yield problem(recipe.source, key, message)
    for n, share in enumerate(step.weights):
        if not is_share(share):
            yield problem(recipe.source, (*key, n), f"{share!r} is no weight; write {WANTED}")


def _options(recipe: Recipe, key: Key, step: Method) -> Iterator[Problem]:
    """Options that a method has not, that are something else, or that are missing."""
    known = options(step.name, step.options)
    for name, value in step.options.items():
        if name not in known:
            more = ["weights"] * METHODS[step.name].weighted + ["space", "rank"]
            message = f"{step.name} has no option {name!r}; {nearest(name, [*known, *more])}"
            yield problem(recipe.source, (*key, name), message, on_key=True)
        elif name == FISHERS:
            yield from _used(recipe, str(key[1]), (*key, name), value)
        elif wanted := misfit(known[name], value):
            if isinstance(value, dict) and list(value.values()) == [None]:
                name_of = next(iter(value))
                told = f"{{{name_of}}} is left open; lora-eval --sweep {name_of}=0:1:11 fills it in"
                yield problem(recipe.source, (*key, name), told)
                continue
            quoted = "; leave its quotes out" * (isinstance(value, str) and _is_number(value))
            yield problem(recipe.source, (*key, name), f"{wanted} is wanted; got {value!r}{quoted}")
        elif told := unknown_inner(value) if name == "inner" else fault(name, value):
            yield problem(recipe.source, (*key, name), told)
    for name, option in known.items():
        if option.default is option.empty and name not in step.options:
            message = f"{step.name} needs {name}: add it to the step"
            yield problem(recipe.source, key, message, on_key=True)


def _is_number(text: str) -> bool:
    """Whether a text is a number, or stands for one in a sweep."""
    return bool(re.fullmatch(r"\{\w+\}|[-+]?[\d.]+(e[-+]?\d+)?", text.strip(), re.IGNORECASE))


def _unknown(recipe: Recipe, step: str, name: str) -> str:
    """Why a step cannot use a name, and what to do; "" if it can."""
    order = list(recipe.steps)
    known = [*recipe.inputs, *order[: order.index(step)]]
    if name in known:
        return ""
    if name == step:
        return f"{name!r} is this step itself; use the name of an input or an earlier step"
    if name not in order:
        remedy = nearest(name, known) if NAME.fullmatch(name) else "give an expression its own step"
        return f"unknown name {name!r}; {remedy}"
    if step in reached(recipe, name):
        return f"{name!r} is itself made of {step!r}: a circle; change one of the two"
    place = recipe.source.keys.get(("steps", name))
    line = f" (line {place[0]})" if place else ""
    return f"{name!r} is made later{line}; move it above"
