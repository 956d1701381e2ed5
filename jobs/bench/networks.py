"""The networks of a benchmark: torchvision's, and one that does nothing.

With `null` a run costs what everything but the network costs; a ResNet's tens of core-milliseconds would drown that.
"""

from torch import Tensor, nn

from jobs.bench.programme import NULL

STEP = 16
WIDTH = 3 * (224 // STEP) ** 2


class Null(nn.Module):
    """float32 [N, 3, 224, 224] → every STEP-th pixel of every STEP-th row, [N, WIDTH] → a head as ResNets have it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[:, :, ::STEP, ::STEP].flatten(1))


def null() -> nn.Module:
    return Null()


def named(model: str) -> nn.Module:
    """With random weights. The classifier is the attribute `fc`, of torchvision's ResNets as of `null`."""
    if model == NULL:
        return null()
    from torchvision.models import get_model

    return get_model(model)
