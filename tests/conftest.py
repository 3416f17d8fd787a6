"""What the tests share: a tiny random model, its folder on disk, and modules that change it."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gc
import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import bases, checkpoint, models, modules, table
from lora_jax.families import llama, roberta, t5
from lora_jax.files import cache_folder
from lora_jax.rope import Rope

# Compiling, not running, is what tiny programs cost: without its optimizer XLA takes a third, and
# half of that where it does not build its fused loops out of MLIR, which only jax 0.10 can do
# without; a flag that XLA does not know ends the process.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"

HARNESS_TEXT = "The quick brown fox jumps over the lazy dog."
ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
SPECIAL = ("<|im_start|>", "<|im_end|>")  # ids 256 and 257, after the 256 bytes
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_configure(config):
    os.environ.setdefault("XLA_FLAGS", QUICK if "not parity" in config.option.markexpr else "")


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Lets compiled programs go before they use up the memory maps that Linux gives a process.

    Beyond vm.max_map_count (65,530) a compilation ends in a segmentation fault.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def config() -> llama.Config:
    """A Llama of two layers; its vocabulary is the bytes, two special tokens and six spare."""
    return llama.Config(
        kind="llama",
        vocabulary=264,
        width=32,
        hidden=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=8,
        context=128,
        rope=Rope(8),
        tied=True,
    )


@pytest.fixture(scope="session")
def random_weights():
    """A function from a config and a seed to random weights."""
    init = cache(lambda config: jax.jit(partial(table.init, table=models.table(config))))
    return lambda config, seed=0: init(config)(jax.random.key(seed))


@pytest.fixture(scope="session")
def weights(config, random_weights):
    """The tiny model's weights."""
    return random_weights(config)


@pytest.fixture(scope="session")
def random_lora():
    """A function to a LoRA whose factors are both random, so that it changes every output."""

    def make(config, seed=0, *, targets=TARGETS, rank=3, alpha=6.0, size=0.3, rslora=False):
        key = jax.random.key(seed)
        adapter = modules.init_lora(
            key,
            models.projections(config),
            targets=targets,
            rank=rank,
            alpha=alpha,
            rslora=rslora,
        )
        return {
            path: m.replace(b=size * jax.random.normal(jax.random.fold_in(key, n), m.b.shape))
            for n, (path, m) in enumerate(adapter.items())
        }

    return make


@pytest.fixture(scope="session")
def random_ia3():
    """A function to an IA3 module that is not the identity."""

    def make(config, seed=0, *, layout="peft", size=0.3):
        adapter = modules.init_ia3(models.projections(config), models.ia3_layouts(config)[layout])
        key = jax.random.key(seed)
        return {
            path: m.replace(
                offset=size * jax.random.normal(jax.random.fold_in(key, n), m.offset.shape)
            )
            for n, (path, m) in enumerate(adapter.items())
        }

    return make


@partial(jax.jit, static_argnums=0)
def _hidden(config, weights, adapter, tokens, options):
    return models.forward(config, weights, adapter, tokens, **options).hidden


@pytest.fixture(scope="session")
def hidden():
    """A function to the jitted hidden states (B, T, D); options are segments and positions."""
    return lambda config, weights, adapter, tokens, **options: _hidden(
        config, weights, adapter, jnp.asarray(tokens), options
    )


@pytest.fixture(scope="session")
def outputs():
    """A function to what a model of any kind gives for tokens (B, T): logits of words or labels.

    An encoder-decoder's decoder reads the tokens that its encoder reads.
    """

    def run(config, weights, adapter, tokens):
        kind, memory = models.kind(config), None
        if kind == "encoder-decoder":
            memory = models.encode(config, weights, adapter, tokens)
        hidden = models.forward(config, weights, adapter, tokens, memory=memory).hidden
        head = models.classify if kind == "classifier" else models.unembed
        return head(config, weights, adapter, hidden)

    return run


@pytest.fixture(scope="session")
def random_tokens():
    """A function to random token ids of a shape."""
    return lambda *shape, seed=0: jax.random.randint(jax.random.key(seed), shape, 0, 256)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, config, weights) -> Path:
    """The tiny model as a Hugging Face folder, with a byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    folder.mkdir()
    checkpoint.write_model(folder, config, weights)
    _write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory, random_weights) -> Path:
    """A tiny T5 as a Hugging Face folder, its tokens the bytes; a text ends as T5's does."""
    config = t5.Config(
        vocabulary=264,
        width=32,
        hidden=48,
        encoder_layers=2,
        layers=3,
        heads=4,
        head_width=8,
        tied=False,
        scaled=False,
        activation="gelu_new",
        gated=True,
        decoder_start=263,
    )
    folder = tmp_path_factory.mktemp("t5") / "tiny"
    folder.mkdir()
    checkpoint.write_model(folder, config, random_weights(config))
    _write_tokenizer(folder, closed=True)
    return folder


def _write_tokenizer(folder: Path, *, closed: bool = False) -> None:
    """A byte-level tokenizer with a chat template; `closed` puts the end of text after each."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if closed:
        end = [(SPECIAL[1], 257)]
        tokenizer.post_processor = processors.TemplateProcessing(f"$A {SPECIAL[1]}", None, end)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[1],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


@pytest.fixture(scope="session")
def gemma():
    """Gemma-3-270M as we hold it; only where someone has accepted its terms and fetched it."""
    if not (cache_folder() / "models" / "gemma3-270m" / "config.json").exists():
        pytest.skip("not fetched; LORA_JAX_ACCEPT=gemma and a command with --base gemma3-270m do")
    return bases.load_base("gemma3-270m")


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory, random_weights) -> Path:
    """A tiny RoBERTa without a head as a Hugging Face folder, its tokens the bytes."""
    config = roberta.Config(
        vocabulary=264, width=32, hidden=56, layers=2, heads=4, context=40, labels=("LABEL_0",) * 2
    )
    folder = tmp_path_factory.mktemp("classifier") / "tiny"
    folder.mkdir()
    checkpoint.write_model(folder, config, random_weights(config))
    path = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if not n.startswith("classifier")}, path)
    described = json.loads((folder / "config.json").read_text())
    kept = {key: v for key, v in described.items() if key not in ("id2label", "label2id")}
    (folder / "config.json").write_text(json.dumps(kept))
    _write_pair_tokenizer(folder)
    return folder


def _write_pair_tokenizer(folder: Path) -> None:
    """RoBERTa's kind: <s> a </s>, and <s> a </s></s> b </s> of a pair."""
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors
    from tokenizers.models import BPE

    special = ("<s>", "<pad>", "</s>")
    alphabet = (*special, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), False, False)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


@pytest.fixture
def hub(monkeypatch):
    """A function that puts a folder on a hub of no network, and gives the patterns fetched."""

    def put(folder: Path) -> list[list[str]]:
        fetched = []

        def download(_, allow_patterns, **options):
            fetched.append(allow_patterns)
            return str(folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        return fetched

    return put


@pytest.fixture(scope="session")
def harness_tasks(tmp_path_factory):
    """A folder with a multiple-choice task, a generation task and a text, and their data."""
    import yaml

    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": "What is red?", "choices": ["a rose", "the sea"], "label": 0, "text": HARNESS_TEXT},
        {"q": "Which is green?", "choices": ["the sky", "grass"], "label": 1, "text": "Short."},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"test": str(folder / "rows.jsonl")}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    kinds = {
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "Q: {{q}}\nA:",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}],
        },
        "tiny_reply": {
            "output_type": "generate_until",
            "doc_to_text": "Q: {{q}}\nA:",
            "doc_to_target": "{{choices[label]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match"}],
        },
        "tiny_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **kind}))
    return folder


@pytest.fixture(scope="session")
def run_on_devices():
    """A function that runs Python code on forced CPU devices and gives back what it printed."""

    def run(code: str, devices: int = 8) -> str:
        forced = f"--xla_force_host_platform_device_count={devices}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {forced}",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
