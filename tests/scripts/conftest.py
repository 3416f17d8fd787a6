"""What the tests of whole commands share."""

import json
import sys

import pytest

from lora_jax import runtime


@pytest.fixture(scope="session")
def call():
    """A function that runs a command's `main` with arguments; its compilations are not kept."""

    def run(command, *arguments) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime, "prepare", lambda: None)
            patch.setattr("compose.command.prepare", lambda: None)
            patch.setattr(sys, "argv", ["lora", *map(str, arguments)])
            command.main()

    return run


@pytest.fixture(scope="session")
def rows_file():
    """A function that writes rows as JSONL and gives back the file."""

    def write(path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
