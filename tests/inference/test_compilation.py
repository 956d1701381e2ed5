"""When torch.compile pays, and what happens if it fails."""

import logging

import pytest
import torch
import torch._inductor.config
from networks import TINY, draw_pixels
from torch._inductor.utils import fresh_cache

from pipeline.inference import compilation
from pipeline.inference.compilation import CompileDecision
from pipeline.inference.session import InferenceSession
from pipeline.predictors.base import Allotment
from pipeline.predictors.embed import Embedder

CPU = torch.device("cpu")


@pytest.mark.parametrize(("seconds", "compiles"), [(10.0, False), (20.0, True)])
def test_the_fastest_of_several_batches_decides(
    monkeypatch: pytest.MonkeyPatch, seconds: float, compiles: bool
) -> None:
    """Two lanes compute 2 × 256 images in so many seconds. A batch that warms up or waits takes a minute."""
    monkeypatch.setitem(compilation.WARM_UP_BATCHES, "cpu", 3)
    decision = CompileDecision(20_000, CPU, lanes=2)
    for each in (60.0, 60.0, 60.0, seconds, seconds, 60.0):
        assert not decision.should_compile(256, each, 256)
        assert not decision.should_compile(3, 0.001, 256), "batches of less than half the size are not timed"
        assert decision.is_open()
    assert decision.images_left == 20_000 - 6 * 259
    assert decision.should_compile(200, 60.0, 256) is compiles
    assert not decision.is_open()
    assert not decision.should_compile(256, 1000.0, 256), "it is decided only once"


@pytest.mark.parametrize(("images", "compiles"), [(4808, False), (4809, True)])
def test_it_pays_if_enough_work_remains(images: int, compiles: bool) -> None:
    """On a CPU, a warm-up batch and a timed batch of 4 images at 8 images/s. The limit of 600 s is 4800 images."""
    decision = CompileDecision(images, CPU, lanes=1)
    assert not decision.should_compile(4, 0.5, 4)
    assert decision.should_compile(4, 0.5, 4) is compiles


def test_a_decision_without_a_number_of_images_never_compiles() -> None:
    decision = CompileDecision(None, CPU, lanes=1)
    assert not decision.is_open()
    assert not any(decision.should_compile(4, 1e6, 4) for _ in range(3))


def test_a_session_compiles_once_it_pays(monkeypatch: pytest.MonkeyPatch, own_caches: None) -> None:
    monkeypatch.setitem(compilation.MIN_REMAINING_SECONDS, "cpu", 0.0)
    compiled: list[int] = []
    monkeypatch.setattr(InferenceSession, "_compile", lambda session: compiled.append(session.decision.batches))
    predictor = Embedder(model=TINY, precision="float32")
    predictor.load(Allotment(batch_size=4, images=100))
    for _ in range(4):
        predictor.predict(draw_pixels(4, 32))
    assert compiled == [2], "after the first batch that is not a warm-up, and only then"


def test_without_a_compiler_the_network_runs_uncompiled(caplog: pytest.LogCaptureFixture, own_caches: None) -> None:
    torch._dynamo.reset()
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)})
    predictor = Embedder(model=TINY, compile="on", precision="float32")
    with no_compiler, fresh_cache(), caplog.at_level(logging.WARNING, compilation.__name__):
        predictor.load(Allotment(batch_size=4))
    messages = [record.message for record in caplog.records if record.name == compilation.__name__]
    assert [message[:20] for message in messages] == ["torch.compile failed"]
    assert predictor.describe().startswith("cpu, float32, not compiled: ")
    assert predictor.session.fixed_size is None
    assert predictor.predict(draw_pixels(5, 32))["embedding"].shape == (5, 8)
