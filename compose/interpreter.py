"""What the tree of an expression stands for: numbers, modules and libraries."""

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from lark import Token, Tree

from compose import arithmetic
from compose.arithmetic import Space
from compose.functions import FUNCTIONS
from compose.library import Library, each
from compose.merging.functions import MERGING, List, Modules
from compose.merging.merge import Errors
from compose.merging.refusals import unknown_inner
from compose.option_values import fault
from compose.syntax import ExpressionError, parse
from lora_jax.errors import InputError, nearest
from lora_jax.modules import Adapter

CALLABLE = FUNCTIONS | MERGING | FUNCTIONS  # of two by one name, the first; and in this order
Inputs = Mapping[str, Adapter | Library]
Value = float | Adapter | Library
Parts = list[Any]  # a node's trees and tokens
MODULES = (Adapter, Library, Adapter | Library)  # what an argument that is no option may be


@dataclass(frozen=True)
class Scope:
    """What an expression is evaluated against."""

    text: str
    inputs: Inputs
    space: Space
    lost: dict[str, Errors] = field(default_factory=dict)  # by calls that merge, to a rank

    def part(self, node: Tree) -> str:
        """A node as it stands in the text."""
        return self.text[node.meta.start_pos : node.meta.end_pos]

    def error(self, node: Tree | Token, message: str) -> ExpressionError:
        """An error that points at a node or token of the text."""
        place = node.meta.start_pos if isinstance(node, Tree) else node.start_pos
        return ExpressionError(self.text, place or 0, message)


def value_of(node: Tree, scope: Scope) -> Value:
    """What a node stands for; an error in what it does points at it."""
    parts: Parts = node.children
    try:
        match node.data:
            case "number":
                return _literal(parts[0], scope)
            case "name":
                return scope.inputs[parts[0]]
            case "negative":
                return _scaled(value_of(parts[1], scope), -1.0, scope)
            case "product":
                return _product(parts, scope)
            case "sum":
                return _sum(parts, scope)
        return _call(node, scope)
    except ExpressionError:
        raise
    except InputError as error:
        raise scope.error(node, str(error)) from None


def _literal(token: Token, scope: Scope) -> float:
    """A token's number; one beyond floats is refused."""
    if not math.isfinite(float(token)):
        raise scope.error(token, f"{token} is too large a number")
    return float(token)


def module_of(node: Tree, scope: Scope) -> Adapter | Library:
    """The module or library that a node stands for; a number is refused."""
    value = value_of(node, scope)
    if isinstance(value, float):
        raise scope.error(node, f"a module is wanted here; this is the number {value:g}")
    return value


def _number(node: Tree | Token, scope: Scope) -> float:
    """The number that a node stands for; anything else is refused."""
    value = None
    if isinstance(node, Tree) and node.data != "list":
        value = value_of(node, scope)
    if not isinstance(value, float):
        raise scope.error(node, "a number is wanted here")
    return value


def _scaled(value: Value, weight: float, scope: Scope) -> Value:
    """A number, module or library times a weight."""
    if isinstance(value, float):
        return weight * value
    return each(lambda m: arithmetic.scale(m, weight, space=scope.space), value)


def _sum(parts: Parts, scope: Scope) -> Value:
    """Terms added and subtracted, in one weighted sum."""
    terms, signs = parts[::2], parts[1::2]
    weights = [1.0] + [-1.0 if sign.type == "MINUS" else 1.0 for sign in signs]
    values = [value_of(term, scope) for term in terms]
    numbers = [value for value in values if isinstance(value, float)]
    modules = [value for value in values if not isinstance(value, float)]
    if not modules:
        return sum(w * v for w, v in zip(weights, numbers, strict=True))
    for term, value in zip(terms, values, strict=True):
        if isinstance(value, float):
            raise scope.error(term, f"the number {value:g} cannot be added to a module")
    return each(lambda *m: arithmetic.weighted_sum(m, weights, space=scope.space), *modules)


def _product(parts: Parts, scope: Scope) -> Value:
    """Numbers multiplied and divided, and at most one module among them."""
    value = value_of(parts[0], scope)
    for operator, operand in zip(parts[1::2], parts[2::2], strict=True):
        other = value_of(operand, scope)
        if operator.type == "OVER":
            if not isinstance(other, float):
                raise scope.error(operand, "nothing can be divided by a module")
            if other == 0:
                raise scope.error(operand, "division by zero")
            other = 1 / other
        if not isinstance(other, float):
            value, other = other, value
        if not isinstance(other, float):
            raise scope.error(operator, "two modules cannot be multiplied")
        value = _scaled(value, other, scope)
    return value


def _call(node: Tree, scope: Scope) -> Value:
    """A function applied: its arguments bound as Python binds them, then evaluated."""
    name, bound = str(node.children[0]), _bound(node.children, scope)
    for key, given in bound.arguments.items():
        bound.arguments[key] = _argument(bound.signature.parameters[key], given, scope)
    found = CALLABLE[name](*bound.args, **bound.kwargs, space=scope.space)
    if isinstance(found, tuple):
        found, scope.lost[scope.part(node)] = found
    return found


def wrong_calls(text: str) -> list[ExpressionError]:
    """What is wrong with an expression's calls as far as that can be said without its inputs."""
    found, scope = [], Scope(text, {}, "delta")
    for node in parse(text).find_data("call"):
        try:
            bound = _bound(node.children, scope)
        except ExpressionError as error:
            found.append(error)
            continue
        for key, given in bound.arguments.items():
            try:
                if _is_option(bound.signature.parameters[key], given):
                    _argument(bound.signature.parameters[key], given, scope)
            except ExpressionError as error:
                found.append(error)
    return found


def _is_option(parameter: inspect.Parameter, given: Any) -> bool:
    """Whether an argument is a number, word or list of them that rests on no input."""
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL or parameter.annotation in MODULES:
        return False
    return isinstance(given, Token) or not any(given.find_data("name"))


def _bound(parts: Parts, scope: Scope) -> inspect.BoundArguments:
    """A call's arguments, not yet evaluated, by the names of the function's parameters."""
    token, *arguments = parts
    name = str(token)
    if name not in CALLABLE:
        raise scope.error(token, f"unknown function {name!r}; {nearest(name, CALLABLE)}")
    keywords = {str(n.children[0]): n.children[1] for n in arguments if n.data == "keyword"}
    positional = [n for n in arguments if n.data != "keyword"]
    shown = {p: v for p, v in inspect.signature(CALLABLE[name]).parameters.items() if p != "space"}
    signature = inspect.Signature(list(shown.values()))
    _refuse_unknown_keywords(arguments, name, list(shown), scope)
    try:
        return signature.bind(*positional, **keywords)
    except TypeError as error:
        raise scope.error(token, f"{_usage(name, signature)}: {error}") from None


def _refuse_unknown_keywords(arguments: Parts, name: str, known: list[str], scope: Scope) -> None:
    """Refuses a keyword that the function `name` lacks, with the one that was probably meant."""
    for node in (n for n in arguments if n.data == "keyword" and n.children[0] not in known):
        keyword = node.children[0]
        close = get_close_matches(keyword, known, 1)
        remedy = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
        raise scope.error(keyword, f"{name}() has no {str(keyword)!r}; {remedy}")


def _usage(name: str, signature: inspect.Signature) -> str:
    """A function as a user would write it: "gks(task, general, strength=1.0)"."""
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return f"{name}{inspect.Signature(plain)}"


def _argument(parameter: inspect.Parameter, given: Any, scope: Scope) -> Any:
    """An argument as its parameter wants it, within what an option of that name may be."""
    value = _plain_argument(parameter, given, scope)
    name = parameter.name
    if told := unknown_inner(value) if name == "inner" else fault(name, value):
        raise scope.error(given, told)
    return value


def _plain_argument(parameter: inspect.Parameter, given: Any, scope: Scope) -> Any:
    """A number, a word, a module, or libraries, as the parameter says."""
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return tuple(_members(node, scope) for node in given)
    if parameter.annotation is str:
        if isinstance(given, Tree):
            usual = parameter.default
            such = "" if usual is parameter.empty else f", such as {usual}"
            raise scope.error(given, f"{parameter.name} is a word{such}")
        return str(given)
    if parameter.annotation == List:
        return tuple(_number(node, scope) for node in _listed(given, scope, "[0.3, 0.7]"))
    if parameter.annotation == Modules:
        return tuple(module_of(node, scope) for node in _listed(given, scope, "[a, b]"))
    if parameter.annotation is bool:
        return _truth(given, scope)
    if parameter.annotation == float | str:
        return str(given) if isinstance(given, Token) else _number(given, scope)
    if parameter.annotation is float:
        return _number(given, scope)
    if parameter.annotation in (int, int | None):
        value = _number(given, scope)
        if value != int(value):
            raise scope.error(given, f"{parameter.name} must be a whole number; got {value:g}")
        return int(value)
    if isinstance(given, Token) or given.data == "list":
        raise scope.error(given, f"{parameter.name} is a module: give it by position")
    return module_of(given, scope)


def _listed(given: Tree | Token, scope: Scope, example: str) -> list[Tree]:
    """The nodes of a list in square brackets."""
    if not isinstance(given, Tree) or given.data != "list":
        raise scope.error(given, f"a list in square brackets is wanted here, such as {example}")
    return [node for node in given.children if isinstance(node, Tree)]


def _truth(given: Tree | Token, scope: Scope) -> bool:
    """The word true or false."""
    if given not in ("true", "false"):
        raise scope.error(given, "true or false is wanted here")
    return given == "true"


def _members(node: Tree, scope: Scope) -> Library:
    """A library as it is, or a module as a library of one that bears its text as its name."""
    value = module_of(node, scope)
    if isinstance(value, Library):
        return value
    return Library(
        (re.sub(r"[^\w.]+", "_", scope.part(node)).strip("._")[:60] or "module",), (value,)
    )
