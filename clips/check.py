"""What is wrong with which clip: one line for each bad one, exit code 2 when there is any.

python -m clips.check DIR
"""

from __future__ import annotations

import argparse
import os
import sys

from clips.clip import Clip, clip_header, find_clips
from sources import expand_home

# --------------------------------------------------------------------------------------------------------- command line


def check(folder: str | os.PathLike) -> list[str]:
    """One line for every clip of a folder that cannot be read, or whose pictures are of another size than those of the
    first readable one. Lengths may differ: training takes windows."""
    problems, size = [], None
    for path in find_clips(folder):
        try:
            height, width = Clip.load(path).rgb.shape[1:3]
        except ValueError as error:
            problems.append(str(error))
            continue
        size = size or (width, height)
        if (width, height) != size:
            problems.append(f"{path}: is {width}x{height}, the first clip {size[0]}x{size[1]}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser("python -m clips.check", description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", help="a folder of clips")
    folder = expand_home(parser.parse_args()).folder
    try:
        problems = check(folder)
    except FileNotFoundError as error:
        problems = [str(error)]
    for line in problems:
        print(f"clips.check: {line}", file=sys.stderr)
    if problems:
        sys.exit(2)
    lengths = [clip_header(path)[0][0] for path in find_clips(folder)]
    low, high = min(lengths), max(lengths)
    told = f"{high} frames" if low == high else f"{low} to {high} frames: train with --frames {low} at most"
    print(f"{folder}: {len(lengths)} clips, all readable and of one size, {told}")


if __name__ == "__main__":
    main()
