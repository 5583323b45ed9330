"""What the page's server does: one dream at a time, each a process of its own, and the folder that all files lie in.

Nothing of the method is here: a dream is sample.py on the files that the page sent, and what it prints is the progress.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from page.edit import Edit

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "motion-dreamer-page-"
LOCK = "in-use"
INPUTS = ("picture", "arrows.json", "ids.png", "depth.png")  # of a dream, the last two where the page sent them
MOTION = "motion.safetensors"
PANELS = ("flow", "segmentation", "depth", "video")  # mp4 files of sample.py
MOST_KEPT = 12  # dreams of one tab
GONE = 150  # seconds without a word: browsers let a tab in the background speak once a minute
BAR = re.compile(
    r"(?:(\d+)/(\d+) .*, )?stage ([12]): \w+: .*?(\d+)/(\d+) \[[\d:]+<([\d:?]+)"
)  # tqdm, named by sample.py


class Busy(Exception):
    """Another dream runs, or too many are kept."""


@dataclass
class Job:
    """One press of Dream or Paint again: its process, how far it is, and its folder with the inputs and `out`."""

    number: int
    tab: str
    folder: Path
    samples: int
    process: subprocess.Popen
    made: str = ""  # of which motion, edited how: what Stage II alone has painted
    state: str = "running"  # or done, failed
    note: str = ""  # what sample.py says of the picture
    error: str = ""
    progress: dict = field(default_factory=dict)
    last: str = ""  # line that was printed
    results: list[dict] = field(default_factory=list)  # of every sample its `facts`

    def hear(self, line: str) -> None:
        """Takes a line that sample.py printed: a progress bar, what it says of the picture, or an error."""
        if bar := BAR.search(line):
            sample, _, stage, done, total, left = bar.groups()
            numbers = {"sample": sample or 1, "stage": stage, "done": done, "total": total}
            self.progress = {name: int(value) for name, value in numbers.items()} | {"left": left}
        elif line.startswith("picture: "):
            self.note = line.removeprefix("picture: ")
        elif line.strip():
            self.last = line.strip()

    def out(self, sample: int) -> Path:
        """Where sample.py wrote that video."""
        return self.folder / "out" / (f"sample_{sample}" if self.samples > 1 else "")

    def told(self) -> dict:
        """All that the page shows of it, as JSON."""
        names = ("number", "made", "state", "note", "error", "progress", "samples", "results")
        return {name: getattr(self, name) for name in names}


def facts(out: Path) -> dict:
    """Of a folder that sample.py wrote: its panels, settings, and the flow (pixels a frame step) that is the rim of the
    colour wheel."""
    record = json.loads((out / "run.json").read_text())
    found = {name: record[name] for name in ("frames", "fps", "seconds", "seed", "steps")}
    found["panels"] = [name for name in PANELS if (out / f"{name}.mp4").exists()]
    if "flow" in found["panels"]:
        longest = np.hypot(*np.moveaxis(load_file(out / MOTION)["flow"], 2, 0)).max()
        found["rim"] = max(1.0, float(longest))  # as sample.py colours it
    return found


def frames_of(video: Path) -> np.ndarray:
    """An mp4 as uint8 [T, H, W, 3]."""
    return iio.imread(video, plugin="FFMPEG")


def ids_of(out: Path) -> np.ndarray:
    """Of a folder that sample.py wrote: the motion's ids, uint8 [T, H, W]. Raises KeyError where it has none."""
    return load_file(out / MOTION)["segmentation"][0].astype(np.uint8)


def sheet_of(frames: np.ndarray) -> bytes:
    """Frames uint8 [T, H, W] (gray) or [T, H, W, 3] as one PNG, row after row of ceil(sqrt(T)): any browser shows it,
    frame by frame."""
    columns = int(np.ceil(np.sqrt(len(frames))))
    empty = np.zeros((-len(frames) % columns, *frames.shape[1:]), np.uint8)
    rows = np.concatenate([frames, empty]).reshape(-1, columns, *frames.shape[1:])
    picture = BytesIO()
    Image.fromarray(np.concatenate(np.concatenate(rows.swapaxes(0, 1), axis=2), axis=0)).save(picture, "PNG")
    return picture.getvalue()


def without_paths(text: str, ids: bool) -> str:
    """The arrows.json that sample.py gets: what the page sent, with no file but the ids that came along. Raises
    ValueError of one line for another one, for no JSON, and for arrows without ids."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("arrows: not JSON") from None
    if not isinstance(told, dict) or not isinstance(told.get("arrows"), list):
        raise ValueError('arrows: expected {"arrows": [...]}')
    for key, name in (("segmentation", "ids.png"), ("depth", "depth.png")):
        if told.pop(key, name) != name:
            raise ValueError(f"arrows: {key} names a file; expected {name}, sent along")
    if any(isinstance(arrow, dict) and "mask" in arrow for arrow in told["arrows"]):
        raise ValueError("arrows: a mask names a file; expected ids.png, sent along")
    if told["arrows"] and not ids:
        raise ValueError("arrows without ids: mark the objects, and send ids.png along")
    return json.dumps(told | ({"segmentation": "ids.png"} if ids else {}))


class Studio:
    """Jobs, the tabs that look at them, and the folder of both. Its methods may be called from many threads."""

    def __init__(self, folder: Path, model: Path, command: tuple[str, ...] = (sys.executable, "-u", "-m", "page.job")):
        self.folder, self.model, self.command = folder, model, command
        self.jobs: dict[int, Job] = {}
        self.seen: dict[str, float] = {}  # tab -> when it last spoke
        self.lock, self.count = threading.RLock(), 0

    def hear_tab(self, tab: str) -> None:
        self.seen[tab] = time.monotonic()

    def start(self, tab: str, fill: Callable[[Path], None], samples: int, options: list[str], made: str = "") -> Job:
        """Starts a dream in a new folder that `fill` puts the inputs into. Raises Busy."""
        with self.lock:
            if any(job.state == "running" for job in self.jobs.values()):
                raise Busy("another dream is running, in this tab or another: wait for it, or cancel it there")
            if sum(job.tab == tab and job.state != "failed" for job in self.jobs.values()) >= MOST_KEPT:
                raise Busy(f"{MOST_KEPT} dreams are kept already: remove one")
            self.count += 1
            folder = self.folder / str(self.count)
            folder.mkdir()
            try:
                fill(folder)
                process = self.launch(folder, [*options, "--samples", str(samples)])
            except BaseException:
                shutil.rmtree(folder)
                raise
            job = self.jobs[self.count] = Job(self.count, tab, folder, samples, process, made)
        threading.Thread(target=self.follow, args=(job,), daemon=True).start()
        return job

    def paint(self, tab: str, number: int, sample: int, edit: Edit) -> Job:
        """Starts Stage II alone on the edited motion of a finished dream, with the same inputs, seed and steps: what
        differs comes from the edit. Raises Busy, KeyError where there is no such motion, and ValueError of one line for
        an edit that does not fit it."""
        source = self.find(tab, number)
        if not 0 <= sample < len(source.results):
            raise KeyError(sample)
        try:
            motion = edit.apply(load_file(source.out(sample) / MOTION))
        except FileNotFoundError:  # removed just now
            raise KeyError(number) from None

        def fill(folder: Path) -> None:
            self.find(tab, number)  # may be removed meanwhile, but not before this ends
            for name in INPUTS:
                if (source.folder / name).exists():
                    shutil.copy(source.folder / name, folder)
            (folder / "out").mkdir()
            save_file(motion, folder / "out" / MOTION)
            (folder / "edit.json").write_text(edit.to_json())

        settings = source.results[sample]
        options = [f"--seed={settings['seed']}", f"--steps={settings['steps']}", "--stage=2"]
        of = f"Dream {number}, sample {sample + 1}" if source.samples > 1 else f"Dream {number}"
        return self.start(tab, fill, 1, options, f"{of}: {edit.told()}")

    def launch(self, folder: Path, options: list[str]) -> subprocess.Popen:
        depth = ["--depth", "depth.png" if (folder / "depth.png").exists() else "auto"]
        told = ["picture", "arrows.json", "--out", "out", "--model", str(self.model), *depth, *options]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.Popen(
            [*self.command, *told], cwd=folder, env=environment, start_new_session=True, **pipes
        )  # a session of its own: ffmpeg, which it starts, is ended with it

    def follow(self, job: Job) -> None:
        """Reads what the process prints, until it ends."""
        for line in lines_of(job.process.stdout):
            job.hear(line)
        code = job.process.wait()
        with self.lock:
            if job.number not in self.jobs:  # cancelled
                return
            if code == 0:
                job.results = [facts(job.out(i)) for i in range(job.samples)]
                job.state = "done"
                return
            job.error = job.last.removeprefix("sample.py: ") or f"it ended with exit code {code}"
            job.state = "failed"
            shutil.rmtree(job.folder)

    def drop(self, tab: str, number: int | None = None) -> None:
        """Ends and removes a tab's dream, or all of them: when this returns, nothing of it computes any more."""
        with self.lock:
            for job in [job for job in self.jobs.values() if job.tab == tab and number in (None, job.number)]:
                del self.jobs[job.number]
                if job.process.poll() is None:  # else the number may be another process' by now
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()
                job.process.stdin.close()
                shutil.rmtree(job.folder, ignore_errors=True)

    def find(self, tab: str, number: int) -> Job:
        """Raises KeyError."""
        job = self.jobs[number]
        if job.tab != tab:
            raise KeyError(number)
        return job

    def sweep(self) -> None:
        """Drops what belongs to tabs that are gone."""
        for tab in [tab for tab, last in list(self.seen.items()) if time.monotonic() - last > GONE]:
            self.forget(tab)

    def forget(self, tab: str) -> None:
        self.drop(tab)
        self.seen.pop(tab, None)

    def close(self) -> None:
        for tab in {job.tab for job in list(self.jobs.values())}:
            self.drop(tab)

    def packed(self, job: Job) -> Path:
        """A zip of all that went in and came out."""
        path = job.folder / "dream.zip"
        with self.lock:
            if not path.exists():
                files = [file for file in sorted(job.folder.rglob("*")) if file.is_file()]
                with zipfile.ZipFile(path, "w") as archive:
                    for file in files:
                        archive.write(file, file.relative_to(job.folder))
        return path


def lines_of(stream: BytesIO) -> Iterator[str]:
    """Lines that end in a newline, or as those of a progress bar in a carriage return."""
    rest = b""
    while piece := stream.read1(65536):
        *lines, rest = re.split(rb"[\r\n]", rest + piece)
        yield from (line.decode(errors="replace") for line in lines)
    yield rest.decode(errors="replace")


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A temporary folder that is removed at the end; before, those of servers that were killed. A server holds the lock
    of its folder as long as it lives."""
    for old in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), open(old) as file:  # of a living server or another user: stays
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old.parent)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder, open(Path(folder, "new"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.rename(Path(folder, "new"), Path(folder, LOCK))  # nobody sees it unlocked
        yield Path(folder)
