"""SIGINT and SIGTERM end a run so that it can be resumed."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.errors import Interrupted

_catch: Callable[[], None] = lambda: None  # noqa: E731


def catch_again() -> None:
    """Put the handlers of the running `interruptible` back in place, after a library has set its own."""
    _catch()


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Interrupted` when the context ends.

    Inside it is a KeyboardInterrupt, which code that retries after other exceptions, here or in Ray, lets pass.
    """
    global _catch
    stopped_by = signal.SIGINT

    def stop(number: int, _: object) -> None:
        nonlocal stopped_by
        stopped_by = signal.Signals(number)
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # one is enough: what follows takes less than three seconds
        raise KeyboardInterrupt

    def catch() -> None:
        for number in before:
            signal.signal(number, stop)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    outer, _catch = _catch, catch
    catch()
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(stopped_by) from None
    except SystemExit as error:  # Ray's own handler of SIGTERM, which is in place while Ray starts
        if error.code != signal.SIGTERM:
            raise
        raise Interrupted(signal.SIGTERM) from None
    finally:
        _catch = outer
        for number, handler in before.items():
            signal.signal(number, handler)
