"""Run a command and measure it: elapsed time, memory and CPU time of all its processes, energy of the CPUs."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from jobs.bench.harness.energy import Meter
from pipeline.errors import NightshiftError

SAMPLE_SECONDS = 0.5
SAMPLES_PER_MEMORY_SAMPLE = 4  # for the PSS the kernel walks all page tables
TAIL_CHARACTERS = 2_000
EXIT_SECONDS = 20.0
COMMAND = "the command itself"


class CommandFailed(NightshiftError):
    """A measured command failed, or did not do all of its work. output: the end of its output."""

    def __init__(self, sentence: str, output: str = "") -> None:
        super().__init__(sentence)
        self.output = output


@dataclass(frozen=True)
class Spent:
    """The cost of one run of a command.

    peak_memory_bytes: the largest sum of its processes' proportional sets (PSS: a shared page is split among the
        processes that share it), or of their unique sets if the system reports no PSS.
    core_seconds: CPU time of all its processes. by_role: the same by the role of a process when it was sampled; the
        sum is smaller, since short-lived processes are missed. sampling_core_seconds: cost of sampling, not included.
    joules: energy of the CPU packages; None if it cannot be read.
    """

    seconds: float
    peak_memory_bytes: int
    core_seconds: float
    sampling_core_seconds: float
    by_role: dict[str, float] = field(default_factory=dict)
    joules: float | None = None


@dataclass
class Watch:
    """A process and all its descendants, also those whose parent has ended.

    core_seconds: CPU time by process at its last sample.
    """

    command: psutil.Process
    core_seconds: dict[psutil.Process, float] = field(init=False)
    by_role: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    peak_memory_bytes: int = 0
    samples: int = 0

    def __post_init__(self) -> None:
        self.core_seconds = {self.command: 0.0}

    def sample(self) -> None:
        self._find()
        memory = 0
        with_memory = self.samples % SAMPLES_PER_MEMORY_SAMPLE == 0
        for process in self.core_seconds:
            try:
                times = process.cpu_times()
                used = times.user + times.system
                self.by_role[self._role(process)] += used - self.core_seconds[process]
                self.core_seconds[process] = used
                memory += _own_bytes(process) if with_memory else 0
            except psutil.Error:
                continue
        self.peak_memory_bytes = max(self.peak_memory_bytes, memory)
        self.samples += 1

    def _role(self, process: psutil.Process) -> str:
        """Name a process. The title of a Ray worker is its current task."""
        if process == self.command:
            return COMMAND
        title, *arguments = process.cmdline() or [process.name()]
        if title.startswith("ray::"):
            return re.sub(r"\.\w+$", "", " ".join([title, *arguments]).strip())
        scripts = [Path(word).name for word in arguments if word.endswith(".py")]
        return scripts[0] if scripts else Path(title).name

    def end(self) -> None:
        """Wait for processes that are ending, then kill those that the command left running."""
        for process in self._alive_after(EXIT_SECONDS):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._alive_after(EXIT_SECONDS)

    def _alive_after(self, seconds: float) -> list[psutil.Process]:
        """Processes that have not ended within this time."""
        deadline = time.monotonic() + seconds
        while alive := [process for process in self.core_seconds if _is_alive(process)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return alive

    def _find(self) -> None:
        """Add the new children of known processes."""
        started: dict[int, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            try:
                started.setdefault(process.ppid(), []).append(process)
            except psutil.Error:
                continue
        parents = [process.pid for process in self.core_seconds if process.is_running()]
        while parents:
            for child in started.get(parents.pop(), []):
                if child not in self.core_seconds:
                    self.core_seconds[child] = 0.0
                    parents.append(child.pid)


def spend(command: Sequence[str], environment: Mapping[str, str] | None = None, folder: Path | None = None) -> Spent:
    """Run a command to its end. Raises CommandFailed, with the end of its output, if its exit code is not 0.

    folder: the working directory.
    """
    with tempfile.TemporaryFile("w+b") as output:
        meter, started = Meter(), time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, cwd=folder
        )
        watch = Watch(psutil.Process(process.pid))
        stop, sampling = threading.Event(), [0.0]
        sampler = threading.Thread(target=_watch, args=(watch, stop, sampling))
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds, joules = time.perf_counter() - started, meter.joules()
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            stop.set()
            sampler.join()
            if process.returncode is None:
                process.kill()
                process.wait()
            watch.end()
        if process.returncode:
            raise CommandFailed(f"{_shown(command)} ended with {process.returncode}", _tail(output))
    # The kernel counts all CPU time, but only of children that were waited for; samples see all processes, but not to
    # their end.
    core_seconds = max(usage.ru_utime + usage.ru_stime, sum(watch.core_seconds.values()))
    return Spent(seconds, watch.peak_memory_bytes, core_seconds, sampling[0], dict(watch.by_role), joules)


def json_of(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run Python with these arguments; return the JSON in the last line of its output. Raises CommandFailed."""
    line = [sys.executable, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise CommandFailed(f"{' '.join(arguments)} failed", done.stderr[-TAIL_CHARACTERS:])
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _watch(watch: Watch, stop: threading.Event, sampling: list[float]) -> None:
    while True:
        watch.sample()
        sampling[0] = time.thread_time()
        if stop.wait(SAMPLE_SECONDS):
            return


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _own_bytes(process: psutil.Process) -> int:
    memory = process.memory_full_info()
    return int(getattr(memory, "pss", memory.uss))


def _shown(command: Sequence[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])


def _tail(output: IO[bytes]) -> str:
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - TAIL_CHARACTERS))
    return output.read().decode(errors="replace").strip()
