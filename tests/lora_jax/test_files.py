import hashlib
import os
import subprocess
import sys
import tempfile

import pytest

from lora_jax import files
from lora_jax.errors import InputError


def test_a_folder_appears_when_its_block_ends_and_not_before(tmp_path):
    target = tmp_path / "deep" / "out"
    with files.new_folder(target) as scratch:
        (scratch / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_block_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "out") as scratch:
        (scratch / "file").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_block_that_fails_keeps_what_it_would_have_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "config.json"]


@pytest.mark.parametrize("interruption", [OSError("a full disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("moves", [0, 1])
def test_what_was_to_be_replaced_comes_back(tmp_path, monkeypatch, interruption, moves):
    """The old folder is moved aside and the new one into its place; either may be cut off."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    done, move = [], os.replace

    def cut_off(*paths):
        if len(done) == moves:
            done.append(paths)
            raise interruption
        done.append(paths)
        move(*paths)

    monkeypatch.setattr(files.os, "replace", cut_off)
    with pytest.raises(type(interruption)), files.new_folder(tmp_path / "out", True) as scratch:
        (scratch / "config.json").write_text("new")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_but_the_folder_itself_is_replaced(tmp_path, monkeypatch, overwrite):
    """Not even what has the name under which an old folder might have been kept."""
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: iter("abcdef"))
    (tmp_path / ".out.a.old").mkdir()
    (tmp_path / ".out.old").mkdir()
    if overwrite:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("old")
    with files.new_folder(tmp_path / "out", overwrite):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".out.a.old", ".out.old", "out"}


def test_texts_are_written_as_they_are_and_all_else_as_json(tmp_path):
    files.write_beside(tmp_path, {"a.svg": "<svg/>", "b.json": {"x": ["ü"]}})
    assert (tmp_path / "a.svg").read_text() == "<svg/>"
    assert files.read_json(tmp_path / "b.json") == {"x": ["ü"]}


def test_a_full_folder_is_refused_or_replaced_whole(tmp_path):
    (tmp_path / "results.json").write_text("old")
    with pytest.raises(InputError, match="exists; choose another --out or pass --overwrite"):
        files.refuse_existing(tmp_path, overwrite=False)
    with files.new_folder(tmp_path, overwrite=True) as scratch:
        (scratch / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_that_is_none_of_our_results_is_never_overwritten(tmp_path):
    (tmp_path / "photos").write_text("mine")
    with pytest.raises(InputError, match="it is not ours to overwrite"):
        files.refuse_existing(tmp_path, overwrite=True)
    with pytest.raises(InputError), files.new_folder(tmp_path, overwrite=True):
        pass
    assert (tmp_path / "photos").read_text() == "mine"


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from lora_jax import files
from lora_jax.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    files.save_tensors(Path(sys.argv[1]), {"x": np.ones(100_000)})
except InputError as error:
    print(error)
"""


def test_a_full_disk_is_one_error_that_names_the_file(tmp_path):
    path = tmp_path / "adapter.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert done.stdout.startswith(f"could not write {path}: "), done.stderr


def test_an_empty_folder_is_free_to_take(tmp_path):
    with files.new_folder(tmp_path) as scratch:
        (scratch / "new").write_text("new")
    assert (tmp_path / "new").exists()


def test_a_file_in_the_way_is_refused_even_with_overwrite(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file"), files.new_folder(tmp_path / "out", True):
        pass
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("out", [".", "..", "../.."])
def test_the_working_directory_is_never_overwritten(tmp_path, monkeypatch, out):
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    (here / "mine").write_text("mine")
    monkeypatch.chdir(here)
    with pytest.raises(InputError, match="working directory"):
        files.refuse_existing(files.Path(out), overwrite=True)


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "text"
    files.write_text(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["text"]


def test_json_round_trips_and_has_no_place_for_nan(tmp_path):
    path = tmp_path / "value.json"
    files.write_json(path, {"a": [1, 2.5, None], "é": "ü"})
    assert files.read_json(path) == {"a": [1, 2.5, None], "é": "ü"}
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    assert files.read_json(path)["é"] == "ü"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "does not exist"),
        (b'{"a": 1,', "is not valid JSON: .*line 1 column"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON: maximum recursion depth"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON: .*digits"),
        (b"[1]", "must hold a JSON object; it holds a list"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, complaint):
    path = tmp_path / "value.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=complaint) as caught:
        files.read_json(path)
    assert str(path) in str(caught.value)


def test_a_folders_digest_tells_content_and_place_and_nothing_else(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1")
    one = files.folder_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert files.folder_digest(tmp_path) == one
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert files.folder_digest(tmp_path) != one
    (tmp_path / "b.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 99}')
    assert files.folder_digest(tmp_path) != one
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "member").mkdir()
    (tmp_path / "member" / "b.safetensors").write_bytes(b"no part of it")
    assert files.folder_digest(tmp_path) == one
    (tmp_path / "a.safetensors").rename(tmp_path / "member" / "a.safetensors")
    assert files.folder_digest(tmp_path) != one
    (tmp_path / "member" / "a.safetensors").rename(tmp_path / "a.safetensors")
    assert files.folder_digest(tmp_path) == one
    (tmp_path / "a.safetensors").write_bytes(b"2")
    assert files.folder_digest(tmp_path) != one
    one = files.folder_digest(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"3")
    assert files.folder_digest(tmp_path) != one
    assert files.sha256(tmp_path / "a.safetensors") == hashlib.sha256(b"2").hexdigest()


def test_a_librarys_digest_tells_its_modules_apart(tmp_path):
    (tmp_path / "library.json").write_text("{}")
    (tmp_path / "member").mkdir()
    (tmp_path / "member" / "a.safetensors").write_bytes(b"1")
    one = files.folder_digest(tmp_path)
    (tmp_path / "member" / "a.safetensors").write_bytes(b"2")
    two = files.folder_digest(tmp_path)
    (tmp_path / "member").rename(tmp_path / "renamed")
    assert len({one, two, files.folder_digest(tmp_path)}) == 3


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
    assert files.cache_folder() == tmp_path
    monkeypatch.delenv("LORA_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "lora_jax"
