"""Family: where networks come from (torchvision, timm or a Python function), and how they are built and loaded."""

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.errors import WeightsRefused
from pipeline.images.transform import Transform
from pipeline.models.checkpoint import align, fit, read_state, unwrap_head
from pipeline.models.classifier import weightless
from pipeline.models.names import SUFFIXES
from pipeline.storage import uris


@dataclass(frozen=True, slots=True)
class WeightsSource:
    """Where weights come from.

    name: shown to users. uri: of the file; None for random weights and for those of a Python function.
    own: the weights are the family's own, and not a file that was trained elsewhere.
    labels: class names of these weights, or none. transform: of these weights; None for the family's.
    """

    name: str
    uri: str | None
    own: bool
    labels: tuple[str, ...] = ()
    transform: Transform | None = None


class Family:
    """A network from a library or a function. Subclasses define how it is named, built and loaded.

    model: the value of --model. seed: of random weights.
    loads_own: `load` converts the family's own files, so their tensors need not match by name.
    transform: default for weights that have no other transform.
    """

    loads_own = False
    transform = Transform()

    def __init__(self, model: str, seed: int) -> None:
        self.model, self.seed = model, seed

    def network(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        """Build the network.

        own: for the family's own weights. sizes: num_classes, in_channels and image_size; the network's default is used
        for a size that is absent or 0.
        """
        raise NotImplementedError

    def find_own(self, weights: str) -> WeightsSource | None:
        """The family's own weights with this name; None if there are none."""
        raise NotImplementedError

    def own_names(self) -> list[str]:
        """Names that `find_own` knows."""
        return ["DEFAULT"]

    def source(self, weights: str) -> WeightsSource:
        """The source of --weights. Raises WeightsRefused if it is unknown."""
        if weights == "random":
            return WeightsSource(weights, None, False)
        if own := self.find_own(weights):
            return own
        if uris.redact(weights).endswith(SUFFIXES):
            uri = uris.normalize(weights)
            return WeightsSource(uris.redact(uri), uri, False)
        raise WeightsRefused(
            f"--weights {weights!r} of {self.model} is unknown: choose {', '.join(self.own_names())}, random, "
            f"or a path or URI that ends in {', '.join(SUFFIXES)}"
        )

    def is_official(self, source: WeightsSource) -> bool:
        """Whether the file is torchvision's, whose name contains its hash."""
        return False

    def recognise(self, source: WeightsSource, sha256: str) -> WeightsSource:
        """Add labels and transform to a source if its sha256 is that of the family's own file."""
        return source

    def assumes_transform(self, source: WeightsSource) -> bool:
        """Whether `transform` may not be that of the training: the weights are a file that was trained elsewhere."""
        return source.uri is not None and not source.own

    def skeleton(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        """Build the network with parameters on the meta device, which takes no memory."""
        with weightless():
            return self.network(own, sizes)

    def random(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        """Build the network with its random initial weights; the same seed gives the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return self.network(own, sizes)

    def check_random(self, network: nn.Module) -> None:
        """Refuse --weights random for a network that does not depend on the seed. Raises WeightsRefused."""

    def resized(self, own: bool, sizes: dict[str, int], head: str) -> nn.Module:
        """The skeleton with the sizes of a file of weights. head: name of the classifier."""
        return self.skeleton(own, sizes)

    def load(self, source: WeightsSource, path: str, sizes: dict[str, int], head: str) -> nn.Module:
        """Build the network and load a file into it. head: name of a classifier that the file may lack.

        Raises WeightsRefused.
        """
        network = self.resized(source.own, sizes, head)
        state = align(read_state(path), network.state_dict())
        unwrap_head(state, head)
        fit(network, state, f"{self.model} and {source.name}", head)
        return network
