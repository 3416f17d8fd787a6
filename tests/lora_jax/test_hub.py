"""Addresses on the hub, fetched from a stand-in server that speaks the hub's few routes."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from lora_jax import hub
from lora_jax.errors import InputError
from lora_jax.hub import Address, fetch, local, parse

ROUTE = re.compile(
    r"(?P<api>/api)?/(?P<kind>models/|datasets/)?(?P<repository>[\w.-]+/[\w.-]+)"
    r"/(?P<action>revision|tree|resolve)/(?P<revision>[^/]+)(?:/(?P<path>.+))?"
)


@dataclass
class Shelf:
    """What the stand-in has, how it misbehaves, and what it was asked for."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by "repository@revision"
    gated: set[str] = field(default_factory=set)  # repositories
    cut: dict[str, int] = field(default_factory=dict)  # bytes of a file before the line breaks
    broken: set[str] = field(default_factory=set)  # files that cannot be had
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    tokens: set[str] = field(default_factory=set)

    def downloads(self) -> list[str]:
        """The names of the files that were fetched, in order."""
        return sorted(path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET")


def commit(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The routes that huggingface_hub calls for a snapshot: revision, tree and resolve."""

    protocol_version = "HTTP/1.1"

    @property
    def shelf(self) -> Shelf:
        """What is stood in for now: connections outlive a test."""
        return self.server.shelf

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        self.shelf.tokens.add(self.headers.get("Authorization", ""))
        match = ROUTE.fullmatch(unquote(urlsplit(self.path).path))
        if match is None:
            return self.send(404, b"")
        repository = match["repository"]
        found = {n: f for n, f in self.shelf.files.items() if n.startswith(repository + "@")}
        if not found:
            return self.send(401, b"", {"X-Error-Code": "RepoNotFound"})
        names = (n for n in found if match["revision"] in (n.partition("@")[2], commit(n)))
        name = next(names, None)
        if name is None:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        match match["action"]:
            case "revision":
                return self.send(200, {"id": repository, "sha": commit(name), "siblings": []})
            case "tree":
                tree = [
                    {"type": "file", "path": path, "size": len(data), "oid": commit(path)}
                    for path, data in found[name].items()
                ]
                return self.send(200, tree)
        return self.send_file(repository, name, match["path"], found[name])

    def send_file(self, repository, name, path, files):
        if repository in self.shelf.gated:
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        if path in self.shelf.broken:
            return self.send(403, b"")
        span = self.headers.get("Range", "")
        self.shelf.asked.append((self.command, path, span))
        start = int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
        data = files[path]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit(name)}
        if span:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        stop = self.shelf.cut.pop(path, None) if self.command == "GET" else None
        return self.send(206 if span else 200, data[start:], headers, stop)

    def send(self, status, body, headers=None, stop=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:stop])
        self.close_connection = stop is not None


@pytest.fixture(scope="module")
def server():
    """A function from a shelf to the address of a server that has it."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=partial(running.serve_forever, poll_interval=0.01))
    thread.start()

    def stand_in(new: Shelf) -> str:
        running.shelf = new
        return f"http://127.0.0.1:{running.server_port}"

    yield stand_in
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def shelf(server, tmp_path, monkeypatch):
    """What the hub has in this test; its cache is empty."""
    new = Shelf(
        {
            "ann/tiny@main": {
                "config.json": b"{}",
                "model.safetensors": b"weights" * 1000,
                "modeling_tiny.py": b"boom()",
                "pytorch_model.bin": b"boom",
                "adapters/mood/adapter_config.json": b'{"r": 4}',
                "adapters/mood/adapter_model.safetensors": b"mood",
                "adapters/mood/checkpoint-5/adapter_model.safetensors": b"half a mood",
            },
            "ann/tiny@v1": {"config.json": b'{"old": 1}'},
            "bob/rows@main": {"more/train.jsonl": b'{"prompt": "a", "completion": "b"}\n'},
        }
    )
    point_at(monkeypatch, server(new), tmp_path / "cache")
    return new


def point_at(monkeypatch, address: str, cache: Path) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE do before huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hf://ann/tiny", Address("model", "ann/tiny", "", None)),
        ("hf://models/ann/tiny", Address("model", "ann/tiny", "", None)),
        ("hf://ann/tiny@v1.0", Address("model", "ann/tiny", "", "v1.0")),
        ("hf://ann/tiny/a/b.c", Address("model", "ann/tiny", "a/b.c", None)),
        ("hf://ann/tiny/a@feature/x", Address("model", "ann/tiny", "a", "feature/x")),
        ("hf://ann/tiny@v1/a/b", Address("model", "ann/tiny", "a/b", "v1")),
        ("hf://ann/tiny@refs/pr/3/a", Address("model", "ann/tiny", "a", "refs/pr/3")),
        ("hf://datasets/bob/rows/a b.jsonl", Address("dataset", "bob/rows", "a b.jsonl", None)),
    ],
)
def test_an_address_is_a_repository_a_path_and_a_revision(text, place):
    assert parse(text) == place


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "tiny",
        "/ann/tiny",
        "ann//tiny",
        "ann/tiny/",
        "ann/tiny//a",
        "ann/tiny/../a",
        "ann/tiny/./a",
        "ann/tiny/..",
        "ann/tiny/*.json",
        "ann/tiny/[a]",
        "ann/tiny@",
        "ann/tiny/a@",
        "ann/tiny@v1/a@v2",
        "ann/tiny a",
        "datasets/rows",
        "spaces/ann/tiny",
        "datasets/models/ann/tiny",
        "änn/tiny",
    ],
)
def test_other_forms_are_refused(rest):
    with pytest.raises(InputError, match=r"is no address on the hub; write hf://USER/REPO"):
        parse(f"hf://{rest}")


def test_paths_are_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local("some/folder") == Path("some/folder")
    assert local("~/folder", ("*.json",)) == tmp_path / "folder"


def test_only_what_is_wanted_comes_and_only_once(shelf):
    folder = fetch("hf://ann/tiny", ("*.json", "*.safetensors"))
    held = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert held == shelf.downloads() == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 1000
    assert fetch("hf://ann/tiny", ("*.json", "*.safetensors")) == folder
    assert len(shelf.downloads()) == 2


def test_a_subfolder_comes_without_the_folders_in_it(shelf):
    folder = fetch("hf://ann/tiny/adapters/mood", ("adapter_*",))
    assert (folder / "adapter_config.json").read_bytes() == b'{"r": 4}'
    assert shelf.downloads() == ["adapter_config.json", "adapter_model.safetensors"]
    assert (
        not (folder / "checkpoint-5").exists() and not (folder.parents[1] / "config.json").exists()
    )


def test_a_pattern_may_reach_into_folders(shelf):
    folder = fetch("hf://ann/tiny/adapters", ("*/adapter_config.json",))
    assert (folder / "mood" / "adapter_config.json").exists()
    assert shelf.downloads() == ["adapter_config.json"]


@pytest.mark.parametrize("revision", ["v1", commit("ann/tiny@v1")])
def test_a_revision_is_its_own_snapshot(shelf, revision):
    old, new = (fetch(f"hf://ann/tiny{at}", ("config.json",)) for at in (f"@{revision}", ""))
    assert (old / "config.json").read_bytes() == b'{"old": 1}' and old != new
    assert (new / "config.json").read_bytes() == b"{}"


def test_a_data_file_is_fetched_by_its_name(shelf):
    path = local("hf://datasets/bob/rows/more/train.jsonl")
    assert path.name == "train.jsonl" and path.read_bytes().startswith(b'{"prompt"')


@pytest.mark.parametrize(
    ("address", "wanted", "message"),
    [
        ("hf://ann/none", ("*.json",), "no model ann/none, or it is private: log in with `hf auth"),
        ("hf://datasets/bob/none/a", (), "there is no dataset bob/none"),
        ("hf://ann/tiny@v9", ("*.json",), "ann/tiny has no revision 'v9'"),
        ("hf://ann/tiny/nowhere", ("*.json",), r"hf://ann/tiny/nowhere holds none of \*\.json"),
        ("hf://ann/tiny@v1", ("*.safetensors",), r"@v1 holds none of \*\.safetensors; check its"),
        ("hf://datasets/bob/rows/no.jsonl", (), "no.jsonl: the repository has no such file"),
        ("hf://datasets/bob/rows", (), "is a repository; name a file in it"),
    ],
)
def test_what_is_not_there_is_one_error(shelf, address, wanted, message):
    with pytest.raises(InputError, match=message):
        fetch(address, wanted)


def test_a_gated_repository_says_how_to_get_in(shelf, monkeypatch):
    shelf.gated.add("ann/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    with pytest.raises(InputError, match="ann/tiny is gated; ask for access on its page, then log"):
        fetch("hf://ann/tiny", ("*.json",))
    assert "Bearer hf_mine" in shelf.tokens


def test_a_broken_connection_is_taken_up_where_it_broke(shelf, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept comes in chunks
    shelf.cut["model.safetensors"] = 2500
    folder = fetch("hf://ann/tiny", ("*.safetensors",))
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 1000
    asked = [span for method, path, span in shelf.asked if method == "GET"]
    assert asked == ["", "bytes=2000-"]


def test_what_came_whole_is_not_fetched_again(shelf):
    shelf.broken.add("model.safetensors")
    with pytest.raises(InputError, match="could not fetch hf://ann/tiny: "):
        fetch("hf://ann/tiny", ("*.json", "*.safetensors"))
    assert shelf.downloads() == ["config.json"]
    shelf.broken.clear()
    folder = fetch("hf://ann/tiny", ("*.json", "*.safetensors"))
    assert (folder / "model.safetensors").exists()
    assert shelf.downloads() == ["config.json", "model.safetensors"]


def test_offline_the_cache_answers_if_it_can(shelf, monkeypatch):
    folder = fetch("hf://ann/tiny", ("*.json",))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(shelf.asked)
    assert fetch("hf://ann/tiny", ("*.json",)) == folder
    for address, wanted in [
        ("hf://ann/tiny", ("*.safetensors",)),
        ("hf://ann/tiny@v1", ("*.json",)),
        ("hf://datasets/bob/rows/more/train.jsonl", ()),
    ]:
        with pytest.raises(InputError, match="not whole, in the cache, and HF_HUB_OFFLINE"):
            fetch(address, wanted)
    assert len(shelf.asked) == asked


def test_a_hub_out_of_reach_is_one_error_unless_the_cache_has_it(shelf, monkeypatch, tmp_path):
    folder = fetch("hf://ann/tiny", ("*.json",))
    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert fetch("hf://ann/tiny", ("*.json",)) == folder
    words = r"the hub did not give it \(.+\); without a network, give a folder$"
    with pytest.raises(InputError, match=words):
        fetch("hf://ann/other", ("*.json",))


def test_the_environment_says_where_the_hub_and_its_cache_are(server, tmp_path):
    address = server(Shelf({"ann/tiny@main": {"config.json": b"{}"}}))
    code = "from lora_jax.hub import fetch; print(fetch('hf://ann/tiny', ('*.json',)))"
    chosen = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    for offline in "01":
        environment = os.environ | chosen | {"HF_HUB_OFFLINE": offline}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).is_relative_to(tmp_path)
        assert (Path(done.stdout.strip()) / "config.json").read_text() == "{}"


def test_an_address_is_told_from_a_path():
    assert hub.is_address("hf://ann/tiny")
    assert not hub.is_address("ann/tiny") and not hub.is_address(Path("hf/tiny"))
