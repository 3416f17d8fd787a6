import pytest

from compose.recipe import Expression, Method, Recipe, read_recipe
from compose.recipe.read import parsed_text, with_inputs
from compose.recipe.value import described
from lora_jax.errors import InputError

HEAD = "inputs: {a: A, b: B}\nsteps:\n"
TAIL = "\noutputs: {out: x}\n"


def test_a_file_becomes_a_value(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        """
base: smollm2-135m
space: factor
inputs: {math: adapters/math, code: hf://user/code-lora, no: x}
steps:
  both:
    ties: [math, code]
    weights: [[0, 1], {"*.q_proj": 0.5, "mlp.*": [0, 1], "*": 1}]
    density: 0.3
    space: delta
    rank: 16
  clean: both - 0.4*no
  small: {expression: clean, rank: 2, space: delta}
  routed: {arrow: [clean, code], top_k: 2}
  mean: {mean: clean}
outputs: {out/both: both, out/all: mean, r: routed, s: small}
"""
    )
    weights = ((0, 1), {"*.q_proj": 0.5, "mlp.*": (0, 1), "*": 1})
    assert read_recipe(tmp_path / "recipe.yaml") == Recipe(
        base="smollm2-135m",
        space="factor",
        inputs={"math": "adapters/math", "code": "hf://user/code-lora", "no": "x"},
        steps={
            "both": Method("ties", ("math", "code"), weights, "delta", 16, {"density": 0.3}),
            "clean": Expression("both - 0.4*no"),
            "small": Expression("clean", "delta", 2),
            "routed": Method("arrow", ("clean", "code"), options={"top_k": 2}),
            "mean": Method("mean", ("clean",)),
        },
        outputs={"out/both": "both", "out/all": "mean", "r": "routed", "s": "small"},
    )


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("bse: x\n" + HEAD + "  x: a" + TAIL, (1, 1), "bse: unknown key; did you mean base?"),
        ("inputs: [a]\n", (1, 9), "inputs: a table of NAME: FOLDER is wanted; got a list"),
        ("inputs: {a: 12}\n", (1, 13), "inputs.a: a folder .* got 12; put quotes around it"),
        ("inputs: {a: }\n", (1, 12), "inputs.a: a folder or hf://USER/REPO is wanted; got nothing"),
        ("inputs: {a: A, a: B}\n", (1, 16), "inputs.a: is there twice, on line 1 first"),
        ("base: [x]\n", (1, 7), "base: a base model is wanted; got a list"),
        ("space: dlta\n", (1, 8), "space: space 'dlta' is none of delta, factor"),
        ("inputs: {1a: A}\n", (1, 10), "inputs.1a: a name is letters, digits"),
        (HEAD + "  a: b" + TAIL, (3, 3), "steps.a: an input has this name"),
        (HEAD + "  x: 5" + TAIL, (3, 6), "an expression is wanted, or a method's table; got 5"),
        (HEAD + "  x: a + c" + TAIL, (3, 10), "steps.x: unknown name 'c'; there are a, b"),
        (HEAD + '  x: "a + c"' + TAIL, (3, 11), "steps.x: unknown name 'c'"),
        (HEAD + "  x: a +" + TAIL, (3, 9), "steps.x: the expression ends too early"),
        (HEAD + "  x: 2a" + TAIL, (3, 7), r"steps.x: unexpected 'a'; write 2\*a"),
        (HEAD + "  x: mean(a) - foo(b)" + TAIL, (3, 16), "unknown function 'foo'"),
        (HEAD + "  x: arrow(a, topk=1)" + TAIL, (3, 15), "no 'topk'; did you mean top_k?"),
        (HEAD + "  x: gks(a)" + TAIL, (3, 6), "missing a required argument: 'general'"),
        (HEAD + "  x: x" + TAIL, (3, 6), "steps.x: 'x' is this step itself"),
        (HEAD + "  x: y\n  y: a" + TAIL, (3, 6), r"'y' is made later \(line 4\); move it above"),
        (HEAD + "  x: y\n  y: x" + TAIL, (3, 6), "'y' is itself made of 'x': a circle"),
        (HEAD + "  x: {tiez: [a, b]}" + TAIL, (3, 7), "unknown method 'tiez'; did you mean ties"),
        (HEAD + "  x: {rank: 3}" + TAIL, (3, 3), "steps.x: names no method; there are expression"),
        (HEAD + "  x: {ties: [a], mean: [b]}" + TAIL, (3, 3), "names ties and mean; give each"),
        (HEAD + "  x: {ties: {a: 1}}" + TAIL, (3, 13), "a list of names is wanted; got a table"),
        (HEAD + "  x: {ties: [a, c]}" + TAIL, (3, 17), "steps.x.ties.1: unknown name 'c'"),
        (HEAD + "  x: {ties: [a, a-b]}" + TAIL, (3, 17), "'a-b'; give an expression its own step"),
        (HEAD + "  x: {ties: [a], densty: 1}" + TAIL, (3, 18), "no option 'densty'; did you mean"),
        (
            HEAD + "  x: {ties: [a], density: lots}" + TAIL,
            (3, 27),
            "a number is wanted; got 'lots'",
        ),
        (
            HEAD + "  x: {ties: [a], density: {x}}" + TAIL,
            (3, 27),
            "left open; lora-eval --sweep x",
        ),
        (HEAD + "  x: {ties: [a], density: '0.5'}" + TAIL, (3, 27), "'0.5'; leave its quotes out"),
        (HEAD + "  x: {ties: [a], density: '{x}'}" + TAIL, (3, 27), "leave its quotes out"),
        (HEAD + "  x: {ties: [a], density: 2}" + TAIL, (3, 27), "at most 1; got 2"),
        (HEAD + "  x: {ties: [a], majority: m}" + TAIL, (3, 28), "unknown majority 'm'; choose"),
        (HEAD + "  x: {knots: [a], inner: tiez}" + TAIL, (3, 26), "'tiez'; did you mean ties"),
        (HEAD + "  x: {arrow: [a], top_k: 0}" + TAIL, (3, 26), "top_k must be at least 1; got 0"),
        (HEAD + "  x: ties(a, density=2)" + TAIL, (3, 22), "at most 1; got 2"),
        (HEAD + "  x: {ties: [a], density: true}" + TAIL, (3, 27), "a number is wanted; got True"),
        (HEAD + "  x: {ties: [a], majority: 3}" + TAIL, (3, 28), "a word is wanted; got 3"),
        (HEAD + "  x: {arrow: [a], top_k: 1.5}" + TAIL, (3, 26), "a whole number is wanted"),
        (HEAD + "  x: {ties: [a], seed: 1}" + TAIL, (3, 18), "ties has no option 'seed'"),
        (HEAD + "  x: {knots: [a], gamma: 1}" + TAIL, (3, 19), "knots has no option 'gamma'"),
        (HEAD + "  x: {fisher: [a, b]}" + TAIL, (3, 3), "fisher needs fishers: add it"),
        (HEAD + "  x: {fisher: [a], fishers: [c]}" + TAIL, (3, 30), "unknown name 'c'"),
        (
            HEAD + "  x: {fisher: [a], fishers: 3}" + TAIL,
            (3, 29),
            "a list of names is wanted; got 3",
        ),
        (HEAD + "  x: {gks: [a]}" + TAIL, (3, 7), "steps.x.gks: takes 2 modules; got 1"),
        (HEAD + "  x: {analogy: [a, b, a]}" + TAIL, (3, 3), "analogy needs weight: add it"),
        (HEAD + "  x: {ties: []}" + TAIL, (3, 7), "steps.x.ties: takes at least 1 modules; got 0"),
        (HEAD + "  x: {ties: [a, b], weights: [1]}" + TAIL, (3, 30), "2 members .* got 1"),
        (HEAD + "  x: {ties: [a], weights: 1}" + TAIL, (3, 27), "a list of weights is wanted"),
        (HEAD + "  x: {ties: [a], weights: [w]}" + TAIL, (3, 28), "'w' is no weight; write a"),
        (HEAD + "  x: {ties: [a], weights: [[]]}" + TAIL, (3, 28), "is no weight; write a"),
        (HEAD + "  x: {ties: [a], weights: [{q: [x]}]}" + TAIL, (3, 28), "is no weight"),
        (HEAD + "  x: {arrow: [a], weights: [1]}" + TAIL, (3, 19), "takes no weights; these do: "),
        (HEAD + "  x: {ties: [a], rank: 0}" + TAIL, (3, 24), "rank must be at least 1; got 0"),
        (
            HEAD + "  x: {ties: [a], rank: big}" + TAIL,
            (3, 24),
            "a whole number is wanted; got 'big'",
        ),
        (HEAD + "  x: {ties: [a], rank: 2, space: factor}" + TAIL, (3, 24), "drop the rank"),
        (HEAD + "  x: {ties: [a], space: f}" + TAIL, (3, 25), "space 'f' is none of delta, factor"),
        (HEAD + "  x: {expression: a, density: 1}" + TAIL, (3, 22), "takes space and rank only"),
        (HEAD + "  x: {expression: a, weights: [1]}" + TAIL, (3, 22), "takes space and rank only"),
        (HEAD + "  x: {expression: a + c}" + TAIL, (3, 23), "unknown name 'c'"),
        (HEAD + "  x: a\noutputs: {o: y}", (4, 14), "outputs.o: 'y': unknown step; there are x"),
        (HEAD + "  x: a\noutputs: {o: a}", (4, 14), "outputs.o: 'a': an input, not a step"),
        (HEAD + "  x: a\noutputs: {o: [x]}", (4, 14), "a step's name is wanted; got a list"),
        (HEAD + "  x: a\n", None, "has no outputs; say outputs: {FOLDER: STEP}"),
        ("", None, "has no outputs"),
        ("- a\n", (1, 1), "a recipe is a table of base, space, inputs"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text, place, words, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        read_recipe(tmp_path / "bad.yaml")
    told = str(caught.value)
    assert told.startswith(str(tmp_path / "bad.yaml: "))
    assert place is None or f"line {place[0]}, column {place[1]}: " in told


def test_all_is_told_at_once_in_the_order_of_the_file():
    text = "spac: x\ninputs: {a: 1}\nsteps:\n  x: a - 2b\n  y: {tis: [a]}\noutputs: {o: z}"
    problems = parsed_text(text, "file")[1]
    lines = sorted(problem.place[0] for problem in problems)
    assert lines == [1, 2, 4, 5, 6]


def test_a_step_is_described_with_its_weights():
    weights = (0.5, (0, 1), {"q_proj": 2, "*": (1, 0)})
    step = Method("ties", ("a", "b", "c"), weights, rank=4, options={"density": 0.3})
    told = "ties of a (0.5), b (0 to 1), c (q_proj 2, * 1 to 0); density 0.3, rank 4"
    assert described(step) == told
    assert described(Expression("a - b", rank=2)) == "a - b; rank 2"


def test_a_long_list_is_told_whole(tmp_path):
    steps = "".join(f"  x{n}: {{ties: [a], density: {n + 2}}}\n" for n in range(12))
    (tmp_path / "many.yaml").write_text(f"{HEAD}{steps}outputs: {{o: x1}}\n")
    with pytest.raises(InputError) as caught:
        read_recipe(tmp_path / "many.yaml")
    first, *rest = str(caught.value).split("\n")
    assert first.endswith("many.yaml: 12 things are wrong:")
    assert [line.split(":")[0] for line in rest] == [
        f"  line {n}, column {28 + (n > 12)}" for n in range(3, 15)
    ]


def test_a_step_that_cannot_be_read_is_told_once():
    problems = parsed_text(HEAD + "  x: {tiez: [a]}\n  y: x + a\noutputs: {o: y}", "file")[1]
    assert len(problems) == 1


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.yaml does not exist"):
        read_recipe(tmp_path / "gone.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"latin\.yaml is not UTF-8 text"):
        read_recipe(tmp_path / "latin.yaml")


def test_inputs_may_come_from_elsewhere():
    recipe = Recipe({"a": "A", "b": "B"}, {"x": Expression("a")}, {"out": "x"})
    assert with_inputs(recipe, {"b": "C"}).inputs == {"a": "A", "b": "C"}
    with pytest.raises(InputError, match="no input 'd'; there are a, b"):
        with_inputs(recipe, {"d": "D"})
