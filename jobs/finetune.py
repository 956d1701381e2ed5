"""Fine-tune a network on labelled images, and write a checkpoint that `classify` applies.

    python jobs/finetune.py --input photos/ --labels folder --model resnet18 --to animals.safetensors
    python jobs/finetune.py --input tiles.tar --labels labels.csv --augment aerial --to fields.safetensors --workers 4
    python jobs/classify.py --input archive/ --output labels/ --weights animals.safetensors

labels.csv has the columns image and label. An image is named by its image_id or by the end of it, such as the file's
name. The classifier is trained first, then all layers, until the hold-out gets no better. Beside the checkpoint, the
evaluation is written as animals.json and animals.html, with that of a linear probe on the same images.

Run the same command again after any stop: it continues from there. Needs `pip install "nightshift[fit]"`.
"""

from collections.abc import Sequence

from pipeline import cli
from pipeline.config import RunConfig
from pipeline.predictors.embed import Embedder
from pipeline.report import messages
from pipeline.report.messages import MessageFlags
from pipeline.training.finetune import FinetuneConfig

CLASSES = (FinetuneConfig, RunConfig, Embedder, MessageFlags)
OF_OTHER_JOBS = {
    *("output", "rows_per_part", "actors", "gpus_per_actor", "overwrite", "update", "cluster", "prices", "dry_run"),
    *("compile", "embedding_dtype"),
}
"""The flags of embed that do not concern a training. They are refused."""


def parser() -> cli.Parser:
    return cli.parser_of(__doc__, CLASSES, OF_OTHER_JOBS)


def main(arguments: Sequence[str] | None = None) -> int:
    def work() -> int:
        values = cli.parsed_by_job("finetune", parser(), CLASSES, OF_OTHER_JOBS, arguments)
        config_values, run_values, network_values, message_values = values
        cli.speak(MessageFlags(**message_values))
        config = FinetuneConfig(**config_values)
        run = RunConfig(**{"output": "unused", **run_values})
        network = Embedder(**network_values)
        from pipeline.training import page  # imports torch and scikit-learn, which takes seconds
        from pipeline.training.finetune import finetune

        result = finetune(run, network, config, messages.say)
        page.show(result.evaluation, result.temperature)
        print(result.verdict)
        for file in result.files:
            messages.say(f"wrote {file}")
        return 0

    return cli.guarded(work)


if __name__ == "__main__":
    cli.leave(main())
