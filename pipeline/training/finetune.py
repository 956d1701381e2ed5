"""Fine-tune a network on labelled images: from an archive and labels to a checkpoint with its evaluation."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import RunConfig, check_choices, flag
from pipeline.errors import InputRefused, OutputLocked, SettingRefused, TooManyErrors, WeightsRefused, counted
from pipeline.images.transform import Transform
from pipeline.predictors.embed import Embedder
from pipeline.schema import IDENTITY
from pipeline.storage import access, uris
from pipeline.training import labels as label_files
from pipeline.training.decoded import DecodedImages, archive_of, decode_images, open_pixels
from pipeline.training.history import Epoch, read_history
from pipeline.training.job import MAX_SHOWN, SUFFIX, unknown_text
from pipeline.training.labels import COLUMN, FOLDER, Labels
from pipeline.version import __version__

if TYPE_CHECKING:
    from pipeline.models.record import CheckpointRecord
    from pipeline.models.spec import ModelSpec
    from pipeline.training.evaluate import Evaluation
    from pipeline.training.fit import Choice
    from pipeline.training.loop import Task
    from pipeline.training.samples import Samples

BATCH_SIZE = 32
PICTURE_SIDE, PICTURE_QUALITY = 128, 80
VALUES = ("bands", "scale", "nodata_fill", "exif_rotate")
"""Settings of the images' numbers that a checkpoint carries, if they are set."""
OF_SETTINGS = (
    *("augment", "epochs", "frozen_epochs", "learning_rate", "weight_decay", "label_smoothing", "patience"),
    *("class_weights", "holdout", "group_by"),
)
"""The settings that a checkpoint records."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a fine-tuning. Every field is a command-line flag. Raises SettingRefused if a value is not valid."""

    labels: str = flag(
        "CSV, JSON or Parquet file of images and classes; folder: the images' folders; column:NAME: a kept column",
        "",
        metavar="FILE",
    )
    to: str = flag(
        "the checkpoint to write; the evaluation is written beside it, as .json and .html", "", metavar="FILE"
    )
    name_column: str = flag("column of the labels with the images' names", "image", metavar="COL")
    label_column: str = flag("column of the labels with the classes", "label", metavar="COL")
    group_by: str | None = flag(
        "column of the images; those with one value are never on both sides of the split", None, metavar="COL"
    )
    holdout: float = flag(
        "share of the labels to leave out: one half ends the training, the other one tests the network",
        0.25,
        metavar="F",
    )
    augment: str = flag(
        "random changes: photo: crops, mirrored, other brightness; aerial: crops, mirrored, quarter turns",
        "photo",
        choices=("photo", "aerial", "none"),
    )
    frozen_epochs: int = flag("epochs of the classifier alone, before all layers learn", 2, metavar="N")
    epochs: int = flag("largest number of epochs of all layers", 20, metavar="N")
    patience: int = flag("stop after so many epochs that are no better on the hold-out", 5, metavar="N")
    learning_rate: float = flag(
        "of the last layers; earlier ones have less, and the classifier one that fits its inputs", 1e-3, metavar="F"
    )
    weight_decay: float = flag("L2 penalty of all weights", 1e-4, metavar="F")
    label_smoothing: float = flag("share of each label that is spread over all classes", 0.1, metavar="F")
    class_weights: str = flag(
        "balanced: classes count alike; auto: if one has three times the labels of another",
        "auto",
        choices=("auto", "balanced", "none"),
    )
    workers: int = flag("processes that train, on one GPU each or on the CPU", 1, metavar="N")
    device: str = flag("auto: GPUs if the cluster has any", "auto", choices=("auto", "cpu", "gpu"))
    work_dir: str | None = flag(
        "folder for decoded pixels and saved states, which several machines must share (default: in "
        "$NIGHTSHIFT_CACHE); removed at the end",
        None,
        metavar="DIR",
    )
    pictures: bool = flag("put pictures of mistakes on the page", True)

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.labels:
            raise SettingRefused("--labels is missing: name a file of images and classes, or folder, or column:NAME")
        if not self.to:
            raise SettingRefused("--to is missing: name the checkpoint to write, as in checkpoint.safetensors")
        if not self.to.endswith(SUFFIX):
            raise SettingRefused(f"--to is {uris.redact(self.to)!r}: the name of a checkpoint must end in {SUFFIX}")
        if problem := uris.check_output(self.to):
            raise SettingRefused(f"--to {uris.redact(self.to)} {problem}")
        for name, least in (("workers", 1), ("epochs", 1), ("patience", 1), ("frozen_epochs", 0)):
            if getattr(self, name) < least:
                raise SettingRefused(f"--{_flag(name)} is {getattr(self, name)}: it must be at least {least}")
        for name, most, kind in (("holdout", 0.5, "at most 0.5"), ("learning_rate", 1.0, "at most 1")):
            if not 0 < getattr(self, name) <= most:
                raise SettingRefused(f"--{_flag(name)} is {getattr(self, name):g}: it must be above 0 and {kind}")
        for name, value in (("weight_decay", self.weight_decay), ("label_smoothing", self.label_smoothing)):
            if not 0 <= value < 1:
                raise SettingRefused(f"--{_flag(name)} is {value:g}: it must be at least 0 and less than 1")


def _flag(name: str) -> str:
    return name.replace("_", "-")


@dataclass(frozen=True)
class FinetuneResult:
    """A checkpoint's record, its evaluation, that of a linear probe on the same split, and the files written.

    temperature: of the checkpoint's scores; its classifier contains it. verdict: which of the two is better.
    """

    record: "CheckpointRecord"
    evaluation: "Evaluation"
    probe: "Evaluation"
    temperature: float
    verdict: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Positions of the labelled images to train on, of those that end the training, and of those that test it.

    how: in words. note: what is wrong with the split, "" if nothing.
    """

    fit: NDArray[np.int64]
    stop: NDArray[np.int64]
    test: NDArray[np.int64]
    how: str
    note: str = ""


def finetune(run: RunConfig, network: Embedder, config: FinetuneConfig, say: Say = lambda text: None) -> FinetuneResult:
    """Fine-tune a network on the labelled images of an archive, evaluate it, and write the checkpoint.

    run: how the archive is read; its `output` is not used. network: its network, weights, transform, precision and
    seed. say: called with each message. The same call continues after any stop. Raises NightshiftError and its
    subclasses.
    """
    if network.precision == "float16":
        raise SettingRefused("--precision is float16: fine-tuning computes in bfloat16 or float32; leave it out")
    network.check()
    with _work_folder(config, run) as folder:
        run = replace(_with_columns(run, config), output=str(folder))
        archive_of(run, network).check()
        fits = _fits(config)
        network.prepare()
        return _Finetuning(run, network, config, folder, say, fits).result()


@dataclass
class _Finetuning:
    run: RunConfig
    network: Embedder
    config: FinetuneConfig
    folder: Path
    say: Say
    fits: Callable[[str], bool] | None
    notes: list[str] = field(default_factory=list)

    def result(self) -> FinetuneResult:
        from pipeline.engine import cluster, trainer  # imports Ray, which takes seconds
        from pipeline.engine.interrupts import interruptible
        from pipeline.models.spec import trainable

        with interruptible():
            spec = trainable(self.network.spec)
            cluster.connect()
            gpu = self._uses_gpu(trainer.resources()[1])
            trainer.check(self.config.workers, gpu=gpu)
            images = self._decoded(spec)
            labels = self._labels(images)
            samples = self._samples(images, labels)
            split = split_of(samples, self.config.holdout, self.network.seed)
            self._check_batches(split)
            task, probe = self._task(spec, images, labels, samples, split, gpu)
            result = self._train(task, gpu)
            return self._finish(images, labels, split, task, probe, result)

    def _uses_gpu(self, gpus: int) -> bool:
        if self.config.device == "gpu" and not gpus:
            raise SettingRefused("--device is gpu, and the cluster has no GPU: use --device cpu")
        return self.config.device != "cpu" and gpus > 0

    def _decoded(self, spec: "ModelSpec") -> DecodedImages:
        """The images with the whole resized square, from which crops are cut."""
        self.network.transform = whole_square(spec.transform)
        self.network.takes_tiles = self.network.takes_encoded = False
        images = decode_images(self.run, self.network, self.folder, self.fits, self.say)
        if len(images.failed):
            for row in images.failed.slice(0, MAX_SHOWN).to_pylist():
                self.say(f"error: {row['image_id']}: {row['message']}")
            rate = len(images.failed) / (len(images.failed) + images.rows)
            if rate > self.run.max_error_rate:
                raise TooManyErrors(
                    f"{len(images.failed):,} of {len(images.failed) + images.rows:,} images could not be read or "
                    f"decoded, more than --max-error-rate {self.run.max_error_rate:g}: correct them, or raise the rate"
                )
        return images

    def _labels(self, images: DecodedImages) -> Labels:
        config = self.config
        found = label_files.find(
            images,
            config.labels,
            name_column=config.name_column,
            label_column=config.label_column,
        )
        if text := unknown_text(found, "images of the input"):
            self.notes.append(text)
            self.say(f"warning: {text}")
        if len(found.names) < 2:
            raise InputRefused(
                f"--labels {uris.redact(config.labels)} has one class, {found.names[0]}: label images of two classes "
                "or more"
            )
        return found

    def _samples(self, images: DecodedImages, labels: Labels) -> "Samples":
        """The labelled images without vectors."""
        from pipeline.training.samples import Samples

        index = {name: number for number, name in enumerate(labels.names)}
        targets = np.zeros((len(labels.rows), len(index)), np.float32)
        targets[np.arange(len(targets)), [index[classes[0]] for classes in labels.classes]] = 1
        groups = None
        if self.config.group_by:
            images.require([self.config.group_by])
            values = images.table[self.config.group_by].take(list(labels.rows)).to_pylist()
            groups = np.unique(np.array(values, object).astype(str), return_inverse=True)[1]
        return Samples(np.zeros((len(targets), 0), np.float32), targets, labels.names, labels.image_ids, groups)

    def _check_batches(self, split: Split) -> None:
        least, size = 2 * self.config.workers, self.run.batch_size or BATCH_SIZE
        if size < least:
            raise SettingRefused(
                f"--batch-size is {size}, which is too few for --workers {self.config.workers}: give at least {least}"
            )
        if len(split.fit) < least:
            raise InputRefused(
                f"{len(split.fit)} labelled images are left to train on, too few for --workers {self.config.workers}: "
                f"label at least {least}, or use fewer workers"
            )
        if split.note:
            self.notes.append(split.note)
            self.say(f"warning: {split.note}")

    def _task(
        self,
        spec: "ModelSpec",
        images: DecodedImages,
        labels: Labels,
        samples: "Samples",
        split: Split,
        gpu: bool,
    ) -> "tuple[Task, _Probe]":
        from pipeline.training.fit import class_weights
        from pipeline.training.loop import LoopSettings, Task

        settings = LoopSettings(
            **{name: getattr(self.config, name) for name in OF_SETTINGS[:7]},
            batch_size=self.run.batch_size or BATCH_SIZE,
            seed=self.network.seed,
            precision=self.network.precision,
        )
        features = self._features(spec, images, labels, gpu)
        probe = _Probe.of(replace(samples, vectors=features), split, self.config.class_weights, self.network.seed)
        weights = class_weights(samples.targets[split.fit], self.config.class_weights).astype(np.float32)
        rows = np.array(labels.rows, np.int64)
        identity = [images.fingerprint, spec.sha256, asdict(spec.transform), asdict(settings), labels.classes]
        identity += [spec.model, split.fit.tolist(), rows.tolist(), weights.tolist()]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        task_folder = self.folder / f"training-{name}"
        task_folder.mkdir(exist_ok=True)
        return Task(
            spec,
            images.file,
            images.shape,
            images.dtype,
            rows,
            samples.classes(),
            split.fit,
            split.stop,
            weights,
            probe.start,
            float(np.square(features).sum(axis=1).mean()),
            str(task_folder),
            settings,
        ), probe

    def _features(self, spec: "ModelSpec", images: DecodedImages, labels: Labels, gpu: bool) -> NDArray[np.float32]:
        """Embeddings of the labelled images, computed once."""
        from pipeline.engine import trainer
        from pipeline.training.loop import features_of

        identity = f"{images.fingerprint} {spec.sha256} {spec.seed} {spec.transform} {labels.rows}"
        file = self.folder / f"features-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npy"
        if not file.exists():
            self.say(f"embedding {len(labels.rows):,} labelled images for the linear probe")
            arguments = (spec, images.file, images.shape, images.dtype, labels.rows)
            with open(f"{file}.tmp", "wb") as written:
                np.save(written, trainer.on_worker(features_of, *arguments, gpu=gpu))
            os.replace(f"{file}.tmp", file)
        return np.asarray(np.load(file), np.float32)

    def _train(self, task: "Task", gpu: bool) -> dict[str, Any]:
        import torch

        from pipeline.engine import trainer
        from pipeline.training.loop import RESULT, train

        folder = Path(task.folder)
        shown = len(read_history(folder))
        if shown:
            self.say(f"continues after epoch {shown - 1}")
        else:
            self.say(
                f"training on {len(task.fit):,} images with {counted(self.config.workers, 'worker')}, "
                f"{'GPU' if gpu else 'CPU'}"
            )

        def show() -> None:
            nonlocal shown
            for epoch in read_history(folder)[shown:]:
                self.say(str(epoch))
                shown += 1

        trainer.train(
            train, task, workers=self.config.workers, gpu=gpu, folder=str(folder / "states"), name="states", poll=show
        )
        return dict(torch.load(folder / RESULT, weights_only=True))

    def _finish(
        self,
        images: DecodedImages,
        labels: Labels,
        split: Split,
        task: "Task",
        probe: "_Probe",
        result: dict[str, Any],
    ) -> FinetuneResult:
        """Evaluate the trained network, and write it."""
        from pipeline.models.record import CheckpointRecord, write_checkpoint
        from pipeline.training.evaluate import assess, probabilities
        from pipeline.training.fit import calibrate

        logits, samples = result["logits"].numpy(), probe.samples
        calibration = calibrate(logits[split.stop], samples.targets[split.stop], multi_label=False)
        temperature = calibration.temperature
        before, after = (probabilities(logits[split.test], each, multi_label=False) for each in (1.0, temperature))
        fold = (split.fit, split.test)
        evaluation = assess(samples, [fold], split.how, before, after, probe.choice, temperature_note=calibration.note)
        verdict = compare(evaluation, probe.evaluation)
        history = [Epoch(**each) for each in result["history"]]
        training = {
            **{name: getattr(self.config, name) for name in OF_SETTINGS},
            "batch_size": task.settings.batch_size,
            "seed": self.network.seed,
            "weights": task.spec.weights,
            "weights_sha256": task.spec.sha256,
            "labels": len(labels.rows),
            "best_epoch": max(each.number for each in history if each.is_best),
            "temperature": temperature,
            "accuracy": evaluation.accuracy,
            "probe_accuracy": probe.evaluation.accuracy,
            "nightshift": __version__,
        }
        record = CheckpointRecord(
            task.spec.model, task.spec.transform, labels.names, self._values(images), self.network.input_spec, training
        )
        state = with_temperature(result["state"], task.spec.head, temperature)
        files = self._write(record, images, labels, evaluation, probe.evaluation, temperature, verdict, history)
        write_checkpoint(self.config.to, state, record)
        return FinetuneResult(
            record, evaluation, probe.evaluation, temperature, verdict, (uris.redact(self.config.to), *files)
        )

    def _values(self, images: DecodedImages) -> dict[str, Any]:
        """The settings of the images' numbers that are not the default."""
        given = {name: getattr(images.config, name) for name in VALUES}
        if scale := images.config.scale_range():
            given["scale"] = f"{scale[0]!r}:{scale[1]!r}"
        return {name: value for name, value in given.items() if value != RunConfig.__dataclass_fields__[name].default}

    def _write(
        self,
        record: "CheckpointRecord",
        images: DecodedImages,
        labels: Labels,
        evaluation: "Evaluation",
        probe: "Evaluation",
        temperature: float,
        verdict: str,
        history: list[Epoch],
    ) -> tuple[str, str]:
        """Write the evaluation as JSON and as a page. The checkpoint comes after it."""
        from pipeline.training import page

        base = uris.normalize(self.config.to).removesuffix(SUFFIX)
        content = {
            "model": record.model,
            "transform": asdict(record.transform),
            "training": record.training,
            "verdict": verdict,
            "history": [asdict(each) for each in history],
            "decoded_bytes": images.size_bytes,
            "errors": images.failed.select(["image_id", "stage", "error_type", "message"]).to_pylist(),
            "empty_windows": images.empty,
            "unknown": list(labels.unknown),
            "notes": self.notes,
            **evaluation.to_json(),
            "probe": probe.to_json(),
        }
        access.write(f"{base}.json", json.dumps(content, indent=1).encode())
        seen = jpegs(images, page.shown(evaluation)) if self.config.pictures else {}
        title = f"{base.rpartition('/')[2]}: {len(labels.names)} classes from {len(labels.rows):,} labels"
        summary = f"{record.model} fine-tuned on {images.uri}. {verdict}. {' '.join(self.notes)}"
        of_training = page.Training(history, training_figures(record, images, probe, history))
        text = page.html(title, summary, evaluation, temperature, seen, of_training)
        access.write(f"{base}.html", text.encode())
        shown = uris.redact(self.config.to).removesuffix(SUFFIX)
        return f"{shown}.json", f"{shown}.html"


@dataclass(frozen=True)
class _Probe:
    """A linear probe on the network as it was. samples: with vectors. start: weight and bias for the classifier."""

    samples: "Samples"
    choice: "Choice"
    evaluation: "Evaluation"
    start: tuple[NDArray[np.float32], NDArray[np.float32]]

    @staticmethod
    def of(samples: "Samples", split: Split, class_weights: str, seed: int) -> "_Probe":
        """Fit it to the images to train on, and evaluate it on those that test."""
        from pipeline.training.evaluate import evaluate_folds
        from pipeline.training.fit import FitSettings, choose, fit_rows

        settings = FitSettings("linear", class_weights, seed)
        choice = choose(samples, split.fit, settings)
        evaluation = evaluate_folds(samples, settings, [(split.fit, split.test)], split.how, choice)
        head = fit_rows(replace(samples, normalize=False), split.fit, settings, choice.parameter)
        weight, bias = (head.tensors[name].numpy() for name in ("weight", "bias"))
        return _Probe(samples, choice, evaluation, (weight, bias))


def split_of(samples: "Samples", holdout: float, seed: int) -> Split:
    """Divide labelled images in three, stratified by class and kept by group. Raises InputRefused."""
    from pipeline.training.fit import folds_of

    everything = np.arange(len(samples))
    fitted, left_out = folds_of(samples, everything, round(1 / holdout), seed)[0]
    by_group = "" if samples.groups is None else ", groups kept together"
    try:
        stop, test = folds_of(samples, left_out, 2, seed)[0]
    except InputRefused:
        note = (
            f"{len(left_out)} labels are left out, too few to divide them: they end the training and also test it, so "
            "its figures are too good; add labels, or raise --holdout"
        )
        return Split(fitted, left_out, left_out, f"hold-out of {len(left_out):,} labels{by_group}", note)
    how = f"hold-out of {len(test):,} labels{by_group}, {len(stop):,} others end the training"
    return Split(fitted, stop, test, how)


def whole_square(transform: Transform) -> Transform:
    """The transform without its last cut: the whole square of the short side, a little larger than the crop."""
    return replace(transform, crop=max(transform.resize, transform.crop))


def compare(evaluation: "Evaluation", probe: "Evaluation") -> str:
    """A sentence that says whether fine-tuning beat the linear probe on the same images."""
    ours, theirs = (f"{100 * each.accuracy:.1f} %" for each in (evaluation, probe))
    figures = f"{ours} against {theirs} on {evaluation.images:,} images that neither had seen"
    if evaluation.accuracy > probe.accuracy:
        return f"fine-tuning beat the linear probe: {figures}"
    return f"fine-tuning did not beat the linear probe: {figures}; `nightshift fit` is the better choice here"


def with_temperature(state: Mapping[str, Any], head: str, temperature: float) -> dict[str, Any]:
    """The tensors with the classifier divided by a temperature, so that softmax gives calibrated scores."""
    own = (f"{head}.weight", f"{head}.bias")
    return {name: each / temperature if name in own else each for name, each in state.items()}


def training_figures(
    record: "CheckpointRecord", images: DecodedImages, probe: "Evaluation", history: list[Epoch]
) -> list[tuple[str, str]]:
    """Further figures for the page."""
    more = [f"{labels:,} labels give {100 * accuracy:.1f} %" for labels, accuracy, _ in probe.curve[-2:]]
    return [
        ("linear probe", f"accuracy {100 * probe.accuracy:.1f} %, macro-F1 {100 * probe.macro_f1:.1f} %"),
        ("more labels, linear probe", ", ".join(more)),
        ("epochs", f"{history[-1].number}, the best is {record.training['best_epoch']}"),
        ("images", f"{images.rows:,} decoded, {images.size_bytes / 1e9:.2f} GB; {len(images.failed):,} errors"),
    ]


def jpegs(images: DecodedImages, image_ids: list[str]) -> dict[str, bytes]:
    """JPEGs of decoded images by image_id; none of pixels that are not 8-bit RGB."""
    if images.dtype != "uint8" or images.shape[3] != 3:
        return {}
    pixels = open_pixels(images.file, images.shape, images.dtype)
    wanted, made = set(image_ids), {}
    for row, image_id in enumerate(images.table["image_id"].to_pylist()):
        if image_id in wanted:
            buffer = io.BytesIO()
            picture = Image.fromarray(np.array(pixels[row])).resize((PICTURE_SIDE, PICTURE_SIDE))
            picture.save(buffer, "JPEG", quality=PICTURE_QUALITY)
            made[image_id] = buffer.getvalue()
    return made


def _with_columns(run: RunConfig, config: FinetuneConfig) -> RunConfig:
    """Keep the columns that labels and groups are read from."""
    from pipeline.sources import SOURCES

    own = {*IDENTITY.names, *(column.name for source in SOURCES.values() for column in source.columns)}
    kept = run.keep_names().values()
    names = [config.labels.removeprefix(COLUMN) if config.labels.startswith(COLUMN) else None, config.group_by]
    more = [name for name in names if name and name not in own and name not in kept]
    return replace(run, keep=(*run.keep, *dict.fromkeys(more)))


def _fits(config: FinetuneConfig) -> Callable[[str], bool] | None:
    """Which images a file of labels may name; None for all images. Raises InputRefused and SettingRefused."""
    if config.labels == FOLDER or config.labels.startswith(COLUMN):
        return None
    names = label_files.read_file(config.labels, config.name_column, config.label_column)
    return label_files.matcher(names)


@contextmanager
def _work_folder(config: FinetuneConfig, run: RunConfig) -> Iterator[Path]:
    """A folder of this checkpoint, locked, and removed when all is written. After an error it stays if it has files."""
    identity = json.dumps([uris.normalize(config.to), [uris.redact(each) for each in run.input]])
    name = uris.redact(config.to).rpartition("/")[2].removesuffix(SUFFIX)
    folder = _parent(config) / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"
    _create(folder.parent)
    lock = FileLock(f"{folder}.lock")
    try:
        with lock.acquire(timeout=0):
            try:
                _create(folder)
                yield folder
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                with suppress(OSError):  # it has files from which the next call continues
                    folder.rmdir()
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout as error:
        raise OutputLocked(
            f"another `nightshift finetune` writes {uris.redact(config.to)}: wait until it ends, or choose another --to"
        ) from error


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingRefused(f"--work-dir {folder} cannot be created: {error.strerror}; name another") from error


def _parent(config: FinetuneConfig) -> Path:
    if config.work_dir:
        return Path(uris.normalize(config.work_dir)).absolute()
    from pipeline.models.download import cache_folder

    try:
        return cache_folder("finetune")
    except WeightsRefused as error:
        raise SettingRefused(f"{error}, or name one with --work-dir") from error
