"""Name → network: its transform, its head and width, its weights and its class names.

On the driver `resolve` checks a choice and describes it; in each actor `build` makes the network of that description.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.config import Transform
from pipeline.errors import WeightsRefused
from pipeline.families import Family, WeightsSource, find_family
from pipeline.fetch import fetch_weights
from pipeline.head import RGB, Network, Shape, first_convolution, probe
from pipeline.labels import read_labels
from pipeline.weights import align, fit, read_state


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """All that an actor needs to build the same network; small, and picklable.

    weights: for people: "ResNet50_Weights.IMAGENET1K_V2", a URI, or "random".
    weights_uri: where the file is fetched; None for random weights and for a function that brings its own.
    own_weights: whether they are torchvision's, timm's or the function's own, and no file that was trained elsewhere.
    sha256: hex, of the file; of every tensor where a function brings its own weights; "" for random ones.
    embedding_dim: width of the input of the last classifier. num_classes: 0 where there is no classifier.
    in_channels: 3 (RGB) or 1 (luma). labels: class names, num_classes of them, or none where no head was asked for.
    head: the classifier's name among the network's modules, "" where it has none.
    """

    model: str
    weights: str
    weights_uri: str | None
    own_weights: bool
    sha256: str
    seed: int
    transform: Transform
    embedding_dim: int
    num_classes: int
    in_channels: int
    labels: tuple[str, ...]
    head: str


def resolve(model: str, weights: str, *, labels: str | None = None, seed: int = 0, need_head: bool = True) -> ModelSpec:
    """Check everything that can be wrong with a choice of network, without running data or touching a GPU.

    model: a torchvision name, `timm:<name>`, or `package.module:function`, a function that returns the network, or the
    network and its Transform.
    weights: DEFAULT, a name of torchvision's enum, a path or URI of .pt, .pth, .bin or .safetensors, or random.
    labels: a file of class names. need_head: False where only the embedding is wanted; a checkpoint may then lack it.
    Raises SettingRefused and WeightsRefused.
    """
    family = find_family(model, seed)
    source = family.source(weights)
    path, sha256 = fetch_weights(source.uri, family.is_official(source)) if source.uri else ("", "")
    source = family.recognise(source, sha256)
    sizes = {"image_size": (source.transform or family.transform).crop}
    network = family.skeleton(source.own, sizes)
    transform = source.transform or family.transform
    shape = probe(network, model, transform.crop)
    if path and not (source.own and family.loads_own):
        shape = _check_state(family, network, sizes, shape, source, path, need_head)
    elif source.own and not path:
        sha256 = _digest(network)
    if shape.channels not in (1, RGB):
        raise WeightsRefused(
            f"{model} with weights {source.name} takes {shape.channels} channels: images are decoded to 3 (RGB), and "
            "reduced to 1 (luma) where a network takes 1; name a network of 3 or 1"
        )
    if need_head and not shape.classes:
        raise WeightsRefused(f"{model} does not end in a classifier: embed with it, or name a network that classifies")
    names = read_labels(labels, shape.classes) if labels and need_head else source.labels
    if len(names) != shape.classes:
        names = tuple(map(str, range(shape.classes)))
    return ModelSpec(
        model=model,
        weights=source.name,
        weights_uri=source.uri,
        own_weights=source.own,
        sha256=sha256,
        seed=seed,
        transform=_for_channels(transform, shape.channels),
        embedding_dim=shape.width,
        num_classes=shape.classes,
        in_channels=shape.channels,
        labels=names,
        head=shape.head,
    )


def build(spec: ModelSpec) -> Network:
    """The network that `resolve` described, in evaluation mode, float32, on the CPU.

    Raises WeightsRefused where the weights cannot be had on this node, or are not the ones that were described.
    """
    family = find_family(spec.model, spec.seed)
    source = WeightsSource(spec.weights, spec.weights_uri, spec.own_weights)
    sizes = {"num_classes": spec.num_classes, "in_channels": spec.in_channels, "image_size": spec.transform.crop}
    if spec.weights_uri is None:
        body = family.random(source.own, sizes)
        sha256 = _digest(body) if source.own else ""
    else:
        path, sha256 = fetch_weights(spec.weights_uri, family.is_official(source))
    if sha256 != spec.sha256:
        raise WeightsRefused(
            f"weights {spec.weights} of {spec.model} have sha256 {sha256[:10]}… on this node and {spec.sha256[:10]}… "
            "where the run began: give every node the same file, and start the run again"
        )
    if spec.weights_uri is not None:
        body = family.load(source, path, sizes, spec.head)
    return Network(body, spec.head, spec.num_classes).eval()


def count_flops(spec: ModelSpec) -> int:
    """Floating-point operations of the whole network for one image, a multiply-add as two. Raises WeightsRefused."""
    from torch.utils.flop_counter import FlopCounterMode  # imports torch's compiler, which no job needs for this

    image = torch.zeros(1, spec.in_channels, spec.transform.crop, spec.transform.crop)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        build(spec)(image)
    return int(counter.get_total_flops())


def _check_state(
    family: Family,
    network: nn.Module,
    sizes: dict[str, int],
    shape: Shape,
    source: WeightsSource,
    path: str,
    need_head: bool,
) -> Shape:
    """The shape of the network that fits the file; WeightsRefused where none does."""
    state = align(read_state(path), network.state_dict())
    channels = _size(state, f"{first_convolution(network)[0]}.weight", 1, shape.channels)
    classes = _size(state, f"{shape.head}.weight", 0, shape.classes)
    if (classes, channels) != (shape.classes, shape.channels):
        network = family.skeleton(source.own, sizes | {"num_classes": classes, "in_channels": channels})
    has_head = fit(network, state, f"{family.model} and {source.name}", "" if need_head else shape.head)
    return replace(shape, classes=classes if has_head else 0, channels=channels)


def _size(state: "OrderedDict[str, Tensor]", name: str, axis: int, default: int) -> int:
    return state[name].shape[axis] if name in state and state[name].ndim > axis else default


def _for_channels(transform: Transform, channels: int) -> Transform:
    """Of one channel, the mean of the three means and deviations."""
    if channels != 1:
        return transform
    mean, std = (sum(values) / len(values) for values in (transform.mean, transform.std))
    return replace(transform, mean=(mean,), std=(std,))


def _digest(network: nn.Module) -> str:
    """sha256 of every tensor, with its name, type and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
