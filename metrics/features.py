"""What the Frechet distances of a set of clips are made of: which features of which map, clip by clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from metrics import frechet
from metrics.frechet import I3D, distance_draws, random_features, set_distance, tracked_features
from metrics.motion import Maps, interval_of
from metrics.physics import Scene
from metrics.trackers import Pips, chain_flow, lucas_kanade

Extractor = tuple[str, Callable[[Tensor], Tensor]]  # the map that it looks at, and the features [M, D] of one clip


def extractors_of(
    groups: Sequence[str], trackers: Sequence[str], i3d: str | None, pips: str | None, device: str
) -> dict[str, list[Extractor]]:
    """By the name that is printed; of several extractors (random networks), the distances are averaged.

    groups: "fvd", "fvmd" or both. i3d: weights of FVD's network, without which there are only the stand-ins. trackers
    of FVMD: "lk", "pips" (weights: pips), "flow"."""
    found: dict[str, list[Extractor]] = {}
    if "fvd" in groups:
        if i3d:
            network = I3D(i3d, device)
            found[f"FVD (I3D {network.sha256[:8]}, 224x224) ↓"] = [("rgb_own", network)]
        for name, motion in (("rfvd_app (not FVD) ↓", False), ("rfvd_mot (not FVD) ↓", True)):
            found[name] = [("rgb_own", partial(random_features, seed=seed, motion=motion)) for seed in range(3)]
    if "fvmd" in groups:
        if "lk" in trackers:
            found["FVMD (Lucas-Kanade) ↓"] = [("rgb_own", partial(tracked_features, lucas_kanade))]
        if "pips" in trackers:
            track = partial(tracked_features, Pips.load(pips, device), enlarge=True)
            found["FVMD (PIPs++) ↓"] = [("rgb_own", track)]
        if "flow" in trackers:
            found["FVMD (chained flow) ↓"] = [("flow", partial(tracked_features, chain_flow))]
    return found


def check_sets(groups: Sequence[str], clips: int, frames: int, data: str) -> None:
    """Raises ValueError where Frechet distances are asked of too few clips, or FVMD of clips that are too short."""
    asked = [name for name in groups if name in ("fvd", "fvmd")]
    if asked and clips < frechet.FEWEST:
        needs = f"a Frechet distance (--metrics {','.join(asked)}) needs {frechet.FEWEST} at least"
        raise ValueError(f"{data}: measured are {clips} clips, {needs}")
    if "fvmd" in asked and frames < frechet.WINDOW:
        raise ValueError(f"{data}: clips have {frames} frames, FVMD (--metrics fvmd) needs {frechet.WINDOW}")


class Features:
    """Features of clips by name and source, and the Frechet distances between their sets."""

    def __init__(self, extractors: dict[str, list[Extractor]], exact: Callable[[Scene], Tensor] | None = None) -> None:
        """exact: FVMD's features of a scene by a perfect tracker of the truth, against which the others are checked."""
        self.extractors, self.exact, self.found, self.drawn = extractors, exact, {}, {}

    def add(self, source: str, maps: Maps, scene: Scene) -> None:
        self.found.setdefault("clips", {}).setdefault(source, []).append(scene and scene.path)
        for name, several in self.extractors.items():
            for k, (modality, extract) in enumerate(several):
                if modality in maps:
                    self.found.setdefault((name, k), {}).setdefault(source, []).append(extract(maps[modality]))
        if self.exact and source == "truth":
            self.found.setdefault("exact", {}).setdefault("truth", []).append(self.exact(scene))

    def distances(self, source: str) -> dict[str, dict]:
        """Distance of a source's set from the truth's; of "half", the floor: of one half of the truth from the other,
        and of each tracker's tracks of the truth from exact ones."""
        half, figures = source == "half", {}
        for name, (value, drawn, clips) in self.draws("truth" if half else source, half).items():
            figures[name] = {"value": value, "interval": interval_of(drawn), "clips": clips}
        for name in self.extractors if half and self.exact else ():
            if name.startswith("FVMD"):
                pair = (self.found[(name, 0)]["truth"], self.found["exact"]["truth"])
                figures[f"{name[:-2]}: its tracks of the truth against exact tracks ↓"] = set_distance([pair])
        return figures

    def draws(self, source: str, halves: bool = False) -> dict[str, tuple[float, np.ndarray, int]]:
        """`distance_draws` of a source's set from the truth's of the same clips (some have no twin), by name; each is
        computed once."""
        clips, own = (self.found.get("clips", {}).get(of, []) for of in ("truth", source))
        same = range(len(own)) if len(own) == len(clips) else [clips.index(clip) for clip in own]
        for name, several in self.extractors.items():
            parts = [self.found.get((name, k), {}) for k in range(len(several))]
            if (source, halves, name) not in self.drawn and all(source in part for part in parts):
                pairs = [(part[source], [part["truth"][i] for i in same]) for part in parts]
                ddof, scaled = 0 if name.startswith("FVD") else 1, name.startswith("rfvd")  # FVD's covariance is over N
                self.drawn[source, halves, name] = distance_draws(pairs, halves, ddof, scaled)
        return {key[2]: drawn for key, drawn in self.drawn.items() if key[:2] == (source, halves)}
