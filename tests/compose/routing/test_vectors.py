import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from compose.command import Command, run
from compose.expression import evaluate, resolve
from compose.folder import INDEX, load_library, save_library
from compose.library import Library, Routing, join
from compose.routing.build import route
from compose.routing.settings import ACTIVATIONS, GATES, SPECTR, UNIFORM, told
from lora_jax.errors import InputError

Q = "self_attn.q_proj"


@pytest.fixture
def folder(tmp_path, config, library):
    """The library on disk, its third module without gates."""
    gates = [{} if n == 2 else held for n, held in enumerate(library.vectors["gates"])]
    vectors = {**library.vectors, "gates": tuple(gates)}
    path = tmp_path / "lib"
    save_library(path, library.replace(routing=Routing(2), vectors=vectors), config)
    return path


def test_vectors_come_back_bit_for_bit_with_their_modules(folder, config, library):
    found = load_library(folder, config)
    assert found.vectors["gates"][2] == {} and not (folder / "x" / "gates.safetensors").exists()
    for router, number in (("gates", 3), ("activations", 2)):
        held, was = found.vectors[router][number], library.vectors[router][number]
        assert held.keys() == was.keys() and all((held[p] == was[p]).all() for p in was)


def test_a_library_of_before_there_were_routers_is_arrows(folder, config):
    index = json.loads((folder / INDEX).read_text())
    index["routing"] = {"top_k": 2, "temperature": 0.5, "mixing": "factors"}
    for module in index["modules"]:
        module["sha256"] = {n: h for n, h in module["sha256"].items() if n.startswith("adapter")}
    (folder / INDEX).write_text(json.dumps(index))
    for path in folder.glob("*/*s.safetensors"):
        path.unlink()
    found = load_library(folder, config)
    assert found.routing == Routing(2, 0.5, "factors") and found.vectors == {}


def test_settings_come_back_as_they_were(tmp_path, config, library):
    routing = Routing(2, "sqrt(d)", "factors", inputs="centred", prototypes="shared")
    save_library(tmp_path / "lib", library.replace(routing=routing), config)
    assert load_library(tmp_path / "lib", config).routing == routing


def test_other_vectors_than_were_saved_are_refused(folder, config):
    path = folder / "v" / "gates.safetensors"
    held = load_file(path)
    save_file({**held, Q: held[Q] + 1}, path)
    with pytest.raises(InputError, match=r"gates\.safetensors is not the file that library\.json"):
        load_library(folder, config)
    path.unlink()
    with pytest.raises(InputError, match=r"gates\.safetensors is missing"):
        load_library(folder, config)


def test_vectors_that_do_not_fit_the_model_are_named(tmp_path, config, members):
    odd = {Q: np.ones((2, 5), np.float32), "elsewhere": np.full(3, np.nan, np.float32)}
    library = Library(("v",), members[:1], vectors={"gates": (odd,)})
    save_library(tmp_path / "lib", library, config)
    words = r"no projection elsewhere; self_attn\.q_proj is \(2, 5\), not \(2, 32\); .* NaN"
    with pytest.raises(InputError, match=words):
        load_library(tmp_path / "lib", config)
    with pytest.raises(InputError, match="vectors for scents; there are gates, activations"):
        save_library(tmp_path / "no", library.replace(vectors={"scents": ({},)}), config)


def test_joined_libraries_keep_each_modules_vectors(library, members):
    joined = join([Library(("alone",), members[:1]), library])
    assert joined.vectors["gates"] == ({}, *library.vectors["gates"])


EXPRESSIONS = {
    "arrow(lib, inputs=unit, prototypes=shared, temperature=sqrt(d), weighting=uniform)": Routing(
        3, "sqrt(d)", inputs="unit", prototypes="shared", weighting="uniform"
    ),
    "arrow(lib, top_k=2, temperature=0.5, mixing=factors)": Routing(2, 0.5, "factors"),
    "spectr(lib)": SPECTR,
    "spectr(lib, score=code, mixing=outputs, weighting=softmax, temperature=2)": replace(
        SPECTR, router="spectr-code", mixing="outputs", weighting="softmax", temperature=2.0
    ),
    "gates(lib)": GATES,
    "gates(lib, top_k=1, temperature=1)": replace(GATES, top_k=1, temperature=1.0),
    "activations(lib)": replace(ACTIVATIONS, top_k=5),
    "uniform(lib)": UNIFORM,
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_every_router_is_an_expression(library, text):
    assert resolve(text, {"lib": library}).routing == EXPRESSIONS[text]
    found, want = evaluate(text, {"lib": library}), route(library, EXPRESSIONS[text])
    assert jax.tree.structure(found) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arrow(lib, inputs=whole)", "unknown inputs 'whole'; choose raw or unit"),
        ("arrow(lib, temperature=hot)", r"must be a number or sqrt\(d\); got 'hot'"),
        ("arrow(lib, temperature=sqrt(e))", "unexpected"),
        ("spectr(lib, score=book)", "unknown score 'book'; choose paper or code"),
        ("gates(lib - lib_one)", "v has none at"),
        ("uniform(lib, mixing=sums)", "unknown mixing 'sums'"),
    ],
)
def test_what_an_expression_cannot_mean_is_told(library, members, text, words):
    bare = library.replace(vectors={})
    with pytest.raises(InputError, match=words):
        evaluate(text, {"lib": bare, "lib_one": members[0]})


def test_lora_compose_keeps_gates_and_routing(tmp_path, folder, config, base_folder):
    gates = folder / "x" / "gates.safetensors"
    assert not gates.exists()
    command = Command(
        "activations(lib, top_k=2)", (f"lib={folder}",), tmp_path / "out", base=str(base_folder)
    )
    run(command)
    found = load_library(tmp_path / "out", config)
    assert found.routing == replace(ACTIVATIONS, top_k=2)
    assert (tmp_path / "out/v/activations.safetensors").exists()
    assert {p.shape for held in found.vectors["activations"] for p in held.values()} == {(2, 32)}


def test_settings_in_words():
    assert told(Routing(2, 0.5)) == "Arrow: top 2, temperature 0.5, mixing outputs"
    words = "gates: top 2, temperature sqrt(d), mixing outputs, inputs standard"
    assert told(GATES) == words
