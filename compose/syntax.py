"""The text of an expression to its tree: "chat - 0.4*toxic", "arrow(gks(lib, wiki), top_k=2)"."""

import re
from collections.abc import Collection
from functools import cache

from lark import Lark, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedInput

from lora_jax.errors import InputError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_NUMBER = r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
GRAMMAR = rf"""
    ?sum: product ((PLUS | MINUS) product)*
    ?product: unary ((TIMES | OVER) unary)*
    ?unary: MINUS unary -> negative
        | atom
    ?atom: NUMBER -> number
        | NAME -> name
        | NAME "(" [argument ("," argument)*] ")" -> call
        | "(" sum ")"
    ?argument: sum
        | NAME "=" (signed | list | NAME | ROOT) -> keyword
    list: "[" sum ("," sum)* "]"
    ?signed: MINUS signed -> negative
        | NUMBER -> number

    PLUS: "+"
    MINUS: "-"
    TIMES: "*"
    OVER: "/"
    ROOT.1: "sqrt(d)"
    NUMBER: /{_NUMBER}/
    NAME: /{NAME.pattern}/
    %import common.WS
    %ignore WS
"""


class ExpressionError(InputError):
    """An expression that cannot be evaluated; its message shows where, with a caret."""

    def __init__(self, text: str, place: int, reason: str) -> None:
        start = text.rfind("\n", 0, place) + 1
        line, column = text[start:].split("\n", 1)[0], place - start
        super().__init__(f"column {column + 1}: {reason}\n  {line}\n  {' ' * column}^")
        self.place, self.reason = place, reason


@cache
def _parser() -> Lark:
    return Lark(
        GRAMMAR, start="sum", parser="lalr", propagate_positions=True, maybe_placeholders=False
    )


def parse(text: str) -> Tree:
    """The expression's tree, as `GRAMMAR` names its nodes, each with its place in the text."""
    try:
        return _parser().parse(text)
    except UnexpectedCharacters as error:
        raise _unexpected(text, error.pos_in_stream, error.char) from None
    except UnexpectedInput as error:
        token = getattr(error, "token", None)
        if not token:
            reason = "the expression ends too early"
            raise ExpressionError(text, len(text.rstrip()), reason) from None
        raise _unexpected(text, token.start_pos, str(token)) from None


def _unexpected(text: str, place: int | None, found: str) -> ExpressionError:
    """An error at what does not belong there; of a number before a name it says what to write."""
    place = place or 0
    number = re.search(rf"{_NUMBER}\s*$", text[:place])
    name = NAME.match(text, place)
    remedy = f"; write {number[0].strip()}*{name[0]}" if number and name else ""
    return ExpressionError(text, place, f"unexpected {found!r}{remedy}")


def names(text: str) -> set[str]:
    """The names of the inputs that an expression uses."""
    return {str(node.children[0]) for node in parse(text).find_data("name")}


def refuse_unknown(text: str, known: Collection[str]) -> None:
    """Refuses an expression that names an input which is not there."""
    for node in parse(text).find_data("name"):
        name = str(node.children[0])
        if name not in known:
            inputs = ", ".join(sorted(known)) or "none"
            message = f"unknown name {name!r}; the inputs are {inputs}"
            raise ExpressionError(text, node.meta.start_pos, message)
