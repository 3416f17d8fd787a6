"""What an evaluation is asked to do; these fields are the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from lora_jax.errors import refuse_all


@dataclass(frozen=True)
class Evaluation:
    """Measure modules: lora-eval arc_easy --adapters a=A lib=LIB --compare base a "mean(lib)".

    Tasks: boolq, piqa, hellaswag, swag, arc_easy, arc_challenge, openbookqa, winogrande,
    winogrande_partial, bbh, xnli_{en,de,fr}, m_arc_{de,fr}, m_hellaswag_{de,fr}, m_mmlu_{de,fr},
    wikitext (perplexity), and of classifiers glue_{cola,sst2,mrpc,qqp,mnli,qnli,rte}.
    """

    tasks: Annotated[Positional[tuple[str, ...]], arg(metavar="TASK ...")] = ()
    """Built-in tasks to measure."""
    base: str = "smollm2-135m"
    """The base model: a known name, a folder, a GGUF file or hf://USER/REPO."""
    accept: Literal["", "gemma"] = ""
    """The terms of a base model, once you have read them: gemma."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Hold the base's projections in few bits: QLoRA's NF4, or 8."""
    adapters: Annotated[tuple[str, ...], arg(metavar="NAME=FOLDER ...")] = ()
    """Adapters and libraries, each with a name: folders, or hf://USER/REPO[/FOLDER]."""
    compare: Annotated[tuple[str, ...], arg(metavar="[LABEL=]EXPRESSION ...")] = ()
    """The columns: expressions over the names and `base`, or recipes' files (.yaml). By default,
    base and every adapter."""
    sweep: Annotated[tuple[str, ...], arg(metavar="NAME=VALUES ...")] = ()
    """Numbers that columns leave open, as in "a - {x}*b": x=0,0.5,1 or x=0:1:11 (how many)."""
    out: Path = Path("results/eval")
    """The folder for results.json and accuracy.png."""
    overwrite: bool = False
    """Replace the output folder if it exists."""
    data_root: str | None = None
    """Where the tasks' files are, as TASK/FILE.jsonl; by default they come from the hub."""
    task_file: tuple[str, ...] = ()
    """Tasks of your own: JSON files, or hf://datasets/USER/REPO/FILE. They hold rows, prompt,
    choices (and answer, label, group, name), or kind "classification" and rows (and labels,
    prompt, second, label, group, name)."""
    text: tuple[str, ...] = ()
    """Texts of your own to measure perplexity on: files, or hf://datasets/USER/REPO/FILE."""
    generate: tuple[str, ...] = ()
    """Prompts that every column replies to."""
    score: Literal["answer_mean", "text_mean", "sum", "char"] = "answer_mean"
    """What ranks choices: the answer's nats a token, the text's, their sum, or a character's."""
    format: Literal["plain", "chat"] = "plain"
    """Prompts as plain text (MTTL's) or as a turn of the base's chat template (GenKnowSub's)."""
    space: Literal["delta", "factor"] = "delta"
    """Compose what modules do, exactly; or their tensors, as the papers do."""
    limit: int | None = None
    """Rows a task at most, drawn at random by the seed; for a text, windows from its start."""
    seed: int = 0
    """For the rows drawn, the bootstrap and sampling."""
    window: int = 1024
    """Tokens in a window of a text."""
    stride: int = 512
    """Tokens that each window scores."""
    max_new_tokens: int = 64
    """Tokens in a reply at most."""
    temperature: float = 0.0
    """Of a reply's tokens; 0 takes the likeliest."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample among so many of the likeliest tokens; 0 is all."""
    devices: Literal["mesh", "pmap", "one"] = "mesh"
    """How rows are spread over the devices."""
    batch_tokens: int | None = None
    """Tokens in a batch, all columns together; by default what suits the device."""


def checked(settings: Evaluation) -> Evaluation:
    """The settings, if their numbers make sense; one error names all that do not.

    Those of a reply are `Sampling`'s to check.
    """
    counts = {"limit": settings.limit, "batch-tokens": settings.batch_tokens}
    rules = [(n, v, v is None or v >= 1, "be at least 1") for n, v in counts.items()]
    window, stride = settings.window, settings.stride
    rules += [
        ("seed", settings.seed, 0 <= settings.seed < 2**32, "lie in [0, 2**32)"),
        ("window", window, window >= 2, "be at least 2"),
        ("stride", stride, 1 <= stride < max(window, 2), f"lie in [1, --window {window})"),
    ]
    problems = [f"--{n} must {rule}; got {value}" for n, value, good, rule in rules if not good]
    refuse_all(problems, "lora-eval")
    return settings
