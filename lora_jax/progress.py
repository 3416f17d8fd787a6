"""Progress on standard error, so that a command's own output can be piped."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def bar(name: str) -> Progress:
    """A progress bar for long work: its name, how far it is, the time gone and the time left.

    Every task carries `note`, a few words shown at the end of its line.
    """
    return Progress(
        TextColumn(name, style="bold", markup=False),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        console=Console(stderr=True),
    )


def say(text: str) -> None:
    """Writes a note of one line to standard error."""
    Console(stderr=True, highlight=False, markup=False).print(text, soft_wrap=True)
