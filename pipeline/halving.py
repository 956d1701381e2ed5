"""Run a batch; if it fails, run its halves, down to the single items that fail."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pipeline.errors import NightshiftError, is_out_of_memory, message_line

R = TypeVar("R")


class Batch(Protocol):
    """Anything with a length and slices: a list, a range, an array or a tensor."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> "Batch": ...


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a batch failed. It does not hold the exception, whose traceback keeps the batch in memory.

    size: number of items of the batch. message: first line of the exception's message.
    """

    size: int
    message: str
    out_of_memory: bool


def by_halves(
    batch: B,
    run: Callable[[B], R],
    alone: Callable[[Exception], R | None],
    retry: Callable[[Failure], object] = lambda _: None,
) -> Iterator[tuple[int, R]]:
    """Yield the size and the result of each piece of the batch, in order. The sizes add up to `len(batch)`.

    run: called with a batch; returns its result or raises.
    alone: called with the exception of a single item; returns the item's result, or None to run the item again.
    retry: called before a failed batch is halved, or a single item is run again. It may wait, or raise to end the run.
    A NightshiftError of `run` is not caught, since it concerns the whole run and not one item.
    """
    try:
        result: R | None = run(batch)
    except NightshiftError:
        raise
    except Exception as error:  # networks and decoders are third-party code and may raise anything
        result = alone(error) if len(batch) == 1 else None
        failure = Failure(len(batch), message_line(error), is_out_of_memory(error))
    if result is not None:
        yield len(batch), result
        return
    retry(failure)
    for part in (slice(None),) if len(batch) == 1 else _halves(len(batch)):
        yield from by_halves(batch[part], run, alone, retry)  # type: ignore[arg-type]


def _halves(size: int) -> tuple[slice, slice]:
    half = -(-size // 2)
    return slice(0, half), slice(half, size)
