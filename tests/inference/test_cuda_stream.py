"""Lanes: CUDA graphs that cannot be recorded, and waiting without spinning. Stand-ins take the place of a GPU."""

import sys

import numpy as np
import pytest
import torch

from pipeline.inference.cuda_stream import Lane, synchronize

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("message", "retries"),
    [("CUDA out of memory.", True), ("operation not permitted when stream is capturing", False)],
)
def test_a_graph_that_did_not_fit_is_recorded_again_after_free(
    monkeypatch: pytest.MonkeyPatch, message: str, retries: bool
) -> None:
    lane = Lane(CPU)
    lane.uses_graphs = True
    monkeypatch.setattr("pipeline.inference.cuda_stream._Graph", lambda *_: raise_(RuntimeError(message)))
    assert lane._record(lambda x: (x, None), torch.zeros(1, 2, 2, 3)) is None
    assert not lane.uses_graphs
    lane.free()
    assert lane.uses_graphs is retries


def test_a_failed_recording_is_freed_before_the_network_runs_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []

    def fail(*_: object) -> None:
        attempts.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert sys.exc_info() == (None, None, None), "the exception would keep the recording's memory"
        return pixels + 1, None

    monkeypatch.setattr("pipeline.inference.cuda_stream._Graph", fail)
    lane = Lane(CPU)
    lane.uses_graphs = True
    for _ in range(2):
        assert lane.run(forward, torch.zeros(2), repeats=True)[0].tolist() == [1, 1]
    assert attempts == [1]


def test_uploads_are_padded_with_zeros() -> None:
    lane, pixels = Lane(CPU), np.full((2, 3, 4, 3), 7, np.uint8)
    same = lane.upload(pixels, 2)
    assert same.data_ptr() == pixels.ctypes.data, "a copy"
    padded = lane.upload(pixels, 5)
    assert padded.shape == (5, 3, 4, 3)
    assert (padded[:2] == 7).all()
    assert not padded[2:].any()


def test_waiting_for_a_gpu_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Event:
        def __init__(self, blocking: bool = False) -> None:
            calls.append(blocking)

        def record(self, stream: str) -> None:
            calls.append(stream)

        def synchronize(self) -> None:
            calls.append("waited")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "this thread's")
    synchronize(GPU)
    assert calls == [True, "this thread's", "waited"]
    synchronize(CPU)
    assert len(calls) == 3
