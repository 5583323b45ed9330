"""What is wrong with which clip: one line for each bad one, exit code 2 when there is any.

python -m clips.check DIR
"""

from __future__ import annotations

import argparse
import os
import sys

from clips.clip import Clip, find_clips

# --------------------------------------------------------------------------------------------------------- command line


def check(folder: str | os.PathLike) -> list[str]:
    """One line for every clip of a folder that cannot be read or differs in size from the first readable one."""
    problems, size = [], None
    for path in find_clips(folder):
        try:
            shape = Clip.load(path).rgb.shape
        except ValueError as error:
            problems.append(str(error))
            continue
        size = size or shape
        if shape != size:
            problems.append(f"{path}: [T, H, W, 3] is {list(shape)}, the first clip has {list(size)}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser("python -m clips.check", description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", help="a folder of clips")
    folder = parser.parse_args().folder
    try:
        problems = check(folder)
    except FileNotFoundError as error:
        problems = [str(error)]
    for line in problems:
        print(f"clips.check: {line}", file=sys.stderr)
    if problems:
        sys.exit(2)
    print(f"{folder}: {len(find_clips(folder))} clips, all readable and of one size")


if __name__ == "__main__":
    main()
