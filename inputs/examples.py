"""The shipped examples: for every world a first frame with its ids and depth, and two arrows files.

They lie in demo/examples/WORLD/; demo/make_example.py has made them.
"""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "demo"
ARROWS = ("arrows.json", "arrows_opposite.json")  # the push and its opposite; of driving, two ego motions


def find_example(world: str | None, image: str | None = None, arrows: list[str] | None = None) -> tuple[str, list[str]]:
    """Picture and arrows files of a world's example. Without a world: the image and the arrows that are given, or where
    no image is, the demo's own example. Raises ValueError for an unknown world, or one beside an image."""
    if world is None:
        return (image, arrows or []) if image is not None else (str(DEMO / "example.png"), [str(DEMO / ARROWS[0])])
    if image is not None:
        raise ValueError(f"--example {world}: the image {image} is given, too; expected one of the two")
    folder = DEMO / "examples" / world
    worlds = sorted(path.parent.name for path in DEMO.glob("examples/*/example.png"))
    if world not in worlds:
        raise ValueError(f"--example {world}: expected one of {', '.join(worlds)}")
    return str(folder / "example.png"), [str(folder / name) for name in ARROWS]
