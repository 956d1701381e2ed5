"""Signals end a run as `Interrupted`, whatever code they interrupt."""

import os
import signal
import sys

import pytest

from pipeline.engine.interrupts import catch_again, interruptible
from pipeline.errors import Interrupted
from pipeline.storage.retry import with_retries


def test_a_signal_is_not_retried() -> None:
    with pytest.raises(Interrupted) as stopped, interruptible():
        with_retries(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped.value.exit_code == 143


def test_the_signal_is_known_when_ray_raises_its_own_exception() -> None:
    def wait() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(Interrupted) as stopped, interruptible():
        wait()
    assert stopped.value.exit_code == 143


def test_rays_own_handler_counts_as_the_signal() -> None:
    with pytest.raises(Interrupted) as stopped, interruptible():
        sys.exit(signal.SIGTERM)
    assert stopped.value.exit_code == 143
    with pytest.raises(SystemExit), interruptible():
        sys.exit(3)


def test_handlers_are_restored() -> None:
    def connect_and_stop() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does when it connects
        catch_again()
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted), interruptible():
        connect_and_stop()
    assert signal.getsignal(signal.SIGTERM) is before
    catch_again()
    assert signal.getsignal(signal.SIGTERM) is before
