"""The epochs of a training: their figures, and the file that has them while it runs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FROZEN, ALL = "classifier", "all layers"
FILE = "history.json"


@dataclass(frozen=True)
class Epoch:
    """The figures of an epoch; number 0 is the start.

    phase: the layers that were trained. loss: mean of the batches, None at the start. stop_loss: calibrated log-loss of
    the images that end the training. accuracy: of these. is_best: the best epoch so far. seconds: wall time.
    """

    number: int
    phase: str
    loss: float | None
    stop_loss: float
    accuracy: float
    is_best: bool
    learning_rate: float
    seconds: float

    def __str__(self) -> str:
        loss = "" if self.loss is None else f"loss {self.loss:.3f}, "
        best = ", best so far" if self.is_best and self.number else ""
        return (
            f"epoch {self.number} ({self.phase if self.number else 'linear probe'}): {loss}hold-out loss "
            f"{self.stop_loss:.3f}, accuracy {100 * self.accuracy:.1f} %, {self.seconds:.0f} s{best}"
        )


def write_history(folder: Path, history: Sequence[Epoch]) -> None:
    """Replace the file of a folder as a whole."""
    temporary = folder / f"{FILE}.tmp"
    temporary.write_text(json.dumps([asdict(each) for each in history]))
    temporary.replace(folder / FILE)


def read_history(folder: Path) -> list[Epoch]:
    """The epochs that a training has ended so far."""
    try:
        return [Epoch(**each) for each in json.loads((folder / FILE).read_text())]
    except FileNotFoundError:
        return []
