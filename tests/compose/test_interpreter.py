import pytest

from compose.expression import resolve
from compose.library import Library
from compose.syntax import ExpressionError


@pytest.fixture(scope="module")
def inputs(lora, ia3):
    """Adapters of both kinds, and a library."""
    library = Library(("x", "y"), (lora(5), lora(6)))
    return {"a": lora(0), "b": lora(1), "c": lora(2), "scaled": ia3(), "lib": library}


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("a - toxik", 5, "unknown name 'toxik'; the inputs are a, b, c, lib, scaled"),
        ("a + sum(b)", 5, "unknown function 'sum'; there are mean, negate"),
        ("3", 1, "a module is wanted here; this is the number 3"),
        ("a + 1", 5, "the number 1 cannot be added to a module"),
        ("1 - a", 1, "the number 1 cannot be added to a module"),
        ("a*b", 2, "two modules cannot be multiplied"),
        ("2/a", 3, "nothing can be divided by a module"),
        ("a/(1 - 1)", 4, "division by zero"),
        ("1e999*a", 1, "1e999 is too large a number"),
        ("gks(a)", 1, r"gks\(task, general, strength=1.0\): missing .* 'general'"),
        ("analogy(a, b, c, 1, 2)", 1, "too many positional arguments"),
        ("analogy(a, b, c, c)", 18, "a number is wanted here"),
        ("negate(2)", 8, "a module is wanted here; this is the number 2"),
        ("gks(task=a, general=b)", 10, "task is a module: give it by position"),
        ("arrow(lib, k=2)", 12, r"arrow\(\) has no 'k'; it has modules, top_k, temperature"),
        ("arrow(lib, topk=2)", 12, r"arrow\(\) has no 'topk'; did you mean top_k\?"),
        ("arrow(lib, space=factor)", 12, r"arrow\(\) has no 'space'; it has"),
        ("arrow(a, scaled)", 1, "mlp.up_proj: Arrow routes LoRA .* holds IA3 and LoRA"),
        ("arrow(lib, top_k=3)", 1, "between 1 and the library's 2 modules; got 3"),
        ("arrow(lib, top_k=1.5)", 18, "top_k must be a whole number; got 1.5"),
        ("arrow(lib, top_k=many)", 18, "a number is wanted here"),
        ("arrow(lib, top_k=-1)", 18, "top_k must be at least 1; got -1"),
        ("arrow(lib, top_k= -1.5)", 19, "top_k must be a whole number; got -1.5"),
        ("gks(a, b, strength=-1e999)", 21, "1e999 is too large a number"),
        ("arrow(lib, mixing=-2)", 19, "mixing is a word, such as outputs"),
        ("arrow(lib, top_k=1, mixing=both)", 28, "unknown mixing 'both'"),
        ("lib + library(a, b)", 1, "must agree: one alone has x, y, the other a, b"),
        ("2*(a - scaled)", 4, "cannot combine IA3"),
        ("mean()", 1, "average of no modules"),
    ],
)
def test_what_cannot_be_done_is_pointed_at(inputs, text, column, words):
    with pytest.raises(ExpressionError, match=words) as caught:
        resolve(text, inputs)
    first, line, caret = str(caught.value).split("\n")
    assert first.startswith(f"column {column}: ")
    assert line == f"  {text}" and caret.index("^") == column + 1


def test_arrow_takes_three_modules_a_token_or_all_of_fewer(inputs):
    assert resolve("arrow(a, b)", inputs).routing.top_k == 2
    assert resolve("arrow(lib, a, b)", inputs).routing.top_k == 3


def test_members_are_named_by_what_they_are(inputs):
    found = resolve("library(a - b, gks(a, b), lib, a, a)", inputs)
    assert found.names == ("a_b", "gks_a_b", "x", "y", "a", "a_2")


def test_numbers_are_worked_out_before_they_meet_a_module(inputs):
    found = resolve("(1 + 2*3 - 4/2) * a", inputs)
    assert (found["mlp.up_proj"].b == 5 * inputs["a"]["mlp.up_proj"].b).all()
