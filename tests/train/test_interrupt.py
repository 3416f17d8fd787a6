"""The first signal asks, the second stops, and handlers are put back."""

import os
import signal
import threading

import pytest

from train.interrupt import stop_asked


@pytest.fixture(autouse=True)
def heard():
    """A job in the background starts with SIGINT ignored; these tests hear it all the same."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_and_is_told(number, capfd):
    with stop_asked() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), number)
        assert asked.wait(5)
    assert "stopping after the step under way" in capfd.readouterr().err


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt), stop_asked() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.wait(5)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(5)


def test_handlers_are_put_back():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with stop_asked():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_asked() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert not asked.wait(0.05)
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_hears_nothing_and_fails_at_nothing():
    heard = []

    def enter():
        with stop_asked() as asked:
            heard.append(asked.is_set())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert heard == [False]
