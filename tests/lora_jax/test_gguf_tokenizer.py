"""SentencePiece's BPE out of GGUF metadata; byte-level BPE is in test_gguf.py, with its models."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import gguf_tokenizer, tokens
from lora_jax.errors import InputError
from lora_jax.files import read_json

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
DEFINED = ["\n", "\n\n", "  ", "   ", "<b>", "</b>", "<bb>"]
BYTES = [f"<0x{n:02X}>" for n in range(256)]
SENTENCES = {
    "en": [
        "The kettle had been on the stove for an hour before anyone remembered it.",
        "She doesn't think the 12:45 train will wait, does she?",
        "A well-known baker on Mill Lane sells bread at £3.50 — still warm!",
    ],
    "fr": [
        "Où est passé le garçon qui vendait des journaux près de l'église ?",
        "Nous n'avons pas encore décidé ; l'été s'achève, et la maison reste à vendre.",
        "« Ça coûte 1 250,75 € », répondit-elle en haussant les épaules.",
    ],
    "de": [
        "Über die Straße hinweg grüßte der Müller seinen ältesten Freund.",
        "Die Donaudampfschifffahrtsgesellschaft beförderte im Jahr 1880 über 3,5 Mio. Fahrgäste.",
        "„Weißt du“, sagte sie, „daß es schon wieder schneit?“",
    ],
}


def metadata(words, scores=None):
    """GGUF metadata of a tokenizer of so many words, the best first, after Gemma's special ones."""
    listed = [*SPECIAL, *DEFINED, *BYTES, *words]
    types = [3] * 4 + [4] * len(DEFINED) + [6] * 256 + [1] * len(words)
    scores = [-float(n) for n in range(len(words))] if scores is None else scores
    return {
        "general.architecture": "gemma3",
        "gemma3.context_length": 64,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": listed,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-1000.0] * (len(listed) - len(words)) + scores,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }


def reference(meta, text):
    """The ids of one text, SentencePiece's own way."""
    return sentencepiece(meta)(text)


def sentencepiece(meta):
    """A function that splits what is defined out of a text, then merges the best neighbours."""
    listed, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    number = {token: n for n, token in enumerate(listed)}
    scores = {
        token: score
        for token, score, type_ in zip(listed, meta["tokenizer.ggml.scores"], types, strict=True)
        if type_ == 1
    }
    whole = {token for token, type_ in zip(listed, types, strict=True) if type_ in (3, 4)}
    longest = max(map(len, whole))

    def cut(text):
        ids = []
        for piece in split(text, whole, longest):
            if piece in whole:
                ids.append(number[piece])
                continue
            for symbol in merged(list(piece.replace(" ", "▁")), scores):
                spelt = [symbol] if symbol in scores else [f"<0x{b:02X}>" for b in symbol.encode()]
                ids += [number[token] for token in spelt]
        return ids

    return cut


def split(text, whole, longest):
    """The text cut around the tokens that are taken whole: leftmost first, then longest."""
    pieces, rest, at = [], "", 0
    while at < len(text):
        found = [text[at : at + n] for n in range(longest, 0, -1) if text[at : at + n] in whole]
        if found:
            pieces, rest = [*pieces, rest, found[0]], ""
        else:
            rest += text[at]
        at += len(found[0]) if found else 1
    return [piece for piece in [*pieces, rest] if piece]


def merged(symbols, scores):
    """The symbols, after the two neighbours that make the best token are merged, and so on."""
    while True:
        pairs = [(scores.get(a + b), -n) for n, (a, b) in enumerate(pairwise(symbols))]
        pairs = [pair for pair in pairs if pair[0] is not None]
        if not pairs:
            return symbols
        at = -max(pairs)[1]
        symbols = [*symbols[:at], symbols[at] + symbols[at + 1], *symbols[at + 2 :]]


def write(meta, folder):
    gguf_tokenizer.write_tokenizer(meta, folder, folder / "m.gguf")
    return tokens.load_tokenizer(folder)


@pytest.fixture(scope="module")
def learned():
    """Metadata with pieces that a BPE learned from the sentences; their letters come last."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    lines = [line.replace(" ", "▁") for some in SENTENCES.values() for line in some]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(lines, BpeTrainer(vocab_size=300, show_progress=False))
    vocabulary = tokenizer.get_vocab()
    ordered = sorted(vocabulary, key=vocabulary.get)
    letters = [word for word in ordered if len(word) == 1]
    return metadata([word for word in ordered if len(word) > 1] + letters)


@pytest.fixture(scope="module")
def tokenizer(learned, tmp_path_factory):
    return write(learned, tmp_path_factory.mktemp("learned"))


MIXED = "abenrst ▁'ÄäßéÉœ1.,\n<>/b0x4漢😀\u0301\x07\r\t"


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([*MIXED, "</b>", "er", " de", " the ", "\n\n\n"])).map("".join))
def test_texts_are_cut_as_sentencepiece_does(learned, tokenizer, text):
    ids = tokens.encode(tokenizer, [text])[0]
    assert ids == reference(learned, text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.text("ab▁", min_size=2, max_size=6), min_size=1, max_size=24, unique=True),
    texts=st.lists(st.text("ab ", max_size=30), min_size=10, max_size=10),
)
def test_any_vocabulary_cuts_as_sentencepiece_does(tmp_path_factory, words, texts):
    """Pieces in any order: a piece may be better than its parts, or have no parts at all."""
    meta = metadata([*words, "a", "b", "▁"])
    built = write(meta, tmp_path_factory.mktemp("any"))
    assert tokens.encode(built, texts) == [reference(meta, text) for text in texts]


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_round_trip(learned, tokenizer, language):
    for sentence in SENTENCES[language]:
        ids = tokens.encode(tokenizer, [sentence])[0]
        assert ids == reference(learned, sentence)
        assert len(ids) < 0.8 * len(sentence)
        assert tokenizer.decode(ids) == sentence


def test_scores_decide_and_not_the_order_of_tokens(tmp_path):
    words, text = ["ab", "bc", "a", "b", "c"], "abc"
    one, other = ([0.0, -1.0, -2, -3, -4], [-1.0, 0.0, -2, -3, -4])
    pieces = []
    for name, scores in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        pieces.append(write(metadata(words, scores), tmp_path / name).tokenize(text))
    assert pieces == [["ab", "c"], ["a", "bc"]]


def test_what_no_token_has_is_spelt_in_bytes(tokenizer):
    assert tokenizer.tokenize("漢") == ["<0xE6>", "<0xBC>", "<0xA2>"]
    assert len(tokenizer.tokenize("<0xE6>")) > 1  # the text of a byte's token is no byte


def test_defined_tokens_come_first_and_stay_in_the_text(tokenizer):
    assert tokenizer.tokenize("<b>a</b>\n\n\n") == ["<b>", "a", "</b>", "\n\n", "\n"]
    assert tokenizer.tokenize("<bb>")[0] == "<bb>"
    ids = tokens.encode(tokenizer, ["<bos>a\n  b<eos>"])[0]
    assert (ids[0], ids[-1]) == (2, 1)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a\n  b"


def test_a_text_begins_with_its_token_if_the_metadata_says_so(learned, tokenizer, tmp_path):
    assert tokenizer("a")["input_ids"][0] == 2
    assert tokenizer("a", "b")["input_ids"].count(2) == 2
    assert tokens.encode(tokenizer, ["a"])[0] == tokenizer("a")["input_ids"][1:]
    bare = write(learned | {"tokenizer.ggml.add_bos_token": False}, tmp_path)
    assert bare("a")["input_ids"] == tokens.encode(bare, ["a"])[0]


def test_special_tokens_have_their_names(tokenizer):
    named = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
    assert {n: getattr(tokenizer, f"{n}_token_id") for n in named} == named
    assert tokenizer.model_max_length == 64


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer.ggml.add_space_prefix": True},
        {"tokenizer.ggml.model": "t5"},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"},
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(learned, tmp_path, change):
    with pytest.raises(InputError, match=r"m\.gguf: its tokenizer \(.*\) is not supported"):
        write(learned | change, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("bos_token_id", 10**6, r"bos_token_id is 1000000, and there are \d+ tokens"),
        ("eos_token_id", -1, "eos_token_id is -1, and there are"),
        ("unknown_token_id", 10**6, "unknown_token_id is 1000000"),
        ("token_type", [1], r"token_type has 1 entries for \d+ tokens"),
        ("scores", [], r"scores has 0 entries for \d+ tokens"),
        ("tokens", ["a"], "token_type has .* entries for 1 tokens; .*bos_token_id is 2, and"),
    ],
)
def test_metadata_that_does_not_hold_together_is_refused(learned, tmp_path, key, value, told):
    with pytest.raises(InputError, match=rf"m\.gguf: tokenizer\.ggml\..*{told}"):
        write(learned | {f"tokenizer.ggml.{key}": value}, tmp_path)


UNUSUAL = [
    *[f"{w}{w} {w}  {w}" for w in ("ha", "nein", "très", "==", "-*", "0", "aAa")],
    "https://example.org/a_b?c=1&d=%20",
    "x = [i ** 2 for i in range(10)]\n\n\tprint(x)\r\n",
]


@pytest.mark.slow
def test_the_real_tokenizer_cuts_as_sentencepiece_does_and_round_trips(gemma):
    tokenizer = tokens.load_tokenizer(gemma.folder)
    raw = read_json(gemma.folder / "tokenizer.json")
    cut = sentencepiece(real_metadata(raw))
    texts = [*UNUSUAL, *(line for some in SENTENCES.values() for line in some), *shuffled(3000)]
    for text, ids in zip(texts, tokens.encode(tokenizer, texts), strict=True):
        assert ids == cut(text)
        assert tokenizer.decode(ids) == text


def shuffled(count):
    """So many texts of the sentences' words, of unusual texts and of single characters."""
    draw = random.Random(0)
    words = [word for some in SENTENCES.values() for line in some for word in line.split()]
    for _ in range(count):
        pools = draw.choices(
            [words, UNUSUAL, MIXED.replace("▁", "")], [8, 1, 3], k=draw.randint(1, 12)
        )
        yield "".join(draw.choice(pool) + draw.choice(["", " ", " ", "  ", "\n"]) for pool in pools)


def real_metadata(raw):
    """What `reference` needs, out of a tokenizer.json: Gemma's pieces are listed best first."""
    vocabulary = raw["model"]["vocab"]
    listed = sorted(vocabulary, key=vocabulary.get)
    whole = {entry["content"] for entry in raw["added_tokens"]}
    types = [3 if t in whole else 6 if t in BYTES else 1 for t in listed]
    return {
        "tokenizer.ggml.tokens": listed,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-float(n) for n in range(len(listed))],
    }
