"""Places for the boxes of a graph without cycles: in columns, each right of all it rests on."""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

LETTER, LINE = 7.0, 17.0  # pixels of a letter's width (at 12 px) and of a line's height
PADDING, ROOM = 12.0, 22.0  # within a box, and between one and the next below
BETWEEN = 70.0  # from column to column at least; words on arrows need more
LONGEST = 44  # letters of a line that are shown

Edge = tuple[str, str]
Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels: its left upper corner and its size."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """Where everything is, in pixels."""

    boxes: dict[str, Box] = field(default_factory=dict)
    lines: dict[Edge, list[Point]] = field(default_factory=dict)  # through columns between
    width: float = 0.0
    height: float = 0.0


def shown(line: str) -> str:
    """A line, cut if it is too long to show."""
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def placed(nodes: Mapping[str, Any], edges: Mapping[Edge, str]) -> Layout:
    """Places for nodes that have `lines`, and the ways of the edges between them with their words.

    Columns by longest path; an edge that passes a column takes a place in it, so that it crosses no
    box; the order within columns is that of neighbours' mean places (Sugiyama's method).
    """
    column = _columns(nodes, list(edges))
    sizes = {key: _size(node.lines) for key, node in nodes.items()}
    ways = {edge: _way(edge, column) for edge in edges}
    for (_, end), way in ways.items():
        for n, key in enumerate(reversed(way[1:-1]), start=1):
            column[key], sizes[key] = column[end] - n, (0.0, LINE)
    order = _ordered(column, [pair for way in ways.values() for pair in pairwise(way)])
    gaps = [BETWEEN] * len(order)
    for (start, _), words in edges.items():
        gaps[column[start]] = max(gaps[column[start]], 40 + 0.9 * _width(words))
    boxes, width, height = _boxes(order, sizes, gaps)
    lines = {edge: _points(way, boxes) for edge, way in ways.items()}
    return Layout({key: boxes[key] for key in nodes}, lines, width, height)


def _columns(nodes: Mapping[str, Any], edges: list[Edge]) -> dict[str, int]:
    """Each node's column: after all it rests on; one that rests on nothing just before its use."""
    column = dict.fromkeys(nodes, 0)
    for _ in nodes:
        moved = {end: column[start] + 1 for start, end in edges if column[end] <= column[start]}
        if not moved:
            break
        column |= moved
    ends = {end for _, end in edges}
    for node in column.keys() - ends:
        column[node] = min((column[e] - 1 for s, e in edges if s == node), default=0)
    return column


def _way(edge: Edge, column: Mapping[str, int]) -> list[str]:
    """An edge's start, a place in every column that it passes, and its end."""
    start, end = edge
    between = range(column[start] + 1, column[end])
    return [start, *(f"{start} {end} {n}" for n in between), end]


def _ordered(column: Mapping[str, int], pairs: list[Edge]) -> list[list[str]]:
    """The columns, each in an order that has few crossings."""
    order: list[list[str]] = [[] for _ in range(max(column.values()) + 1)]
    for node, number in column.items():
        order[number].append(node)
    before: dict[str, list[str]] = {node: [] for node in column}
    after: dict[str, list[str]] = {node: [] for node in column}
    for start, end in pairs:
        before[end].append(start)
        after[start].append(end)
    for _ in range(4):
        for n in range(1, len(order)):
            _sort(order[n], order[n - 1], before)
        for n in reversed(range(len(order) - 1)):
            _sort(order[n], order[n + 1], after)
    return order


def _sort(nodes: list[str], others: list[str], near: Mapping[str, list[str]]) -> None:
    """Sorts a column in place by the mean place of each node's neighbours in another."""
    place = {node: n for n, node in enumerate(others)}
    own = {node: n for n, node in enumerate(nodes)}

    def mean(node: str) -> float:
        """Where a node's neighbours are, or it is itself if it has none."""
        found = [place[other] for other in near[node] if other in place]
        return sum(found) / len(found) if found else own[node]

    nodes.sort(key=mean)


def _boxes(
    order: list[list[str]], sizes: Mapping[str, tuple[float, float]], gaps: list[float]
) -> tuple[dict[str, Box], float, float]:
    """Every node's box, columns centred on each other; and the width and height of all."""
    tall = [sum(sizes[n][1] + ROOM for n in nodes) - ROOM for nodes in order]
    height, x, boxes = max(tall) + 2 * PADDING, PADDING, {}
    for nodes, own, gap in zip(order, tall, gaps, strict=True):
        wide, y = max(sizes[n][0] for n in nodes), (height - own) / 2
        for node in nodes:
            width = sizes[node][0] or wide
            boxes[node] = Box(x + (wide - width) / 2, y, width, sizes[node][1])
            y += sizes[node][1] + ROOM
        x += wide + gap
    return boxes, x - gaps[-1] + PADDING, height


def _size(lines: Iterable[str]) -> tuple[float, float]:
    """The width and height of a box around lines of text."""
    widths = [_width(line) for line in lines]
    return max(widths) + 2 * PADDING, LINE * len(widths) + PADDING


def _width(line: str) -> float:
    """The width of a line as it is shown."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in shown(line))
    return LETTER * (len(shown(line)) + wide)


def _points(way: list[str], boxes: Mapping[str, Box]) -> list[Point]:
    """Where an edge goes: out of its start, level through every column it passes, into its end."""
    first, *through, last = (boxes[key] for key in way)
    points = [(first.x + first.width, first.y + first.height / 2)]
    for box in through:
        y = box.y + box.height / 2
        points += [(box.x, y), (box.x + box.width, y)]
    return [*points, (last.x, last.y + last.height / 2)]
