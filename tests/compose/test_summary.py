from io import StringIO

from rich.console import Console

from compose import summary
from compose.geometry import recompress_members
from compose.library import Library, Routing

UP = "mlp.up_proj"


def shown(table) -> str:
    console = Console(width=160, file=StringIO())
    console.print(table)
    return console.file.getvalue()


def test_every_module_has_its_norm_and_the_result_what_it_lost(lora):
    x, y = (lora(seed, rank=4, paths=(UP,)) for seed in range(2))
    result, errors = recompress_members(Library(("x", "y"), (x, y), Routing(2)), 2)
    text = shown(summary.sizes({"lib": Library(("x", "y"), (x, y))}, result, errors))
    for words in ("lib.x", "lib.y", "result.x", "result.y", "rank 4", "rank 2", "(max ", "top 2"):
        assert words in text
    assert "routed" not in shown(summary.sizes({"x": x}, x, {}))


def test_cosines_are_shown_for_a_few_inputs(lora, ia3):
    one = {UP: lora(0)[UP]}
    text = shown(summary.cosines({"x": one, "again": one, "scaled": ia3()}))
    assert text.count("+1.000") == 4 and "-" in text
    assert summary.cosines({"x": one}) is None
    many = Library(tuple(map(str, range(9))), (one,) * 9)
    assert summary.cosines({"lib": many}) is None
