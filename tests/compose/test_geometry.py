import numpy as np
import pytest

from compose.arrow import route_library
from compose.geometry import cosine, inner, norm, recompress, recompress_members
from compose.library import Library
from lora_jax.errors import InputError

UP = "mlp.up_proj"


def flat(deltas: dict) -> np.ndarray:
    return np.concatenate([np.ravel(deltas[path]) for path in sorted(deltas)])


def test_norm_and_cosine_are_those_of_all_deltas_together(lora, dense):
    x, y = lora(0), lora(1, rank=4)
    one, other = flat(dense(x)), flat(dense(y))
    np.testing.assert_allclose(norm(x), np.linalg.norm(one), rtol=1e-5)
    np.testing.assert_allclose(inner(x, y), one @ other, rtol=1e-3)
    want = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    np.testing.assert_allclose(cosine(x, y), want, atol=1e-5)
    np.testing.assert_allclose(cosine(x, x), 1, rtol=1e-5)


def test_ia3_is_measured_by_its_offsets(ia3):
    x, y = ia3(0), ia3(1)
    one, other = (np.ravel(m[UP].offset) for m in (x, y))
    np.testing.assert_allclose(norm(x), np.linalg.norm(one), rtol=1e-5)
    np.testing.assert_allclose(inner(x, y), one @ other, rtol=1e-4)


def test_the_base_model_adds_nothing(lora):
    assert norm({}) == 0 and inner({}, lora()) == 0 and cosine({}, lora()) == 0


def test_projections_of_one_module_alone_add_to_its_norm_only(lora):
    part = lora(paths=(UP,))
    assert 0 < cosine(part, lora()) < 1


def test_modules_of_two_kinds_have_no_cosine(lora, ia3):
    with pytest.raises(InputError, match="cannot combine"):
        cosine(lora(), ia3())


def test_recompression_tells_every_projections_error(lora, ia3):
    small, errors = recompress({**lora(rank=4, paths=("self_attn.q_proj",)), **ia3()}, 2)
    assert small["self_attn.q_proj"].a.shape[-1] == 2
    assert list(errors) == ["self_attn.q_proj"]
    assert errors["self_attn.q_proj"].shape == (2,) and np.all(errors["self_attn.q_proj"] > 0)


def test_recompression_reaches_every_member(lora):
    members = (lora(0, rank=4, paths=(UP,)), lora(1, rank=2, paths=(UP,)))
    library = Library(("x", "y"), members)
    small, errors = recompress_members(library, 2)
    assert errors.keys() == {"x", "y"} and errors["x"][UP].any() and not errors["y"][UP].any()
    assert {member[UP].a.shape[-1] for member in small.adapters} == {2}
    alone, errors = recompress_members(members[0], 2)
    assert list(errors) == [""] and alone[UP].a.shape[-1] == 2


def test_routed_experts_have_no_norm(lora):
    with pytest.raises(InputError, match="no single delta"):
        norm(route_library(Library(("x",), (lora(paths=(UP,)),)), top_k=1))
