"""Shows the first exception of a predictor on the screen; all of them are in `_errors/`."""

from collections.abc import Callable

from pipeline.errors import OutputRefused, PredictError
from pipeline.output.commit import Commit
from pipeline.output.parts import read_committed
from pipeline.report import messages

FAILED = f"{PredictError.stage}/failed"


def show_first_failure(output: str) -> Callable[[Commit], None]:
    """A function to call with each commit of a run."""
    is_shown = False

    def see(commit: Commit) -> None:
        nonlocal is_shown
        if is_shown or FAILED not in commit.errors_by_type:
            return
        is_shown = True
        try:
            table = read_committed(output, str(commit.errors_part), ["image_id", "stage", "error_type", "message"])
        except (OSError, OutputRefused):  # the errors are shown by the report at the end
            return
        failed = [row for row in table.to_pylist() if f"{row['stage']}/{row['error_type']}" == FAILED]
        for row in failed[:1]:
            messages.error(f"predict() failed for {row['image_id']}: {row['message']}; see _errors/ for all failures")

    return see
