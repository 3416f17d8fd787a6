"""lm-evaluation-harness on a base model under a module: its model "lora_jax".

python -m eval.harness --model_args base=smollm2-135m adapter=mood=FOLDER --tasks arc_easy
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_jax.errors import InputError

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as missing:
    needed = f"eval.harness needs {missing.name}; pip install '.[harness]' in the checkout"
    if __name__ == "__main__":
        print(f"error: {needed}", file=sys.stderr)
        sys.exit(2)
    raise InputError(needed) from None

import numpy as np
from jinja2 import TemplateError

from compose.inputs import named_folders
from eval import batches, compare
from eval.bench import Bench
from eval.devices import Run, spread
from eval.generation import Sampling, generate
from eval.harness_arguments import arguments, open_bench
from eval.harness_requests import Request, item, sampling, together
from eval.scoring import likelihood
from lora_jax import runtime
from lora_jax.files import read_json
from lora_jax.provenance import environment, hashed
from lora_jax.tokens import chat


@register_model("lora_jax")
class LoraJax(TemplateLM):
    """A base model under one module, as the harness asks for it; its arguments are `Arguments`'."""

    def __init__(self, bench: Bench | None = None, **given: Any) -> None:
        super().__init__()
        self.arguments = arguments(given)
        self.bench = bench or open_bench(self.arguments)
        self.tokenizer = self.bench.tokenizer
        self.max_length = self.arguments.max_length or self.bench.base.config.context

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @cached_property
    def prefix_token_id(self) -> int:
        """The token that a text without context follows."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise InputError("the tokenizer has neither a first nor a last token to begin a text with")

    @cached_property
    def ends(self) -> set[int]:
        """The tokens that end a reply, as the tokenizer and generation_config.json say."""
        path = self.bench.base.folder / "generation_config.json"
        said = read_json(path).get("eos_token_id") if path.exists() else None
        ends = [*(said if isinstance(said, list) else [said]), self.eot_token_id]
        return {token for token in ends if token is not None}

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests knows the tokenizer by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a text, with the special ones unless it begins with them already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)[
            "input_ids"
        ]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages in the base's chat template, which opens a reply or goes on with the last.

        A template that knows no system turn is given none.
        """
        how = {"open_reply": add_generation_prompt, "go_on": not add_generation_prompt}
        try:
            return chat(self.tokenizer, chat_history, **how)
        except TemplateError:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            return chat(self.tokenizer, turns, **how)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of every continuation, and whether greedy decoding would write it."""
        groups = together(requests, self.max_length)
        asked = [item([requests[n] for n in group], self.max_length) for group in groups]
        planned = batches.plan(asked, **self.bench.budget) if asked else []
        (measured,) = compare.measure(self._run, self.bench.stacks, planned, "likelihood") or [[]]
        found = np.zeros((len(requests), 2))
        for group, values in zip(groups, measured, strict=True):
            found[group] = values[: len(group)]
        if not np.isfinite(found).all():
            raise InputError("a log-likelihood is not finite; the weights hold NaN or overflow")
        return [(-float(nats), bool(missed == 0)) for nats, missed in found]

    @cached_property
    def _run(self) -> Run:
        """The likelihood of a batch, compiled."""
        bench = self.bench
        return spread(likelihood, bench.base.config, bench.placed, bench.settings.devices)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False):
        """The log-likelihood of each whole text, in windows as long as the model reads."""
        parts: list[Request] = []
        owners: list[int] = []
        for n, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            parts += [(None, *utils.make_disjoint_window(window)) for window in windows]
            owners += [n] * (len(parts) - len(owners))
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, [value for value, _ in self._loglikelihood_tokens(parts)])
        return sums.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to a stop string or the most tokens."""
        given = [
            normalize_gen_kwargs(request.args[1], self.arguments.max_gen_toks)
            for request in requests
        ]
        how = [sampling(kwargs, self.arguments.seed) for kwargs in given]
        replies: dict[int, str] = {}
        for same in dict.fromkeys(how):
            members = [n for n, one in enumerate(how) if one == same]
            replies |= self._write(members, requests, [g["until"] for g in given], same)
        return [replies[n] for n in range(len(requests))]

    def _write(
        self, members: list[int], requests: Sequence[Any], until: list[list[str]], how: Sampling
    ) -> dict[int, str]:
        """The replies to the requests of one kind, by their indices."""
        room = self.max_length - how.max_new_tokens
        if room < 1:
            raise InputError(
                f"max_gen_toks={how.max_new_tokens} leaves no room for a prompt; the model reads "
                f"{self.max_length} tokens"
            )
        prompts = [self.tok_encode(requests[n].args[0]) or [self.prefix_token_id] for n in members]
        written = generate(
            self.bench.base.config,
            self.bench.base.weights,
            self.bench.columns[0].adapter,
            [prompt[-room:] for prompt in prompts],
            stop=-1 if self.eot_token_id is None else self.eot_token_id,
            sampling=how,
            tokens=self.bench.budget["tokens"],
            ended=lambda place, reply: self._cut(reply, until[members[place]])[1],
        )
        replies = {n: self._cut(w, until[n])[0] for n, w in zip(members, written, strict=True)}
        for n, reply in replies.items():
            self.cache_hook.add_partial("generate_until", requests[n].args, reply)
        return replies

    def _cut(self, reply: list[int], until: Sequence[str]) -> tuple[str, bool]:
        """The text of a reply before the first stop, and whether there was one."""
        special = set(self.tokenizer.all_special_tokens)
        stops = self.ends | {
            self.tokenizer.convert_tokens_to_ids(text) for text in until if text in special
        }
        end = next((place for place, token in enumerate(reply) if token in stops), None)
        text = self.tokenizer.decode(reply[:end], skip_special_tokens=True)
        found = [text.find(stop) for stop in until if stop and stop in text]
        return text[: min(found, default=None)], end is not None or bool(found)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results: the base, the adapters and the versions."""
        settings = self.bench.settings
        folders = named_folders(settings.adapters)
        return environment() | {
            "base": {"name": settings.base, "sha256": self.bench.base.digest},
            "adapters": hashed({name: Path(folder) for name, folder in folders.items()}),
            "expression": self.bench.columns[0].recipe,
            "arguments": asdict(self.arguments),
        }


def command(given: Sequence[str]) -> list[str]:
    """The harness's own arguments, with "lora_jax" for --model unless they name one."""
    if not given or given[0] in ("ls", "validate", "-h", "--help"):
        return list(given)
    rest = list(given[1:] if given[0] == "run" else given)
    named = {word.partition("=")[0] for word in rest} & {"--model", "-M", "--config", "-C"}
    return ["run", *([] if named else ["--model", "lora_jax"]), *rest]


def main() -> None:
    """The harness's command line; what cannot be used is told in one line, with status 2."""
    from lm_eval.__main__ import cli_evaluate

    runtime.prepare()
    sys.argv[1:] = command(sys.argv[1:])
    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
