"""Tokenizers and chat templates, as transformers reads them; nothing from the folder is run."""

import os
from pathlib import Path
from typing import Any

from lora_jax.errors import InputError

Tokenizer = Any  # transformers.PreTrainedTokenizerFast; its import takes over a second


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a Hugging Face folder."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that torch is absent
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").exists() and not any(folder.glob("tokenizer*")):
        raise InputError(f"{folder} holds no tokenizer (tokenizer.json)")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"cannot read the tokenizer in {folder}: {error}") from None
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: its tokenizer has no fast form (tokenizer.json)")
    return tokenizer


def opening_tokens(tokenizer: Tokenizer) -> list[int]:
    """The beginning-of-text token, if the tokenizer puts one before a text."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens added."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, str]],
    *,
    open_reply: bool = False,
    go_on: bool = False,
) -> str:
    """Messages as the model's chat template writes them.

    `open_reply` starts the next reply; `go_on` leaves the last message open, to be gone on with.
    """
    if not tokenizer.chat_template:
        raise InputError("this base model's tokenizer has no chat template; use plain text")
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=open_reply, continue_final_message=go_on
    )
