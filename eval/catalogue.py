"""The built-in tasks.

The plain forms are MTTL's, "Question: ...\\nAnswer:" and its kin. The chat forms are GenKnowSub's:
the bare content as the user's turn, the choice as the reply. File names are those of a data root;
the hub's split is the same one.
"""

from eval import hub
from eval.tasks import Classification, Corpus, Form, Hub, Measured, Task
from lora_jax import labelled

_QUESTION = Form("Question: {question}\nAnswer:")
_PLAIN = {
    "en": _QUESTION,
    "de": Form("Frage: {question}\nAntwort:"),
    "fr": Form("Question : {question}\nRéponse :"),
}
_CONTENT = Form("{question}", "{choice}")
_CONTINUE = Form("{question}")
_NLI = ("entailment", "neutral", "contradiction")
_PREMISE = Form("Premise: {premise}\nHypothesis: {hypothesis}\nRelationship:", choices=_NLI)
_WINOGRANDE = Hub("allenai/winogrande", ("winogrande_xl",), row=hub.winogrande)


def _xnli(language: str) -> Task:
    content = "[premise]{premise}[hypothesis]{hypothesis}[relationship]"
    return Task(
        name=f"xnli_{language}",
        file=f"xnli/{language}_dev.jsonl",
        plain=_PREMISE,
        chat=Form(content, "{choice}", _NLI),
        hub=Hub("facebook/xnli", (language,)),
        language=language,
    )


def _translated(name: str, language: str) -> Task:
    """One of alexandrainst's machine-translated benchmarks."""
    story = name == "m_hellaswag"
    split = {"m_arc": "test", "m_hellaswag": "validation", "m_mmlu": "val"}[name]
    return Task(
        name=f"{name}_{language}",
        file=f"{name}/{language}_{split}.jsonl",
        plain=_CONTINUE if story else _PLAIN[language],
        chat=_CONTENT,
        hub=Hub(
            f"alexandrainst/{name}",
            (language,),
            "test" if name == "m_arc" else "val",
            hub.hellaswag if story else hub.options,
        ),
        group="subject" if name == "m_mmlu" else None,
        language=language,
    )


def _arc(name: str, config: str) -> Task:
    source = Hub("allenai/ai2_arc", (config,), "test", hub.lettered)
    return Task(name, f"{name}/test.jsonl", _QUESTION, _CONTENT, source)


def _winogrande(name: str, plain: Form) -> Task:
    return Task(name, "winogrande/validation.jsonl", plain, _CONTENT, _WINOGRANDE)


def _glue(
    name: str, labels: tuple[str, ...], text: str, second: str = "", split: str = "validation"
) -> Classification:
    source = Hub("nyu-mll/glue", (name,), split)
    file = f"glue/{name}/{split}.jsonl"
    return Classification(f"glue_{name}", file, labels, labelled.Form(text, second), source)


_ENTAILMENT = ("entailment", "not_entailment")
_ALL = [
    Task(
        name="boolq",
        file="boolq/validation.jsonl",
        plain=Form("{passage}\nQuestion: {question}?\nAnswer:"),
        chat=Form("[passage]{passage}[question]{question}", "{choice}", ("false", "true")),
        hub=Hub("google/boolq", row=hub.boolq),
    ),
    Task(
        name="piqa",
        file="piqa/validation.jsonl",
        plain=_QUESTION,
        chat=_CONTENT,
        hub=Hub("baber/piqa", row=hub.piqa),
    ),
    Task(
        name="hellaswag",
        file="hellaswag/validation_2000.jsonl",
        plain=_CONTINUE,
        chat=_CONTENT,
        hub=Hub("Rowan/hellaswag", row=hub.hellaswag),
    ),
    Task(
        name="swag",
        file="swag/validation.jsonl",
        plain=_CONTINUE,
        chat=_CONTENT,
        hub=Hub("allenai/swag", ("regular",), row=hub.swag),
    ),
    _arc("arc_easy", "ARC-Easy"),
    _arc("arc_challenge", "ARC-Challenge"),
    Task(
        name="openbookqa",
        file="openbookqa/test.jsonl",
        plain=_QUESTION,
        chat=_CONTENT,
        hub=Hub("allenai/openbookqa", ("main",), "test", hub.lettered),
    ),
    _winogrande("winogrande", Form("", "{before}{choice}{after}")),
    _winogrande("winogrande_partial", Form("{before}{choice}", "{after}")),
    Task(
        name="bbh",
        file="bbh/test.jsonl",
        plain=Form("Question: {input}\nAnswer:"),
        chat=Form("{input}", "{choice}"),
        hub=Hub("SaylorTwift/bbh", hub.BBH, "test", hub.bbh),
        group="task",
        open_ended=True,
    ),
    *(_xnli(language) for language in ("en", "de", "fr")),
    *(
        _translated(name, language)
        for name in ("m_arc", "m_hellaswag", "m_mmlu")
        for language in ("de", "fr")
    ),
    _glue("cola", ("unacceptable", "acceptable"), "{sentence}"),
    _glue("sst2", ("negative", "positive"), "{sentence}"),
    _glue("mrpc", ("not_equivalent", "equivalent"), "{sentence1}", "{sentence2}"),
    _glue("qqp", ("not_duplicate", "duplicate"), "{question1}", "{question2}"),
    _glue("mnli", _NLI, "{premise}", "{hypothesis}", "validation_matched"),
    _glue("qnli", _ENTAILMENT, "{question}", "{sentence}"),
    _glue("rte", _ENTAILMENT, "{sentence1}", "{sentence2}"),
    Corpus(
        name="wikitext",
        file="wikitext2/test.txt",
        hub=Hub("Salesforce/wikitext", ("wikitext-2-raw-v1",), "test"),
    ),
]

TASKS: dict[str, Measured] = {task.name: task for task in _ALL}
