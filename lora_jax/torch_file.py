"""Tensors of a PyTorch file (`.bin`, `.pt`), read as data: nothing in it is ever executed.

Such a file is a program for Python's pickle machine. Here the program is only walked through, by a
machine that knows a dozen instructions and four callables, none of which does more than describe a
tensor; any other callable is refused by its name before it could matter. What a program has put
together is neither hashed nor printed: of a few bytes it can make tuples that take for ever.
"""

import math
import pickletools
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from lora_jax.errors import InputError

MAGIC = 0x1950A86A20F9469CFC6C  # opens the files that PyTorch wrote before 1.6
SHARED = 4  # times its numbers that tensors may take of one storage: tied weights share theirs
AXES = 32  # of a tensor
DTYPES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(jnp.bfloat16),
}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch file by name: a dict of them is all that it may hold."""
    try:
        with path.open("rb") as file:
            found, storages = (_zipped if zipfile.is_zipfile(path) else _legacy)(file)
        views = {name: _view(tensor, storages) for name, tensor in found.items()}
        _refuse_copies(found, views, storages)
        return {name: view.copy() for name, view in views.items()}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; the folder is incomplete") from None
    except _Refused as error:
        raise InputError(f"{path}: {error}; save it again as safetensors if you trust it") from None
    except Exception as error:  # whatever a damaged program leads the machine to
        raise InputError(f"{path} is damaged or not a PyTorch file ({error})") from None


class _Refused(Exception):
    """What a file asks for and may not have."""


@dataclass(frozen=True)
class _Storage:
    """A run of numbers that is stored elsewhere in the file."""

    dtype: np.dtype
    key: str


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides in numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A class or function that the program names: "module name"."""

    name: str


def _zipped(file: BinaryIO) -> tuple[dict, dict[str, bytes]]:
    """The objects and storages of a file as PyTorch has written them since 1.6: a plain archive."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise _Refused("it is compressed, which PyTorch's files are not")
        stem = next(name for name in entries if name.endswith("/data.pkl"))[: -len("data.pkl")]
        if entries.get(f"{stem}byteorder") and archive.read(f"{stem}byteorder") != b"little":
            raise _Refused("it was written on a big-endian machine")
        found = _tensors(_run(archive.read(f"{stem}data.pkl")))
        keys = {tensor.storage.key for tensor in found.values()}
        return found, {key: archive.read(f"{stem}data/{key}") for key in keys}


def _legacy(file: BinaryIO) -> tuple[dict, dict[str, bytes]]:
    """The objects and storages of a file as PyTorch wrote them before 1.6: programs, then bytes."""
    if _run(file) != MAGIC:
        raise _Refused("it is not a file of PyTorch's")
    _run(file)  # the protocol's number
    if not _run(file).get("little_endian"):
        raise _Refused("it was written on a big-endian machine")
    found, storages = _tensors(_run(file)), {}
    sizes = {tensor.storage.key: tensor.storage for tensor in found.values()}
    for key in _run(file):
        if not isinstance(key, str):
            raise _Refused("a storage's name is no text")
        count = int.from_bytes(file.read(8), "little")
        storages[key] = file.read(count * sizes[key].dtype.itemsize)
    return found, storages


def _tensors(found: Any) -> dict[str, _Tensor]:
    """The tensors of a file's one object, if they are all that it holds."""
    if not isinstance(found, dict) or not all(isinstance(t, _Tensor) for t in found.values()):
        raise _Refused("it holds something other than a dict of tensors")
    return found


def _view(tensor: _Tensor, storages: Mapping[str, bytes]) -> np.ndarray:
    """A tensor's numbers where its storage has them, once they are known to lie within it."""
    flat = np.frombuffer(storages[tensor.storage.key], tensor.storage.dtype)
    shape, strides = tensor.shape, tensor.strides
    last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and (math.prod(shape) > flat.size or last >= flat.size):
        raise _Refused(f"a tensor of shape {shape} reaches beyond its {flat.size} numbers")
    size = flat.dtype.itemsize
    return np.lib.stride_tricks.as_strided(
        flat[tensor.offset :], shape, [step * size for step in strides]
    )


def _refuse_copies(
    found: Mapping[str, _Tensor], views: Mapping[str, np.ndarray], storages: Mapping[str, bytes]
) -> None:
    """Refuses tensors that share a storage so often that a small file would fill the memory."""
    held: Counter[str] = Counter()
    for name, tensor in found.items():
        held[tensor.storage.key] += views[name].nbytes
    if any(count > SHARED * len(storages[key]) for key, count in held.items()):
        raise _Refused(f"its tensors hold over {SHARED} times the numbers of their storage")


def _rebuild(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    """What `torch._utils._rebuild_tensor_v2` stands for."""
    if not isinstance(storage, _Storage):
        raise _Refused("a tensor is made of something other than a storage")
    whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
    if not whole or len(shape) != len(strides) or len(shape) > AXES:
        raise _Refused("a tensor's shape and strides are not whole numbers, one each an axis")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


# Every callable that a program may use, and what it stands for here.
CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": lambda: {},
    "torch._utils _rebuild_tensor": _rebuild,
    "torch._utils _rebuild_tensor_v2": _rebuild,
    "torch._utils _rebuild_parameter": lambda data, *_: data,
}

_MARK = object()  # where the arguments of a later instruction begin


def _run(program: bytes | BinaryIO) -> Any:
    """What a pickle program leaves on its stack; stops at the first instruction not known here."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(program):
        kind, key = opcode.name, argument if isinstance(argument, int) else len(memo)
        if kind in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[key] = stack[-1]
        elif kind in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[key])
        elif kind in _CONSTANTS:
            stack.append(argument)
        elif kind in _STEPS:
            _STEPS[kind](stack, argument)
        elif kind not in ("PROTO", "FRAME", "STOP"):
            raise _Refused(f"its program uses {kind}, which no tensor needs")
    return stack.pop()


def _name(stack: list, name: str) -> None:
    """Puts a callable or a storage's type on the stack, if it is one of those known."""
    if name not in CALLS and name not in DTYPES:
        raise _Refused(f"its program names {name.replace(' ', '.')}, which is not a tensor's")
    stack.append(_Name(name))


def _call(stack: list) -> None:
    """Replaces a callable and its arguments by what it makes of them."""
    arguments, function = stack.pop(), stack.pop()
    if not isinstance(function, _Name) or function.name not in CALLS:
        raise _Refused("its program calls what is no part of a tensor")
    stack.append(CALLS[function.name](*arguments))


def _storage(stack: list) -> None:
    """Replaces a reference ("storage", type, key, device, size, ...) by the storage."""
    word, kind, key, _, _, *view = stack.pop()
    known = isinstance(kind, _Name) and kind.name in DTYPES and isinstance(key, str)
    if word != "storage" or not known or any(view):
        raise _Refused("its program refers to what is no storage of numbers")
    stack.append(_Storage(DTYPES[kind.name], key))


def _since_mark(stack: list) -> list:
    """Takes what was put on the stack since the last mark, and the mark."""
    taken: list[Any] = []
    while (top := stack.pop()) is not _MARK:
        taken.append(top)
    return taken[::-1]


def _tuple(stack: list, count: int) -> None:
    """Replaces the last `count` objects by a tuple of them."""
    stack[-count:] = [tuple(stack[-count:])]


def _extend(stack: list, taken: list) -> None:
    """Puts objects at the end of the list that is on the stack."""
    stack[-1].extend(taken)


def _put_in(stack: list, flat: list) -> None:
    """Puts keys and values, in turns, into the dict that is on the stack."""
    if not all(isinstance(key, str) for key in flat[::2]):
        raise _Refused("a dict's key is no text")
    stack[-1].update(zip(flat[::2], flat[1::2], strict=True))


# Instructions that push their own argument, and what the others do to the stack.
_CONSTANTS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
_STEPS: dict[str, Callable[[list, Any], None]] = {
    "MARK": lambda stack, _: stack.append(_MARK),
    "NONE": lambda stack, _: stack.append(None),
    "NEWTRUE": lambda stack, _: stack.append(True),
    "NEWFALSE": lambda stack, _: stack.append(False),
    "EMPTY_DICT": lambda stack, _: stack.append({}),
    "EMPTY_LIST": lambda stack, _: stack.append([]),
    "EMPTY_TUPLE": lambda stack, _: stack.append(()),
    "TUPLE": lambda stack, _: stack.append(tuple(_since_mark(stack))),
    "TUPLE1": lambda stack, _: _tuple(stack, 1),
    "TUPLE2": lambda stack, _: _tuple(stack, 2),
    "TUPLE3": lambda stack, _: _tuple(stack, 3),
    "APPEND": lambda stack, _: stack[-2].append(stack.pop()),
    "APPENDS": lambda stack, _: _extend(stack, _since_mark(stack)),
    "SETITEM": lambda stack, _: _put_in(stack, [stack.pop(-2), stack.pop()]),
    "SETITEMS": lambda stack, _: _put_in(stack, _since_mark(stack)),
    "GLOBAL": _name,
    "STACK_GLOBAL": lambda stack, _: _name(stack, " ".join((stack.pop(-2), stack.pop()))),
    "REDUCE": lambda stack, _: _call(stack),
    "BINPERSID": lambda stack, _: _storage(stack),
    "BUILD": lambda stack, _: stack.pop(),  # an OrderedDict's attributes: `_metadata`, unused
}
