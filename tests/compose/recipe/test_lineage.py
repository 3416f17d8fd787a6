import json
from xml.etree import ElementTree

import pytest

from compose import provenance
from compose.recipe import lineage
from compose.recipe.lineage import graph
from compose.recipe.value import told_share

TEXT = """
inputs: {a: A, lib: L}
steps:
  both: {ties: [a, lib], weights: [0.6, [0, 1]], density: 0.3, rank: 4}
  idle: a + lib
  clean: both - 0.4*a
outputs: {o: clean}
"""


def folders(**digests):
    """Inputs as provenance tells them."""
    return {name: {"path": f"/{name}", "sha256": digest} for name, digest in digests.items()}


def named(found):
    """A graph by its boxes' names, the steps' in brackets: their kinds and lines, the arrows."""
    names = {
        key: f"({node.lines[0]})" if node.kind == "step" else node.lines[0]
        for key, node in found.nodes.items()
    }
    nodes = {names[key]: (node.kind, node.lines[1:]) for key, node in found.nodes.items()}
    assert len(nodes) == len(names)
    return nodes, {(names[a], names[b]): weight for (a, b), weight in found.edges.items()}


def test_a_recipes_steps_and_weights_are_in_the_graph():
    record = {"recipe": TEXT, "step": "clean", "inputs": folders(a="1", lib="2")}
    nodes, edges = named(graph(record, "out"))
    assert nodes == {
        "a": ("input", ("A",)),
        "lib": ("input", ("L",)),
        "(both)": ("step", ("ties", "density 0.3, rank 4")),
        "(clean)": ("step", ("both - 0.4*a",)),
        "out": ("output", ()),
    }
    assert edges == {
        ("a", "(both)"): "0.6",
        ("lib", "(both)"): "0 to 1",
        ("(both)", "(clean)"): "",
        ("a", "(clean)"): "",
        ("(clean)", "out"): "",
    }


def test_an_expression_is_one_step():
    inputs = folders(x="1", y="2")
    record = {"expression": "x - y", "space": "factor", "rank": None, "inputs": inputs}
    nodes, edges = named(graph(record, "out"))
    assert nodes["(x - y)"] == ("step", ("space factor",)) and nodes["x"] == ("input", ("/x",))
    assert edges.keys() == {("x", "(x - y)"), ("y", "(x - y)"), ("(x - y)", "out")}


def test_it_reaches_back_to_what_was_trained():
    record = {
        "expression": "late + first",
        "inputs": folders(late="3", first="1"),
        "ancestors": {
            "1": {"training": {"data": ["data/mood.jsonl"]}},
            "3": {"recipe": TEXT, "step": "both", "inputs": folders(a="1", lib="2")},
            "9": {"expression": "z", "inputs": folders(z="8")},
        },
    }
    nodes, edges = named(graph(record, "out"))
    assert nodes.keys() == {"first", "lib", "late", "(both)", "(late + first)", "out"}
    assert nodes["first"][1][-1] == "trained on mood.jsonl"
    record["ancestors"]["1"]["training"]["fisher"] = True
    nodes, _ = named(graph(record, "out"))
    assert nodes["first"][1][-1] == "Fisher information on mood.jsonl"
    assert edges["(both)", "late"] == "" and edges["first", "(both)"] == "0.6"


def test_records_of_one_recipe_share_their_steps():
    inputs = folders(a="1", lib="2")
    made = {
        "3": {"recipe": TEXT, "step": "both", "inputs": inputs},
        "4": {"recipe": TEXT, "step": "clean", "inputs": inputs},
    }
    record = {"expression": "x + y", "inputs": folders(x="3", y="4"), "ancestors": made}
    nodes, edges = named(graph(record, "out"))
    assert nodes.keys() == {"a", "lib", "(both)", "(clean)", "x", "y", "(x + y)", "out"}
    assert ("(both)", "x") in edges and ("(both)", "(clean)") in edges


def test_a_copy_of_an_input_is_no_circle():
    copied = {"expression": "a", "inputs": folders(a="1")}
    found = graph({**copied, "ancestors": {"1": copied}}, "out")
    assert len(found.nodes) == 5 and {"1", "1 again"} < found.nodes.keys()
    lineage.drawn({**copied, "ancestors": {"1": copied}}, "out")


def test_a_record_of_another_version_still_tells_its_inputs():
    for record in (
        {"recipe": "[", "step": "x"},
        {"recipe": TEXT, "step": "gone"},
        {"expression": "+"},
    ):
        nodes, _ = named(graph(record | {"inputs": folders(a="1", b="2")}, "out"))
        assert nodes.keys() == {"a", "b", "(composed)", "out"}


@pytest.mark.parametrize(
    ("share", "told"),
    [(0.5, "0.5"), (2, "2"), ((0, 0.25), "0 to 0.25"), ({"q": (0, 1), "*": 1}, "q 0 to 1, * 1")],
)
def test_weights_in_words(share, told):
    assert told_share(share) == told


def test_the_drawing_is_xml_whatever_the_names():
    odd = "a<b>&\"'\x00\x1b\ud800 ]]> & 漢字" + "long " * 30
    record = {"recipe": TEXT, "step": "clean", "inputs": folders(a=odd, lib="2")}
    record["ancestors"] = {odd: {"training": {"data": [odd, "</svg>"]}}}
    drawing = lineage.drawn(record, odd)
    root = ElementTree.fromstring(drawing.encode())
    texts = list(root.itertext())
    assert "clean" in texts and "both - 0.4*a" in texts and "0 to 1" in texts
    assert any("漢字" in text and "<b>&" in text for text in texts)
    assert "<script" not in drawing and "href" not in drawing


def test_a_long_chain_is_drawn():
    ancestors = {
        str(n): {"expression": "x + y", "inputs": folders(x=str(n - 1), y=str(max(n - 2, 0)))}
        for n in range(1, 60)
    }
    record = {"expression": "x", "inputs": folders(x="59"), "ancestors": ancestors}
    assert len(graph(record, "out").nodes) == 60 + 59 + 2
    ElementTree.fromstring(lineage.drawn(record, "out").encode())


def test_ancestors_come_from_the_records_beside_the_inputs(tmp_path):
    composed = {
        "expression": "p",
        "inputs": folders(p="0"),
        "ancestors": {"0": {"training": {"data": ["d"]}}},
    }
    for name, file, value in (
        ("composed", provenance.FILE, composed | {"versions": {}}),
        ("trained", provenance.TRAINED, {"config": {"data": ["d.jsonl"], "seed": 1}}),
        ("odd", provenance.FILE, {"expression": 3, "inputs": []}),
        ("worse", provenance.FILE, {"recipe": "x", "step": "y", "inputs": {"a": {"path": 1}}}),
        ("listed", provenance.FILE, [1]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(value))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / provenance.FILE).write_text("{")
    names = [path.name for path in tmp_path.iterdir()]
    inputs = {n: {"path": str(tmp_path / n), "sha256": n} for n in [*names, "gone"]}
    assert provenance.ancestors(inputs) == {
        "composed": {"expression": "p", "inputs": folders(p="0")},
        "0": {"training": {"data": ["d"]}},
        "trained": {"training": {"data": ["d.jsonl"]}},
    }
