"""PyTorch files, put together instruction by instruction: torch is not needed, nor is pickle."""

import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import torch_file
from lora_jax.errors import InputError

VALUES = np.arange(12, dtype=np.float32)


def number(n):
    return b"J" + struct.pack("<i", n)


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def numbers(*ns):
    return b"(" + b"".join(map(number, ns)) + b"t"


def storage(kind="FloatStorage", key="0", size=12):
    """What refers to a storage."""
    parts = [text("storage"), named("torch", kind), text(key), text("cpu"), number(size)]
    return b"(" + b"".join(parts) + b"tQ"


def tensor(shape=(3, 4), strides=(4, 1), offset=0, of=None):
    """What rebuilds a tensor, as `torch.save` writes it."""
    hooks = named("collections", "OrderedDict") + b")R"
    parts = [of or storage(), number(offset), numbers(*shape), numbers(*strides), b"\x89", hooks]
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + b"".join(parts) + b"tR"


def program(**tensors):
    """What builds a dict of tensors by name."""
    items = b"".join(text(name) + code for name, code in tensors.items())
    return b"\x80\x02}q\x00(" + items + b"u."


def tower(height):
    """Tuples of two, each of the one before twice; what comes of the last is in the memo."""
    code = b"\x80\x02)q\x00"
    for n in range(height):
        code += b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1])
    return code


# To hash or to print the last would take 2 ** 60 steps.
TOWER, TALL = tower(60), b"h" + bytes([60])


@pytest.fixture
def file(tmp_path):
    """A function that writes a program and storages as a file of today's kind."""

    def write(code, storages=None, compression=zipfile.ZIP_STORED, order=b"little"):
        path = tmp_path / "adapter_model.bin"
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("x/data.pkl", code)
            archive.writestr("x/byteorder", order)
            for key, value in (storages or {"0": VALUES.tobytes()}).items():
                archive.writestr(f"x/data/{key}", value)
        return path

    return write


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        torch_file.read_tensors(path)
    return str(caught.value)


def test_tensors_and_views_of_them_are_read(file):
    parameter = named("torch._utils", "_rebuild_parameter") + b"(" + tensor() + b"\x88" + b"NtR"
    path = file(
        program(
            whole=tensor(),
            turned=tensor((4, 3), (1, 4)),
            part=tensor((2, 2), (4, 2), 1),
            empty=tensor((0, 3), (3, 1)),
            trained=parameter,
        )
    )
    found = torch_file.read_tensors(path)
    grid = VALUES.reshape(3, 4)
    wanted = {"whole": grid, "turned": grid.T, "part": grid[:2, 1::2], "trained": grid}
    assert found["empty"].shape == (0, 3)
    assert all((found[name] == value).all() for name, value in wanted.items())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("HalfStorage", np.float16),
        ("BFloat16Storage", jnp.bfloat16),
        ("DoubleStorage", np.float64),
    ],
)
def test_other_types_of_numbers(file, kind, dtype):
    values = VALUES.astype(dtype)
    code = program(a=tensor(of=storage(kind)))
    found = torch_file.read_tensors(file(code, {"0": values.tobytes()}))["a"]
    assert found.dtype == dtype and (found == values.reshape(3, 4)).all()


def test_files_from_before_1_6(tmp_path):
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    assert pickle.loads(magic) == torch_file.MAGIC
    info = pickle.dumps({"little_endian": True, "protocol_version": 1001}, protocol=2)
    parts = [magic, pickle.dumps(1001, protocol=2), info, program(a=tensor())]
    parts += [pickle.dumps(["0"], protocol=2), struct.pack("<q", 12), VALUES.tobytes()]
    path = tmp_path / "old.bin"
    path.write_bytes(b"".join(parts))
    assert (torch_file.read_tensors(path)["a"] == VALUES.reshape(3, 4)).all()
    path.write_bytes(b"".join(parts)[:-4])
    assert "reaches beyond its 11 numbers" in refusal(path)
    path.write_bytes(b"".join([*parts[:4], TOWER + b"]" + TALL + b"a."]))
    assert "a storage's name is no text" in refusal(path)
    parts[2] = pickle.dumps({"little_endian": False, "protocol_version": 1001}, protocol=2)
    path.write_bytes(b"".join(parts))
    assert "it was written on a big-endian machine" in refusal(path)


class Attack:
    """What an attacker's pickle does when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_by_what_it_names_and_never_run(
    tmp_path, file, protocol, legacy
):
    mark = tmp_path / "run"
    code = pickle.dumps({"a": Attack(mark)}, protocol=protocol)
    path = file(code)
    if legacy:
        path.write_bytes(code)
    assert "its program" in refusal(path) and "save it again as safetensors" in refusal(path)
    assert not mark.exists()
    pickle.loads(code)["a"].close()
    assert mark.exists()  # else nothing was shown


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch", "load"),
        ("torch", "LongStorage"),
        ("numpy.core.multiarray", "_reconstruct"),
    ],
)
def test_any_other_name_is_refused(file, module, name):
    assert f"its program names {module}.{name}, which is not a" in refusal(
        file(program(a=named(module, name) + b")R"))
    )


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"(iposix\nsystem\n.", "its program uses INST"),
        (b"\x82\x01.", "its program uses EXT1"),
        (program(a=named("torch", "FloatStorage") + b")R"), "its program calls what is no"),
        (program(a=number(3)), "something other than a dict of tensors"),
        (b"]" + b".", "something other than a dict of tensors"),
        (program(a=b"(" + text("module") + b"NNNNtQ"), "its program refers to what is no"),
        (program(a=tensor(of=number(1))), "a tensor is made of something other than a storage"),
        (program(a=tensor((3, 5), (5, 1))), "reaches beyond its 12 numbers"),
        (program(a=tensor((3, 4), (4, 1), 1)), "reaches beyond its 12 numbers"),
        (program(a=tensor((10**6, 10**3), (0, 0))), "reaches beyond its 12 numbers"),
        (program(a=tensor((3, 4), (-4, 1))), "a tensor's shape and strides"),
        (program(a=tensor((3, 4), (4,))), "a tensor's shape and strides"),
        (b"h\x05.", "is damaged or not a PyTorch file"),
        (b"", "is damaged or not a PyTorch file"),
        (b"}(u", "is damaged or not a PyTorch file"),
    ],
)
def test_what_is_no_dict_of_tensors_is_refused(file, code, message):
    assert message in refusal(file(code))


def rebuilt(*arguments):
    """What calls the rebuilding of a tensor with these arguments."""
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + b"".join(arguments) + b"tR"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"}" + TALL + b"K\x01s", "a dict's key is no text"),
        (TALL + b")R", "its program calls what is no part of a tensor"),
        (b"(" + TALL + b"NNNNtQ", "its program refers to what is no storage"),
        (b"(" + text("storage") + TALL + b"NNNtQ", "its program refers to what is no storage"),
        (
            b"(" + text("storage") + named("torch", "FloatStorage") + TALL + b"NNtQ",
            "its program refers to what is no storage",
        ),
        (b"}" + text("a") + TALL + b"s", "something other than a dict of tensors"),
        (rebuilt(storage(), number(0), TALL, numbers(4, 1)), "shape and strides"),
        (rebuilt(storage(), TALL, numbers(3, 4), numbers(4, 1)), "shape and strides"),
        (rebuilt(storage(), number(0), numbers(*[1] * 40), numbers(*[1] * 40)), "shape and str"),
    ],
)
def test_what_a_file_holds_is_never_hashed_or_printed(file, code, message):
    assert message in refusal(file(TOWER + code + b"."))


def test_views_of_one_storage_hold_no_more_than_a_few_times_its_numbers(file):
    few = {f"t{n}": tensor() for n in range(torch_file.SHARED)}
    assert len(torch_file.read_tensors(file(program(**few)))) == torch_file.SHARED
    assert "its tensors hold over 4 times the numbers" in refusal(
        file(program(**few, one=tensor()))
    )


def test_a_file_that_is_not_pytorchs_is_refused(tmp_path, file):
    path = tmp_path / "a.bin"
    assert "does not exist" in refusal(path)
    path.write_bytes(b"hello")
    assert "is damaged or not a PyTorch file" in refusal(path)
    path.write_bytes(pickle.dumps(7))
    assert "it is not a file of PyTorch's" in refusal(path)
    assert "it is compressed" in refusal(
        file(program(a=tensor()), compression=zipfile.ZIP_DEFLATED)
    )
    assert "big-endian" in refusal(file(program(a=tensor()), order=b"big"))
    assert "damaged" in refusal(file(program(a=tensor(of=storage(key="7")))))
