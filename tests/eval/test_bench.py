"""What cannot be measured is refused, as early as it can be known."""

import json
from dataclasses import replace

import numpy as np
import pytest

from eval import bench as benches
from eval import compare
from eval.bench import Bench
from eval.columns import Column
from eval.config import Evaluation
from eval.tasks import Corpus, find
from lora_jax import bases
from lora_jax.errors import InputError
from lora_jax.tokens import load_tokenizer


@pytest.fixture(scope="module")
def bench_of(base_folder):
    """A function from settings to a bench of the base, and of other columns by name."""
    base = bases.load_base(str(base_folder))

    def make(adapters=None, **settings) -> Bench:
        columns = [Column(name, name, a) for name, a in ({"base": {}} | (adapters or {})).items()]
        return Bench(Evaluation(**settings), base, load_tokenizer(base_folder), columns)

    return make


@pytest.fixture
def root(tmp_path):
    (tmp_path / "arc_easy").mkdir()
    row = {"question": "q", "choices": ["a", "b"], "label": 0}
    (tmp_path / "arc_easy" / "test.jsonl").write_text(json.dumps(row))
    (tmp_path / "some.txt").write_text("A text of a few words.")
    return tmp_path


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_scores_are_refused(monkeypatch, bench_of, root, bad):
    bench = bench_of({"bad": {}}, data_root=root, window=64, stride=32)
    answered, read = [[np.ones(2)], [np.array([1.0, bad])]], [[1.0], [bad]]
    monkeypatch.setattr(compare, "measure", lambda *_: answered)
    with pytest.raises(InputError, match=r"bad: non-finite score on .*test.jsonl line 1; its"):
        benches.answers(bench, find("arc_easy"))
    monkeypatch.setattr(compare, "measure", lambda *_: read)
    with pytest.raises(InputError, match=r"bad: non-finite score on .*some.txt window 0; its"):
        benches.text_perplexity(bench, Corpus("some", "some.txt"))


def test_a_tokenizer_without_an_end_writes_to_the_most(bench_of):
    bench = bench_of(generate=("Hello",), max_new_tokens=3)
    bench.tokenizer.eos_token = None
    assert bench.tokenizer.eos_token_id is None
    assert benches.replies(bench).replies.keys() == {"base"}


def test_what_the_context_has_no_room_for_is_refused(bench_of):
    fits = bench_of(generate=("Hello",), max_new_tokens=123, stride=128)
    benches.refuse_beyond_context(fits, [find("arc_easy")])
    over = replace(fits, settings=replace(fits.settings, max_new_tokens=124))
    with pytest.raises(
        InputError, match=r"reads 128 tokens: prompt 'Hello' has 5 .*-tokens adds 124"
    ):
        benches.refuse_beyond_context(over, [])
    with pytest.raises(InputError, match="reads 128 tokens: --stride 128 must be smaller"):
        benches.refuse_beyond_context(fits, [find("wikitext")])
