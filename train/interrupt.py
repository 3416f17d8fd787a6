"""Stopping a run by hand or by a scheduler: after the step under way, with its state kept."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTE = b"\nstopping after the step under way; interrupt again to stop at once\n"


@contextmanager
def stop_asked() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one stops the program at once.

    Only the main thread hears signals; in any other the event stays unset.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}
    before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: object) -> None:
        """Handles the first signal; the next meets the handlers that were there before."""
        asked.set()
        restore()
        os.write(2, _NOTE)  # the one way to write that a handler may always use

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()
