"""ModelSpec: a network and its weights, resolved on the driver and built in each actor."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.images.pixels import RGB8, PixelFormat
from pipeline.images.transform import IMAGENET_MEAN, IMAGENET_STD, Transform
from pipeline.models import transform_files
from pipeline.models.checkpoint import align, fit, read_metadata, read_state, unwrap_head
from pipeline.models.classifier import (
    RGB,
    Network,
    Shape,
    find_classifier,
    first_convolution,
    new_classifier,
)
from pipeline.models.download import fetch_beside, fetch_weights, file_name
from pipeline.models.families import Family, WeightsSource
from pipeline.models.input_spec import InputSpec
from pipeline.models.labels import read_labels
from pipeline.models.overrides import Layers, Overrides, as_flags, for_channels
from pipeline.models.python_function import FunctionFamily
from pipeline.models.record import check_model, check_names, read_record
from pipeline.models.timm_models import TimmFamily
from pipeline.models.torchvision_models import TorchvisionFamily
from pipeline.models.transform_files import Stated

NORMALIZE_INSIDE = ("googlenet", "inception_v3")
"""Networks of torchvision whose own weights need `transform_input`."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything that an actor needs to build a network. Small, and picklable.

    model, seed: as in `resolve`.
    weights: shown to users: "ResNet50_Weights.IMAGENET1K_V2", a URI, or "random".
    weights_uri: URI of the file; None for random weights and for those of a Python function.
    own_weights: the weights are torchvision's, timm's or the function's own, and not a file that was trained elsewhere.
    sha256: hex, of the file, or of all tensors of a function's own weights; "" for random weights.
    embedding_dim: width of the classifier's input. num_classes: 0 without a classifier.
    in_channels: 3 (RGB) or 1 (luma), or the number of bands of `input`.
    labels: num_classes class names; () without a classifier.
    head: name of the classifier among the network's modules; "" without a classifier.
    notes: sentences for the user about defaults that may not fit these weights.
    input: bands and numbers that the weights were trained on; None for RGB of 8 bits.
    origins: where each value of the transform comes from. scale: range of `--scale` in the training, None if unknown.
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
    notes: tuple[str, ...] = ()
    input: InputSpec | None = None
    origins: Mapping[str, str] = field(default_factory=dict)
    scale: tuple[float, float] | None = None

    @property
    def pixel_format(self) -> PixelFormat:
        """The pixels that the network takes."""
        return self.input.pixel_format if self.input else RGB8


def resolve(
    model: str,
    weights: str,
    *,
    labels: str | None = None,
    seed: int = 0,
    need_head: bool = True,
    overrides: Overrides = Overrides(),  # noqa: B008
    transform_file: Overrides = Overrides(),  # noqa: B008
    input: InputSpec | None = None,
) -> ModelSpec:
    """Check a choice of network and weights, without running data or using a GPU. Downloads the weights.

    model: a torchvision name, `timm:<name>`, or `package.module:function`, a function that returns a network or a
    tuple of a network and its Transform.
    weights: DEFAULT, a name of torchvision's weights enum, a path or URI of .pt, .pth, .pth.tar, .ckpt, .bin or
    .safetensors, or random, which does not fit a function that brings its own weights.
    labels: path or URI of class names. None: the names of the weights, or class numbers if they have none.
    seed: of random weights. need_head: False if only the embedding is needed; the weights may then lack a classifier.
    overrides: of the network's transform, by flags. They override transform_file, the values of `--transform`, which
    override those that the file of weights states, which override the network's default.
    input: what the weights were trained on, if it is not RGB of 8 bits. Its transform replaces the network's own.
    A checkpoint of `finetune` names its own network and classes. Raises SettingRefused and WeightsRefused.
    """
    family = find_family(model, seed)
    source = family.source(weights)
    path, sha256 = fetch_weights(source.uri, family.is_official(source)) if source.uri else ("", "")
    source = family.recognise(source, sha256)
    record = read_record(path) if path and not source.own else None
    if record:
        check_model(record, model, source.name)
        source = replace(source, labels=record.classes)
    stated = _stated(source, path) if path and not source.own and (record or not input) else Stated()
    layers = Layers((stated.transform, transform_file, overrides))
    own_transform = input.transform if input else source.transform
    sizes = {"image_size": layers.crop or (own_transform or family.transform).crop}
    if input and weights == "random":
        sizes["in_channels"] = len(input.bands)
    network = family.skeleton(source.own, sizes)
    transform = layers.apply(own_transform or family.transform)  # that of a function is known only now
    shape = find_classifier(network, model, transform.crop)
    notes = [_embedding_note(model, shape)] if isinstance(family, FunctionFamily) and not shape.head else []
    if path and not (source.own and family.loads_own):
        shape, inner_head = _check_state(family, network, sizes, shape, source, path, need_head)
        notes += [_head_note(source, inner_head, shape.head)] if inner_head else []
    elif source.own and not path:
        sha256 = _digest(network)
    _check_channels(shape.channels, model, source.name, input)
    _check_shape(shape, model, need_head)
    if weights == "random":
        family.check_random(network)
    is_assumed = not own_transform and family.assumes_transform(source)
    origins = layers.origins(_default_origin(model, source, input, is_assumed=is_assumed))
    transform = for_channels(transform, shape.channels, model, origins)
    if stated.transform.given or transform_file.given:
        notes.append(_origins_note(transform, origins))
    elif is_assumed and layers.missing():
        notes.append(_transform_note(transform, model, source))
    names = _class_names(labels if need_head else None, stated.labels or source.labels, shape.classes)
    if record and labels and need_head:
        check_names(record, names, labels, source.name)
    return ModelSpec(
        model=model,
        weights=source.name,
        weights_uri=source.uri,
        own_weights=source.own,
        sha256=sha256,
        seed=seed,
        transform=transform,
        embedding_dim=shape.width,
        num_classes=shape.classes,
        in_channels=shape.channels,
        labels=names,
        head=shape.head,
        notes=tuple(notes),
        input=input,
        origins=origins,
        scale=layers.scale,
    )


def build(spec: ModelSpec) -> Network:
    """Build the network of a spec in evaluation mode, float32, on the CPU.

    Raises WeightsRefused if this node cannot read the weights, or if they are not those of the spec.
    """
    return Network(_body(spec), spec.head, spec.num_classes).eval()


def build_for(spec: ModelSpec, classes: int) -> Network:
    """Build the network of a spec of `trainable` with a new classifier, whose weights are 0.

    Raises WeightsRefused as `build` does.
    """
    body = _body(spec)
    if getattr(body, "transform_input", False):
        body.transform_input = False  # type: ignore[assignment]
    new_classifier(body, spec.head, classes)
    return Network(body, spec.head, classes).eval()


def trainable(spec: ModelSpec) -> ModelSpec:
    """The spec for `build_for`. Raises SettingRefused for a network without a classifier.

    torchvision's own weights of GoogLeNet and Inception change the normalization inside of the network. Weights of a
    file do not, so the training puts that change into the transform.
    """
    if not spec.head:
        raise SettingRefused(
            f"--model {spec.model} does not end in a classifier, which fine-tuning replaces: let the network end in a "
            "torch.nn.Linear, or name another one"
        )
    if not (spec.own_weights and spec.weights_uri and spec.model in NORMALIZE_INSIDE):
        return spec
    old = spec.transform
    ratios = [std / imagenet for std, imagenet in zip(old.std, IMAGENET_STD, strict=True)]
    mean = (m - (i - 0.5) * r for m, i, r in zip(old.mean, IMAGENET_MEAN, ratios, strict=True))
    return replace(spec, transform=replace(old, mean=tuple(mean), std=tuple(0.5 * ratio for ratio in ratios)))


def _body(spec: ModelSpec) -> nn.Module:
    """The whole network of a spec, with its weights."""
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
            f"weights {spec.weights} of {spec.model} have sha256 {sha256[:10]}… on this node, but {spec.sha256[:10]}… "
            "on the driver: give all nodes the same file, and start the run again"
        )
    if spec.weights_uri is not None:
        body = family.load(source, path, sizes, spec.head)
    return body


def count_flops(spec: ModelSpec) -> int:
    """Floating-point operations of the whole network for one image; a multiply-add is two. Raises WeightsRefused."""
    from torch.utils.flop_counter import FlopCounterMode  # imports torch's compiler, so only when it is needed

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
) -> tuple[Shape, str]:
    """Shape of the network with the classes and channels of a file of weights; WeightsRefused if they do not match.

    Also returns the name of the head's layer in the file if it has another name there, else "".
    """
    state = align(read_state(path), network.state_dict())
    inner_head = unwrap_head(state, shape.head)
    channels = _size(state, f"{first_convolution(network)[0]}.weight", 1, shape.channels)
    classes = _size(state, f"{shape.head}.weight", 0, shape.classes)
    if (classes, channels) != (shape.classes, shape.channels):
        new_sizes = {"num_classes": classes, "in_channels": channels}
        network = family.resized(source.own, sizes | new_sizes, shape.head)
    has_head = fit(network, state, f"{family.model} and {source.name}", "" if need_head else shape.head)
    return replace(shape, classes=classes if has_head else 0, channels=channels), inner_head


def _check_channels(channels: int, model: str, weights: str, input: InputSpec | None) -> None:
    if input and channels != len(input.bands):
        raise WeightsRefused(
            f"{model} with weights {weights} takes {channels} channels, but --input-spec {input.name} has "
            f"{len(input.bands)} bands ({', '.join(input.band_names)}): use the specification of these weights"
        )
    if not input and channels not in (1, RGB):
        raise WeightsRefused(
            f"{model} with weights {weights} takes {channels} channels, but images have 3 (RGB) or are reduced "
            "to 1 (luma); name the bands and numbers that it was trained on with --input-spec, or use a network of 3 "
            "channels or 1"
        )


def _check_shape(shape: Shape, model: str, need_head: bool) -> None:
    if need_head and not shape.classes:
        raise WeightsRefused(f"{model} does not end in a classifier: use embed, or a network with a classifier")


def _class_names(uri: str | None, of_weights: tuple[str, ...], classes: int) -> tuple[str, ...]:
    """Class names of a file or else of the weights; class numbers if the weights lack names."""
    names = read_labels(uri, classes) if uri else of_weights
    return names if len(names) == classes else tuple(map(str, range(classes)))


def _size(state: "OrderedDict[str, Tensor]", name: str, axis: int, default: int) -> int:
    """Size of a tensor along an axis; `default` if there is no such tensor or axis."""
    return state[name].shape[axis] if name in state and state[name].ndim > axis else default


def _embedding_note(model: str, shape: Shape) -> str:
    return (
        f"--model {model} does not end in a classifier that can be removed, so the embedding is its whole output of "
        f"{shape.width} values; if these are scores of classes, let the network end in a torch.nn.Linear"
    )


def _head_note(source: WeightsSource, inner: str, head: str) -> str:
    return (
        f"--weights {source.name} hold the classifier {head} as {inner}: layers beside it that have no weights are "
        "left out, which is right for a dropout; if there are others, write a function that builds this head, and "
        "give it as --model package.module:function"
    )


def _stated(source: WeightsSource, path: str) -> Stated:
    """What a file of weights states about itself: in its metadata, or in timm's config.json beside it."""
    transform = transform_files.of_metadata(read_metadata(path), source.name)
    if transform.given or file_name(source.uri or "") not in transform_files.BESIDE_CONFIG:
        return Stated(transform)
    text = fetch_beside(source.uri or "", transform_files.CONFIG)
    return Stated() if text is None else transform_files.of_config(text, source.name)


def _default_origin(model: str, source: WeightsSource, input: InputSpec | None, *, is_assumed: bool) -> str:
    if input:
        return f"--input-spec {input.name}"
    if is_assumed:
        return f"default of --model {model}; that of the training is unknown"
    return f"weights {source.name}" if source.own and source.uri else f"--model {model}"


def _origins_note(transform: Transform, origins: Mapping[str, str]) -> str:
    """The transform of a run, and where its values come from."""
    names: dict[str, list[str]] = {}
    for name, origin in origins.items():
        names.setdefault(origin, []).append(name)
    parts = "; ".join(f"{', '.join(values)} from {origin}" for origin, values in names.items())
    squash = ", and ignores the aspect ratio" if transform.squash else ""
    return f"the run uses {as_flags(transform)}{squash} ({parts})"


def _transform_note(transform: Transform, model: str, source: WeightsSource) -> str:
    subject = f"--weights {source.name}" if source.uri else f"--model {model}"
    return (
        f"{subject} comes without a transform, so the run uses {as_flags(transform)}; set these flags to the values of "
        "the training if they differ, or give them with --transform FILE.yaml"
    )


def _digest(network: nn.Module) -> str:
    """sha256 in hex of all tensors, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def find_family(model: str, seed: int) -> Family:
    """The family of --model. Raises SettingRefused for an unknown name."""
    kind: type[Family] = (
        TimmFamily if model.startswith("timm:") else FunctionFamily if ":" in model else TorchvisionFamily
    )
    return kind(model, seed)
