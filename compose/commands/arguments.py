"""The command lines of `lora-compose explain`, `similar`, `cluster` and `diagnose`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg

Inputs = Annotated[tyro.conf.Positional[tuple[str, ...]], arg(metavar="NAME=FOLDER ...")]
Expression = Annotated[tyro.conf.Positional[str], arg(metavar="EXPRESSION")]


@dataclass(frozen=True)
class Explain:
    """Which methods suit these adapters, and why, from what is measured of them."""

    inputs: Inputs
    """Adapters or libraries, or hf://USER/REPO; a library counts as its members."""

    base: str | None = None
    """The base model, for its shapes; by default the one that the inputs name."""

    json: Path | None = None
    """A file for all that was measured."""

    overwrite: bool = False
    """Replace that file if it exists."""


@dataclass(frozen=True)
class Similar:
    """How alike adapters are, and which are nearest to which."""

    inputs: Inputs
    """Adapters or libraries, or hf://USER/REPO; a library counts as its members."""

    to: str | None = None
    """Only what is nearest to this one of them."""

    measure: Literal["cosine", "input", "output"] = "cosine"
    """The cosine of what modules add, or how far the directions that they read or write overlap."""

    base: str | None = None
    """The base model, for its shapes; by default the one that the inputs name."""

    out: Path | None = None
    """A folder for similarity.json and similarity.png."""

    overwrite: bool = False
    """Replace the output folder if it exists."""


@dataclass(frozen=True)
class Cluster:
    """Group a library's modules, and write one average for each group.

    The output is a library; beside it are clusters.json, similarity.png and, where training.json
    tells what the modules were trained on, retrain.sh: a lora-train for every group.
    """

    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], arg(metavar="FOLDER ...")]
    """A library, or adapters, each as FOLDER or NAME=FOLDER."""

    k: int
    """The number of groups."""

    out: Path
    """The folder to write."""

    method: Literal["mttl", "delta"] = "mttl"
    """By a's and b's, as MTTL does, or by what modules add."""

    seed: int = 42
    """Decides where the search for groups starts."""

    rank: int | None = None
    """Recompress each average to this rank."""

    base: str | None = None
    """The base model, for its shapes; by default the one that the inputs name."""

    overwrite: bool = False
    """Replace the output folder if it exists."""


@dataclass(frozen=True)
class Diagnose:
    """What a composition does to its modules: sizes, cosines, cross terms, first draws, ranks.

    Of an expression, or of all that a recipe's outputs hold.
    """

    expression: Expression
    """What is composed, as lora-compose takes it; or a recipe's file, ending in .yaml or .yml."""

    inputs: Inputs
    """For every name in the expression: an adapter's folder or a library's, or hf://USER/REPO.
    With a recipe: other folders for its inputs."""

    space: Literal["delta", "factor"] = "delta"
    """Add what the modules do, exactly; or add their tensors one by one, as the papers do."""

    text: Path | None = None
    """Plain text that a routed result reads, for how evenly each layer routes it."""

    base: str | None = None
    """The base model; by default the one that the inputs name."""

    out: Path | None = None
    """A folder for diagnosis.json and diagnosis.png; a recipe's outputs are left as they are."""

    overwrite: bool = False
    """Replace the output folder if it exists."""


ARGUMENTS: dict[str, type] = {
    "explain": Explain,
    "similar": Similar,
    "cluster": Cluster,
    "diagnose": Diagnose,
}
