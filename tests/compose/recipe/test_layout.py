from itertools import combinations

import numpy as np
import pytest

from compose.recipe.layout import placed, shown
from compose.recipe.lineage import Node


def random_graph(seed, count=14):
    """Boxes, and arrows from earlier ones to later."""
    random = np.random.default_rng(seed)
    nodes = {str(n): Node("step", ("x" * int(random.integers(1, 60)), "y")) for n in range(count)}
    pairs = [(str(a), str(b)) for a, b in combinations(range(count), 2)]
    return nodes, {p: "w" * int(random.integers(0, 50)) for p in pairs if random.random() < 0.2}


@pytest.mark.parametrize("seed", range(6))
def test_boxes_stand_apart_right_of_what_they_rest_on_and_inside_the_page(seed):
    nodes, edges = random_graph(seed)
    layout = placed(nodes, edges)
    for one, other in combinations(layout.boxes.values(), 2):
        apart = one.x + one.width < other.x or other.x + other.width < one.x
        assert apart or one.y + one.height < other.y or other.y + other.height < one.y
    for start, end in edges:
        assert layout.boxes[start].x + layout.boxes[start].width < layout.boxes[end].x
    for box in layout.boxes.values():
        assert box.x > 0 and box.x + box.width < layout.width
        assert box.y > 0 and box.y + box.height < layout.height


@pytest.mark.parametrize("seed", range(6))
def test_an_arrow_crosses_no_box_where_it_is_level(seed):
    nodes, edges = random_graph(seed)
    layout = placed(nodes, edges)
    for points in layout.lines.values():
        for (x, y), (x2, _) in zip(points[1:-1:2], points[2:-1:2], strict=True):
            for box in layout.boxes.values():
                inside = box.y < y < box.y + box.height
                assert not inside or x2 <= box.x or box.x + box.width <= x


def test_what_rests_on_nothing_stands_just_before_its_use():
    nodes = {name: Node("step", (name,)) for name in "abcd"}
    boxes = placed(nodes, {("a", "b"): "", ("b", "c"): "", ("d", "c"): ""}).boxes
    assert boxes["d"].x == boxes["b"].x > boxes["a"].x


def test_long_lines_are_cut():
    assert shown("x" * 44) == "x" * 44 and shown("x" * 45) == "x" * 43 + "…"


def test_words_on_an_arrow_have_room():
    nodes = {name: Node("step", (name,)) for name in "ab"}
    gaps = []
    for words in ("", "*.q_proj 0.5, mlp.* 0 to 1, * 1"):
        boxes = placed(nodes, {("a", "b"): words}).boxes
        gaps.append(boxes["b"].x - boxes["a"].x - boxes["a"].width)
    assert gaps[0] == 70 and gaps[1] > 6 * 31
