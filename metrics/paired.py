"""Two rows of a table, compared: the difference of their figures on the same clips, with an interval of its own.

    found = differences(Row([rows_a], [drawn_a]), Row([rows_b], [drawn_b]))     # a minus b, by name

Intervals of two rows may overlap although one is better on nearly every clip: what is hard is hard for both. So clips
are drawn once for both rows (a paired bootstrap), and where a row was trained with several seeds, pairs of seeds are
drawn, too. A row is called better where 95 % of the differences lie on that side of zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from metrics.labels import LABELS
from metrics.motion import Sums, interval_of, resample

Draws = dict[str, tuple[float, np.ndarray, int]]  # by figure: its value, that of every draw of clips [R], clips
SEED_DRAWS = 0  # the seed by which seeds are drawn
FEWEST = 6  # clips that say who is better: that five differences are all on one side is chance in one case of 16


@dataclass
class Row:
    """What a row is compared by, for each seed of its training: figures of every clip, and `Features.draws`."""

    clips: list[list[dict[str, Sums]]]
    distances: list[Draws] = field(default_factory=list)

    def __add__(self, other: Row) -> Row:
        """The same row, trained with more seeds."""
        return Row(self.clips + other.clips, self.distances + other.distances)


def over_seeds(values: np.ndarray, drawn: np.ndarray) -> tuple[float, np.ndarray]:
    """Values [S] of each seed and of every draw of clips [S, R] -> their mean over seeds, and means of drawn seeds."""
    chosen = np.random.default_rng(SEED_DRAWS).integers(len(drawn), size=drawn.shape)
    means = np.take_along_axis(drawn, chosen, axis=0).mean(axis=0)
    return float(values.mean()), means


def average(row: Row) -> dict[str, dict]:
    """Figures of a row by name, in the mean over its seeds: {value, interval, clips}."""
    parts = [resample(clips) | distances for clips, distances in zip(row.clips, row.distances, strict=True)]
    found = {}
    for name in parts[0]:
        value, drawn = over_seeds(*(np.stack([part[name][i] for part in parts]) for i in (0, 1)))
        found[name] = {"value": value, "interval": interval_of(drawn), "clips": parts[0][name][2]}
    return found


def differences(a: Row, b: Row) -> dict[str, dict]:
    """Figures of row a minus those of row b, of the same clips in the same order and the same seeds, by name: {value,
    interval, clips, better}; better is True where a is, False where b is, None where that is open or no matter of good
    and bad. Of a clip only what both rows have counts."""
    seeds = [parts_of(*some) for some in zip(a.clips, b.clips, a.distances, b.distances, strict=True)]
    found = {}
    for name in seeds[0]:
        values = np.array([left[0] - right[0] for left, right in (some[name] for some in seeds)])
        drawn = np.stack([left[1] - right[1] for left, right in (some[name] for some in seeds)])
        clips = seeds[0][name][0][2]
        value, drawn = over_seeds(values, drawn)
        low, high = interval_of(drawn)
        found[name] = {"value": value, "interval": [low, high], "clips": clips, "better": verdict(name, low, high)}
        if clips < FEWEST:  # of so few, every draw may fall on one side
            found[name]["better"] = None
    return found


def parts_of(
    left: list[dict[str, Sums]], right: list[dict[str, Sums]], near: Draws, far: Draws
) -> dict[str, tuple[tuple, tuple]]:
    """By figure that both rows have, what `resample` says of each."""
    both = [a.keys() & b.keys() for a, b in zip(left, right, strict=True)]
    kept = [[{n: row[n] for n in row if n in names} for row, names in zip(rows, both, strict=True)]
            for rows in (left, right)]  # fmt: skip
    a, b = resample(kept[0]) | near, resample(kept[1]) | far
    return {name: (a[name], b[name]) for name in a if name in b}


def verdict(name: str, low: float, high: float) -> bool | None:
    """Whether a difference between `low` and `high` is for the better; None: zero is among them."""
    side = {"↑": 1, "↓": -1}.get(LABELS.get(name, name)[-1])
    if side is None or not (low > 0 or high < 0):
        return None
    return (low > 0) == (side > 0)
