"""Files on the Hugging Face hub, by address: hf://[datasets/]USER/REPO[/PATH][@REVISION].

huggingface_hub's cache, tokens, retries and offline mode are at work (HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT). Only files that were asked for are fetched, and none is run.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_jax.errors import InputError

SCHEME = "hf://"
_NOT_A_MODEL = ("datasets/", "spaces/", "kernels/", "buckets/", "models/")
# The revision may also stand where huggingface_hub writes it: USER/REPO@REVISION/PATH.
_ADDRESS = re.compile(
    SCHEME + r"(?P<kind>datasets/|models/)?(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<early>refs/(?:pr|convert)/[\w.-]+|[^/@\s]+))?"
    r"(?P<path>(?:/(?!\.{1,2}(?:/|@|$))[^/@*?\[\]\\]+)*)"
    r"(?:@(?P<late>[^@\s]+))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Address:
    """A place on the hub."""

    kind: str  # "model" or "dataset"
    repository: str  # "user/repo"
    path: str  # of a file or folder in it; "" is all of it
    revision: str | None  # a branch, a tag or a commit; None is the main branch


def is_address(text: str | Path) -> bool:
    """Whether a text is meant as an address on the hub, not as a path."""
    return str(text).startswith(SCHEME)


def parse(text: str) -> Address:
    """The place that an address names; one of another form is refused."""
    match = _ADDRESS.fullmatch(text)
    if (
        match is None
        or match["repository"].startswith(_NOT_A_MODEL)
        or (match["early"] and match["late"])
    ):
        raise InputError(
            f"{text!r} is no address on the hub; write hf://USER/REPO[/FOLDER][@REVISION], or "
            f"hf://datasets/USER/REPO/FILE[@REVISION] for data"
        )
    kind = "dataset" if match["kind"] == "datasets/" else "model"
    revision = match["early"] or match["late"]
    return Address(kind, match["repository"], match["path"].removeprefix("/"), revision)


def local(path: str | Path, wanted: Sequence[str] = ()) -> Path:
    """A path as it is; or, of an address on the hub, what `fetch` brings."""
    return fetch(str(path), wanted) if is_address(path) else Path(path).expanduser()


def fetch(text: str, wanted: Sequence[str] = ()) -> Path:
    """The folder at an address, with the files in it that match a pattern in `wanted`.

    A "*" stays within a folder. Without patterns the address is that of one file. What is in the
    cache is not fetched again; a connection that breaks is taken up where it broke.
    """
    place = parse(text)
    if not wanted and not place.path:
        raise InputError(f"{text} is a repository; name a file in it")
    inside = f"{place.path}/" if place.path else ""
    allowed = [inside + pattern for pattern in wanted] or [place.path]
    depth = max((pattern.count("/") for pattern in wanted), default=0)
    target = _snapshot(text, place, allowed, inside + "*/" * (depth + 1) + "*") / place.path
    if wanted and not any(file for pattern in wanted for file in target.glob(pattern)):
        raise InputError(f"{text} holds none of {', '.join(wanted)}; check its folder and revision")
    if not wanted and not target.is_file():
        raise InputError(f"{text}: the repository has no such file; check its name and revision")
    return target


def _snapshot(text: str, place: Address, allowed: list[str], ignored: str) -> Path:
    """The repository's folder in the cache, once the files allowed are there."""
    from huggingface_hub import snapshot_download

    # It warns that nothing matched, which is an error of ours.
    logging.getLogger("huggingface_hub._snapshot_download").setLevel(logging.ERROR)
    try:
        folder = snapshot_download(
            place.repository,
            repo_type=place.kind,
            revision=place.revision,
            allow_patterns=allowed,
            ignore_patterns=ignored,
        )
    except Exception as error:  # a dozen unrelated types, from three libraries
        raise InputError(f"could not fetch {text}: {_reason(error, place)}") from None
    return Path(folder)


def _reason(error: Exception, place: Address) -> str:
    """Why something could not be fetched, and what to do about it."""
    from huggingface_hub import errors, is_offline_mode

    login = "log in with `hf auth login` or set HF_TOKEN"
    match error:
        case errors.GatedRepoError():
            return f"{place.repository} is gated; ask for access on its page, then {login}"
        case errors.RevisionNotFoundError():
            return f"{place.repository} has no revision {place.revision or 'main'!r}"
        case errors.RepositoryNotFoundError():
            return f"there is no {place.kind} {place.repository}, or it is private: {login}"
        case errors.LocalEntryNotFoundError() if is_offline_mode():
            return "it is not, or not whole, in the cache, and HF_HUB_OFFLINE forbids to fetch it"
        case errors.LocalEntryNotFoundError():
            told = f"it is not in the cache, and the hub did not give it ({_first_line(error)})"
            return f"{told}; without a network, give a folder"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    error = error.__cause__ or error
    return (str(error).strip() or type(error).__name__).splitlines()[0]
