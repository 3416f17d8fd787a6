import os
import subprocess
import sys

import pytest

from lora_jax import tokens
from lora_jax.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(base_folder):
    return tokens.load_tokenizer(base_folder)


@pytest.mark.parametrize("text", ["plain", "  spaces  ", "naïve — ü\n\tend", "", "<|im_end|>"])
def test_texts_round_trip(tokenizer, text):
    assert tokenizer.decode(tokens.encode(tokenizer, [text])[0]) == text


def test_no_special_token_is_added(tokenizer):
    assert [len(ids) for ids in tokens.encode(tokenizer, ["abc", "", "é"])] == [3, 0, 2]
    assert tokens.encode(tokenizer, []) == []


def test_messages_follow_the_models_template(tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert tokens.chat(tokenizer, messages) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    )
    opened = tokens.chat(tokenizer, messages[:1], open_reply=True)
    assert opened == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_tokenizer_without_a_template_is_told(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="no chat template; use plain text"):
        tokens.chat(tokenizer, [{"role": "user", "content": "hi"}])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no tokenizer \(tokenizer.json\)"):
        tokens.load_tokenizer(tmp_path)


def test_a_tokenizer_that_does_not_parse_is_refused(tmp_path, base_folder):
    for path in base_folder.glob("tokenizer*"):
        (tmp_path / path.name).write_text(path.read_text())
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        tokens.load_tokenizer(tmp_path)


def test_nothing_of_the_folder_is_run(tmp_path, base_folder):
    for path in [*base_folder.glob("tokenizer*"), base_folder / "config.json"]:
        (tmp_path / path.name).write_text(path.read_text())
    described = tmp_path / "tokenizer_config.json"
    remote = '{"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, '
    described.write_text(remote + described.read_text()[1:])
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    tokens.load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_transformers_does_not_speak_of_torch(base_folder, pytestconfig):
    code = "import sys, pathlib; from lora_jax.tokens import load_tokenizer\n"
    code += f"load_tokenizer(pathlib.Path({str(base_folder)!r}))"
    quiet = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    how = {"env": quiet, "cwd": pytestconfig.rootpath, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], check=True, **how)
    assert not done.stdout and "PyTorch" not in done.stderr
