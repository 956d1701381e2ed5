"""Utilization and memory of a GPU while something runs, of all processes together, from nvidia-smi."""

import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

SAMPLE_MILLISECONDS = 200


@dataclass(frozen=True)
class Sample:
    """time: seconds since the epoch. utilization: share of the sampling interval in which a kernel ran."""

    time: float
    utilization: float
    memory_bytes: int


@dataclass
class GpuMonitor:
    """Takes samples while its context is open. gpu: in the form of nvidia-smi's -i; None without a GPU."""

    gpu: str | None
    samples: list[Sample] = field(default_factory=list)
    _process: "subprocess.Popen[str] | None" = None
    _reader: threading.Thread | None = None

    def __enter__(self) -> "GpuMonitor":
        if self.gpu is not None:
            query = ["--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
            command = ["nvidia-smi", "-i", self.gpu, *query, "-lms", str(SAMPLE_MILLISECONDS)]
            with suppress(FileNotFoundError):  # then there are no samples
                self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
                self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._process and self._reader:
            self._process.terminate()
            self._reader.join()
            self._process.wait()

    def idle(self, start: float, stop: float) -> float | None:
        """Share of the time without a kernel, between two times in seconds since the epoch; None if not known."""
        busy = [sample.utilization for sample in self.samples if start <= sample.time <= stop]
        return 1 - sum(busy) / len(busy) if busy else None

    @property
    def peak_memory_bytes(self) -> int | None:
        return max((sample.memory_bytes for sample in self.samples), default=None)

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            with suppress(ValueError):  # "[N/A]": the driver reports nothing for a part of a GPU
                utilization, memory_mib = (float(value) for value in line.split(","))
                self.samples.append(Sample(time.time(), utilization / 100, int(memory_mib) << 20))
