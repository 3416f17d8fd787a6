"""Tokenizers out of GGUF metadata: byte-level BPE (GPT-2's kind), SentencePiece's BPE (Gemma's)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.errors import InputError, refuse_all
from lora_jax.files import write_json

Meta = Mapping[str, Any]
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # llama.cpp's token types


def write_tokenizer(meta: Meta, folder: Path, source: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Control tokens, and those that the model's makers defined, are split out of a text before it is
    cut: the leftmost first, and there the longest.
    """
    from tokenizers import AddedToken

    refuse_all(_problems(meta), str(source))
    tokenizer = _cutter(meta, source)
    for special, type_ in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = _of_type(meta, type_)
        tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t in added])
    if meta.get("tokenizer.ggml.add_bos_token", meta["tokenizer.ggml.model"] == "llama"):
        tokenizer.post_processor = _opening(meta)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _described(meta))


def _problems(meta: Meta) -> list[str]:
    """Lists that are not as long as the tokens', and numbers that no token has."""
    count, stem = len(meta["tokenizer.ggml.tokens"]), "tokenizer.ggml."
    lists = {name: meta[stem + name] for name in ("token_type", "scores") if stem + name in meta}
    numbers = {n: v for n, v in meta.items() if n.startswith(stem) and n.endswith("_token_id")}
    return [
        f"{stem}{name} has {len(values)} entries for {count} tokens"
        for name, values in lists.items()
        if len(values) != count
    ] + [
        f"{name} is {number}, and there are {count} tokens"
        for name, number in numbers.items()
        if not 0 <= number < count
    ]


def _cutter(meta: Meta, source: Path) -> Any:
    """A tokenizer that cuts a text as the metadata says, or one clear error if it cannot."""
    kind, pre = meta["tokenizer.ggml.model"], meta.get("tokenizer.ggml.pre")
    if kind == "gpt2" and pre in _PRE_TOKENIZERS:
        return _byte_level(meta, source)
    if kind == "llama" and meta.get("tokenizer.ggml.add_space_prefix") is False:
        return _sentencepiece(meta, source)
    raise InputError(
        f"{source}: its tokenizer ({kind!r}, {pre!r}) is not supported (gpt2 with pre one of "
        f"{', '.join(_PRE_TOKENIZERS)} and llama without a space prefix are)"
    )


def _of_type(meta: Meta, wanted: int) -> list[str]:
    """The tokens of one type, in their order."""
    types = meta["tokenizer.ggml.token_type"]
    pairs = zip(meta["tokenizer.ggml.tokens"], types, strict=True)
    return [token for token, type_ in pairs if type_ == wanted]


def _bpe(meta: Meta, merges: list[tuple[str, str]], source: Path, **options: Any) -> Any:
    """A tokenizer of the metadata's tokens and of merges."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    vocabulary = {token: n for n, token in enumerate(meta["tokenizer.ggml.tokens"])}
    try:
        return Tokenizer(BPE(vocabulary, merges, **options))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{source}: its tokenizer does not hold together ({error})") from None


def _byte_level(meta: Meta, source: Path) -> Any:
    """GPT-2's kind: the metadata has its merges."""
    from tokenizers import Regex, decoders, pre_tokenizers

    cut = (merge.partition(" ") for merge in meta["tokenizer.ggml.merges"])
    tokenizer = _bpe(meta, [(left, right) for left, _, right in cut], source)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    parts = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), bytes_],
        "gpt-2": [bytes_],
        "llama-bpe": [split, bare],
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts[meta["tokenizer.ggml.pre"]])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


_PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _sentencepiece(meta: Meta, source: Path) -> Any:
    """SentencePiece's BPE: a space is a "▁", and what no token has is spelt in bytes."""
    from tokenizers import decoders, normalizers

    unknown = meta["tokenizer.ggml.tokens"][meta["tokenizer.ggml.unknown_token_id"]]
    tokenizer = _bpe(meta, _merges(meta), source, unk_token=unknown, byte_fallback=True)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _merges(meta: Meta) -> list[tuple[str, str]]:
    """The merges that tokens with scores amount to, first to last.

    SentencePiece merges the two neighbours whose token together has the highest score, whichever
    two they are: every way to cut a token into two tokens is a merge, in the order of the scores.
    """
    columns = (meta[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    scores = {t: score for t, score, kind in zip(*columns, strict=True) if kind == _NORMAL}
    ordered = sorted(scores, key=scores.__getitem__, reverse=True)
    cuts = ((token[:n], token[n:]) for token in ordered for n in range(1, len(token)))
    return [(left, right) for left, right in cuts if left in scores and right in scores]


def _opening(meta: Meta) -> Any:
    """What puts the beginning-of-text token before every text."""
    from tokenizers import processors

    number = meta["tokenizer.ggml.bos_token_id"]
    token = meta["tokenizer.ggml.tokens"][number]
    return processors.TemplateProcessing(
        single=[token, "$A"],
        pair=[token, "$A", f"{token}:1", "$B:1"],
        special_tokens=[(token, number)],
    )


def _described(meta: Meta) -> dict[str, Any]:
    """The tokenizer_config.json: the special tokens' names and the chat template."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    numbers = {short: meta.get(f"tokenizer.ggml.{n}_token_id") for n, short in names.items()}
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        **{f"{short}_token": tokens[n] for short, n in numbers.items() if n is not None},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta[f"{meta['general.architecture']}.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta.get("tokenizer.chat_template"),
    }
