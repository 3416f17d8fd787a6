"""A graph as SVG: one file for any browser, its text to be selected and searched."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree as tree

from compose.recipe.layout import LINE, PADDING, Box, Edge, Layout, Point, shown

FILLS = {"input": "#e8f1fb", "step": "#fff6e0", "output": "#e6f5e9"}
STROKES = {"input": "#4a7fb5", "step": "#c08a1e", "output": "#3f8f55"}
STYLE = "text { font: 12px system-ui, sans-serif; fill: #222 } .name { font-weight: 600 }"
STYLE += " .weight { font-size: 11px; fill: #555; paint-order: stroke; stroke: #fff;"
STYLE += " stroke-width: 4px }"
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # by XML 1.0


def svg(nodes: Mapping[str, Any], edges: Mapping[Edge, str], layout: Layout) -> str:
    """The drawing of nodes that have a `kind` and `lines`, and of edges with what they bear."""
    size = {"width": f"{layout.width:.0f}", "height": f"{layout.height:.0f}"}
    view = f"0 0 {layout.width:.0f} {layout.height:.0f}"
    root = tree.Element("svg", size, xmlns="http://www.w3.org/2000/svg", viewBox=view)
    _put(root, "title", text="lineage")
    _put(root, "style", text=STYLE)
    arrow = {"id": "arrow", "viewBox": "0 0 8 8", "refX": "8", "refY": "4", "orient": "auto"}
    head = _put(_put(root, "defs"), "marker", arrow | {"markerWidth": "8", "markerHeight": "8"})
    _put(head, "path", {"d": "M0 0L8 4L0 8z", "fill": "#777"})
    _put(root, "rect", {"width": "100%", "height": "100%", "fill": "#fff"})
    for edge in edges:
        line = {"d": _curve(layout.lines[edge]), "fill": "none", "stroke": "#777"}
        _put(root, "path", line | {"marker-end": "url(#arrow)"})
    for key, node in nodes.items():
        _box(root, node, layout.boxes[key])
    for edge, weight in edges.items():
        if weight:
            _weight(root, weight, layout.lines[edge])
    tree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tree.tostring(root, "unicode") + "\n"


def _box(root: tree.Element, node: Any, box: Box) -> None:
    """Adds a box with its lines; what is cut short stands whole in its title."""
    group = _put(root, "g", {"class": node.kind})
    _put(group, "title", text="\n".join(node.lines))
    place = {"x": box.x, "y": box.y, "width": box.width, "height": box.height}
    look = {"rx": "6", "fill": FILLS[node.kind], "stroke": STROKES[node.kind]}
    _put(group, "rect", {key: f"{value:.1f}" for key, value in place.items()} | look)
    for n, line in enumerate(node.lines):
        at = {"x": f"{box.x + PADDING:.1f}", "y": f"{box.y + LINE * (n + 1):.1f}"}
        _put(group, "text", at | ({} if n else {"class": "name"}), shown(line))


def _weight(root: tree.Element, weight: str, points: Sequence[Point]) -> None:
    """Adds what an edge bears, in the middle of its first stretch."""
    (x, y), (x2, y2) = points[:2]
    at = {"x": f"{(x + x2) / 2:.1f}", "y": f"{(y + y2) / 2 - 3:.1f}", "text-anchor": "middle"}
    text = _put(root, "text", at | {"class": "weight"}, shown(weight))
    _put(text, "title", text=weight)


def _curve(points: Sequence[Point]) -> str:
    """A path that is level at every point and straight through columns."""
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x, y), (x2, y2) in pairwise(points):
        middle = (x + x2) / 2
        path += f"C{middle:.1f} {y:.1f} {middle:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
    return path


def _put(
    parent: tree.Element, name: str, attributes: Mapping[str, str] | None = None, text: str = ""
) -> tree.Element:
    """A new element in another, with a text in which nothing is markup."""
    element = tree.SubElement(parent, name, dict(attributes or {}))
    element.text = _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text) or None
    return element
