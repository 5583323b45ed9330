"""What every step was and took: a line of log.jsonl, and curves in TensorBoard where that is installed.

tensorboard --logdir OUT/training    # pip install tensorboard
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from weights import whole_file


class Log:
    """Appends to FOLDER/log.jsonl and, beside it, to TensorBoard's events. Goes on after `step`: lines and points of
    later steps go, since these are done again."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trim(folder / "log.jsonl", step)
        self.lines = open(folder / "log.jsonl", "ab", buffering=0)  # noqa: SIM115 (open to the end)
        self.events = event_writer(folder, step)

    def write(self, record: dict[str, float]) -> None:
        """A step's figures by name; "step" is its number."""
        line = json.dumps(record).encode() + b"\n"
        try:
            written = self.lines.write(line)
        except OSError as error:
            raise OSError(f"{self.lines.name}: {error.strerror}") from None
        if written < len(line):
            raise OSError(f"{self.lines.name}: no space left for a whole line")
        if self.events:
            for name in record.keys() - {"step"}:
                self.events.add_scalar(name, record[name], record["step"])

    def close(self) -> None:
        self.lines.close()
        if self.events:
            self.events.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def event_writer(folder: Path, step: int) -> Any:  # noqa: ANN401
    """A SummaryWriter whose events of steps after `step` take the place of former ones; None without TensorBoard.

    Imported only here: it may bring TensorFlow along. One that was built for another NumPy or protobuf raises what is
    no ImportError, and nobody has asked for it.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except (ImportError, AttributeError, TypeError):
        return None
    return SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)


def trim(path: Path, step: int) -> None:
    """Removes the lines after `step`, and a last one that a full disk has cut off."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        with whole_file(path) as partial:
            partial.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def peak_memory(on_gpu: bool) -> int:
    """Bytes: of the GPU, or of the process; 0 where the system does not tell (Windows)."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
