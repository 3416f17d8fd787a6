import numpy as np
import pytest

from compose.figures import draw_similarity, heat_map
from compose.library import Library
from compose.similarity import similarity
from lora_jax.errors import InputError


def test_a_map_names_its_modules_and_has_its_numbers(lora, tmp_path):
    found = similarity(Library(("mood", "kind"), (lora(0), lora(1))))
    for projection in (None, "mlp.up_proj"):
        path = tmp_path / "new" / f"{projection}.svg"
        draw_similarity(found, path, projection=projection)
        assert path.read_text(encoding="utf-8").count("<svg") == 1
        assert [p.name for p in path.parent.glob(".*")] == []
    with pytest.raises(InputError, match="no projection 'lm_head' was measured; there are self_"):
        draw_similarity(found, path, projection="lm_head")


@pytest.mark.parametrize("count", [1, 17])
def test_a_map_of_any_size_is_an_image(tmp_path, count):
    path = tmp_path / "map.png"
    heat_map(np.eye(count), list(map(str, range(count))), path, title="", lowest=0.0)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_file_that_is_no_figure_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match=r"map\.txt: a figure's file ends in \.png, \.svg, \.pdf"):
        heat_map(np.eye(2), ["a", "b"], tmp_path / "map.txt", title="")
    assert list(tmp_path.iterdir()) == []
