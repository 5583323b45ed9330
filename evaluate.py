"""Measures a model folder on held-out clips and prints the figures, and the paper's Tables 1 and 3 (section 4).

    python evaluate.py --model demo --data data/val                                   # the figures of the demo model
    python evaluate.py --model demo --data data/val --metrics physics,fvd,fvmd,demo --clips 50
    python evaluate.py --table 1 --data data/train --val data/val --steps 10000       # trains what is missing

A figure never stands alone. Beside the model's stand those of "still" (nothing moves: ids, depth and picture of the
first frame repeated, flow 0), of "codec" (the truth through the VAE and back: no model with this VAE can do better),
of "twin" (the scene simulated again with what no picture shows redrawn: nobody can be better for a reason) and of
"truth" (what the measure itself says of perfect motion). Brackets are 95 % bootstrap intervals over clips. Clips of
several scenarios have figures by scenario, and their mean.

The model is told what a user would tell it: first frame, its ids and depth, and one arrow: the instance flow of the
object that was pushed. A careless user marks no other object: --marked pushed. The clips' own truth comes from
clips.simulate, which also says what another push would have done; of other clips, as those of clips.annotate and
clips.physion, figures that need what they lack are left out, which is said below the table.

The measures themselves are in metrics/, what samples a model in training/sampler.py, what trains the rows of a table
in training/tables.py. `Maps` are flow [T, 2, H, W], segmentation [T, H, W], depth [T, H, W] and rgb [T, 3, H, W] of one
clip, by the names of `Clip.tensors`.
"""

from __future__ import annotations

import kernels.threads  # noqa: F401 (before torch)

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import metrics
from clips import Clip, ClipDataset
from metrics import COLUMNS, LABELS, Features, Maps, Scene, Sums, cell, extractors_of, frozen, line, markdown
from motion_dreamer import StageConfig
from show import written_whole
from training.sampler import PUSHES, Model, Sampler
from training.scenes import STRONGER, add_other_pushes, add_twin, truth_of
from training.tables import TABLES, train_row


def exact_features(scene: Scene) -> Tensor:
    """FVMD's features [1, 1024] of the simulator's own tracks in the first window: a perfect tracker of the truth."""
    from clips.simulate import tracks  # needs mujoco, which nothing else here does

    if not scene.meta["arrow"].keys() >= metrics.HIT_TRUTH:
        raise ValueError(f"{scene.path}: is not from clips.simulate, whose exact tracks --trackers exact needs")
    clip = Clip.load(scene.path, 0, metrics.WINDOW)
    return metrics.tracked_features(
        lambda video, points: torch.from_numpy(tracks(clip, points.double().numpy())), scene.truth["arrow"]["rgb"].cpu()
    )[:1]


# -------------------------------------------------------------------------------------------------------- measuring

BESIDE = ("still", "codec", "twin", "truth")  # what stands beside the model's figures
Views = dict[str, Maps]  # what one source shows of a scene, by push
Rows = dict[str, list[dict[str, Sums]]]  # by source, figures of every clip


def views_of(scenes: list[Scene], sampler: Sampler, pushes: tuple[str, ...], alone: bool) -> dict[str, list[Views]]:
    """What the model, and unless it is measured alone "still", "codec", "truth" and "twin" (if there is one) show of
    each scene."""
    model = generated(scenes, sampler, pushes, 0)
    if alone:
        return {"model": model}
    truth = [{push: scene.truth[push] for push in pushes} for scene in scenes]
    still = [{push: frozen(maps) for push, maps in views.items()} for views in truth]
    codec = {push: sampler.make(scenes, f"codec/{push}") for push in pushes}
    codec = [{push: codec[push][i] for push in pushes} for i in range(len(scenes))]
    for i, scene in enumerate(scenes):  # their video is their own, and shows the true ids, or what the model says
        told = {"told": scene.truth["arrow"]["segmentation"]}
        for views, ids in ((truth[i], told), (codec[i], told), (still[i], {"told": model[i]["arrow"].get("told")})):
            views["arrow"] = views["arrow"] | {"rgb_own": views["arrow"]["rgb"]} | ids
    twins = [twin_of(scene) for scene in scenes]
    return {"model": model, "truth": truth, "still": still, "codec": codec, "twin": twins}


def twin_of(scene: Scene) -> Views:
    """Its video is its own: nobody tells it the true motion."""
    if "twin" not in scene.truth:
        return {}
    twin = dict(scene.truth["twin"])
    other = {"opposite": scene.truth["twin_opposite"]} if "twin_opposite" in scene.truth else {}
    return {"arrow": twin | {"rgb_own": twin.pop("rgb"), "told": twin["segmentation"]}} | other


def generated(scenes: list[Scene], sampler: Sampler, pushes: tuple[str, ...], seed: int) -> list[Views]:
    """What the model shows of each scene; "told" are the ids that its Stage II was told, None without them."""
    motions = {push: sampler.make(scenes, push, seed) for push in pushes if sampler.can_tell(push)}
    videos = [sampler.make(scenes, kind, seed) for kind in sampler.videos]
    views = [{push: made[i] for push, made in motions.items()} for i in range(len(scenes))]
    for i, view in enumerate(views):
        view["arrow"] = view.get("arrow", {}) | {name: maps for video in videos for name, maps in video[i].items()}
        view["arrow"]["told"] = view["arrow"].get("segmentation")
    return views


def measure(
    scenes: list[Scene], sampler: Sampler, arguments: argparse.Namespace, features: Features, alone: bool
) -> Rows:
    """Figures of scenes that know the same pushes, by source; the features of their videos go into `features`."""
    pushes = tuple(push for push in PUSHES if push in scenes[0].truth)
    sources, rows = views_of(scenes, sampler, pushes, alone), {}
    for name, seen in sources.items():
        rows[name] = [figures_of(views, scene, arguments.metrics) for views, scene in zip(seen, scenes, strict=True)]
        for views, scene in zip(seen, scenes, strict=True):
            features.add(name, views.get("arrow", {}), scene)
    if arguments.samples > 1:
        more = (generated(scenes, sampler, pushes, seed) for seed in range(1, arguments.samples))
        tries = list(zip(scenes, sources["model"], *more, strict=True))
        best = [(scene, min(several, key=lambda views: error_of(views, scene))) for scene, *several in tries]
        rows[f"best of {arguments.samples}"] = [figures_of(views, scene, arguments.metrics) for scene, views in best]
        several = ([figures_of(views, scene, arguments.metrics) for views in seen] for scene, *seen in tries)
        rows["model"] = [added(figures) for figures in several]
    return rows


def figures_of(views: Views, scene: Scene, groups: list[str]) -> dict[str, Sums]:
    if not views:
        return {}
    figures = metrics.physics_figures(views, scene) if "physics" in groups else {}
    return figures | (metrics.demo_figures(views, scene) if "demo" in groups else {})


def added(figures: Sequence[dict[str, Sums]]) -> dict[str, Sums]:
    """Several samples of one clip count together."""
    return {name: tuple(np.sum([f[name] for f in figures if name in f], axis=0)) for f in figures for name in f}


def error_of(views: Views, scene: Scene) -> tuple[float, ...]:
    """By which the best of several samples is chosen: the error of its flow where the truth moves, then everywhere; if
    the model has no flow, that of its video."""
    made, true = views["arrow"], scene.truth["arrow"]
    if "flow" in made:
        error = metrics.flow_error(made["flow"], true["flow"])
        return error["epe_moving"][0], error["epe_all"][0]
    return (-metrics.psnr(made["rgb_own"], true["rgb"]),)


# ------------------------------------------------------------------------------------------------------- one model


def evaluate(arguments: argparse.Namespace, folder: Path, shared: dict | None = None) -> dict:
    """All figures of one model folder: {"figures": {source: {name: {value, interval, clips}}}, "settings": ...}.

    `shared` is filled with what does not depend on the model (figures and features of "still", "codec" and "truth"),
    or if it is filled already, for the same clips and VAE, spares measuring that again."""
    started, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    model = Model.load(folder, device)
    frames, clips = model.stage2.config.frames, clips_of(arguments, model.stage2.config)
    paths = clips.paths[: arguments.clips]
    sampler = sampler_of(arguments, model)
    features, rows, shared = features_of(arguments, device), {}, {} if shared is None else shared
    scenarios, lacking = [], Counter()  # of every clip
    if alone := bool(shared):
        rows, features.found = dict(shared["rows"]), {key: dict(found) for key, found in shared["features"].items()}

    # A batch of clips at a time: what is true, what the model makes of it, and how far they differ.
    for i in tqdm(range(0, len(paths), arguments.batch), folder.name, unit="batch", disable=arguments.quiet):
        scenes = [truth_of(path, frames, device, arguments.marked) for path in paths[i : i + arguments.batch]]
        scenarios += [str(scene.meta["arrow"].get("scenario", "unnamed")) for scene in scenes]
        lacking.update(name for scene in scenes for name in scene.lacks(arguments.metrics))
        for scene in scenes if "demo" in arguments.metrics else []:
            add_other_pushes(scene, sampler.cache, device)
        for scene in [] if alone else scenes:
            add_twin(scene, sampler.cache, device, arguments.marked)
        for _, some in groupby(scenes, lambda scene: "opposite" in scene.truth):
            for source, found in measure(list(some), sampler, arguments, features, alone).items():
                rows.setdefault(source, []).extend(found)
    if not alone:
        shared["rows"] = {source: found for source, found in rows.items() if source in BESIDE}
        shared["features"] = {key: {s: f[s] for s in BESIDE if s in f} for key, f in features.found.items()}

    order = ["model", *sorted(rows.keys() - {"model", *BESIDE}), *BESIDE]
    figures = {source: metrics.summarise(rows[source]) | features.distances(source) for source in order}
    settings = vars(arguments) | {
        "model": str(folder), "weights": model.identity()[0], "frames": frames, "size": [clips.width, clips.height],
        "clips": len(paths), "first_clip": paths[0].name, "last_clip": paths[-1].name, "device": device,
        "torch": torch.__version__, "seconds": round(time.perf_counter() - started, 1), "rules": rules(),
        "lacking": dict(lacking),
    }  # fmt: skip
    return {
        "figures": figures,
        "scenarios": metrics.by_scenario({source: rows[source] for source in order}, scenarios),
        "settings": settings,
    }


def clips_of(arguments: argparse.Namespace, config: StageConfig) -> ClipDataset:
    """Raises ValueError when the model cannot take clips of this length or size."""
    clips = ClipDataset(arguments.val, config.frames)
    if clips.height % config.vae_factor or clips.width % config.vae_factor:
        size = f"{clips.width}x{clips.height}"
        raise ValueError(f"{arguments.val}: clips are {size}, not a multiple of {config.vae_factor}")
    return clips


def sampler_of(arguments: argparse.Namespace, model: Model) -> Sampler:
    cache = Path(arguments.cache or Path(arguments.val) / ".cache") / "evaluate"
    names = ("sampling_steps", "guidance", "seed", "batch", "marked")
    videos = ("rgb", "rgb_own") if "demo" in arguments.metrics else ("rgb_own",)
    return Sampler(model, cache, {name: getattr(arguments, name) for name in names}, videos, arguments.quiet)


def features_of(arguments: argparse.Namespace, device: str) -> Features:
    extractors = extractors_of(arguments.metrics, arguments.trackers, arguments.i3d, arguments.pips, device)
    return Features(extractors, exact_features if "exact" in arguments.trackers else None)


def rules() -> dict[str, float]:
    """What the measures count by, from the modules that use it."""
    of = {metrics.motion: ("MOVING", "RESAMPLES"), metrics.frechet: ("SET_RESAMPLES",)}
    of[metrics.physics] = ("TILT", "HEIGHT", "RIGHT_WAY", "HIT", "SHOWN", "APART")
    return {name: getattr(module, name) for module, names in of.items() for name in names} | {"STRONGER": STRONGER}


def footnote(settings: dict) -> str:
    size = "x".join(map(str, settings["size"]))
    return (
        f"{settings['clips']} clips of {settings['val']}, {settings['frames']} frames of {size}, stride 1; "
        f"{settings['sampling_steps']} sampling steps, guidance {settings['guidance']}, seed {settings['seed']}; "
        f"objects marked: {settings['marked']}; "
        f"weights {settings['weights']}. Covariances: FVD over N, others over N - 1; nothing is added. "
        f"{metrics.left_out(settings['lacking'])}"
    ).strip()


# ---------------------------------------------------------------------------------------------- the paper's tables

SHOWN = ("hit_video", "fallen_video", "hit", "epe_relative", "iou_last")  # beside Frechet distances


def table(arguments: argparse.Namespace) -> tuple[str, dict]:
    """Our rows beside the paper's: Markdown, and the figures of every row."""
    arguments.metrics, shared, rows = ["fvd", "fvmd", "physics"], {}, TABLES[arguments.table]
    results = {row: evaluate(arguments, train_row(row, arguments), shared) for row in rows}
    some = next(iter(results.values()))
    names = [n for n in some["figures"]["still"] if n in SHOWN or n.startswith(("FV", "rfvd"))]
    lines = [line(["method", "paper: FVD ↓", "paper: FVMD ↓", *(LABELS.get(n, n) for n in names)])]
    lines.append("|---" * (len(names) + 3) + "|")
    told = [
        ([label, str(fvd), str(fvmd)], results[row]["figures"]["model"]) for row, (label, fvd, fvmd) in rows.items()
    ]
    told += [([COLUMNS[source], "", ""], some["figures"][source]) for source in BESIDE]
    lines += [line([*first, *(cell(figures.get(n)) for n in names)]) for first, figures in told]
    ours = f"Ours: preset {arguments.preset}, {arguments.steps} steps a stage; {footnote(some['settings'])}"
    return "\n".join([*lines, "", f"{ours} The paper: SVD's size, Physion. Only the order of rows compares."]), results


# ---------------------------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_argument_group("what is measured").add_argument
    what("--model", metavar="DIR", help="model folder")
    what("--table", type=int, choices=list(TABLES), help="train and compare the rows of a table instead")
    what("--data", required=True, metavar="DIR", help="held-out clips; with --table, clips to train on")
    what("--val", metavar="DIR", help="held-out clips for --table")
    what("--metrics", default="physics,demo", help="some of physics,fvd,fvmd,demo (default %(default)s)")
    what("--clips", type=int, default=200, help="at most (default %(default)s)")
    what("--samples", type=int, default=1, help="of a clip: their mean, and the best of them (default %(default)s)")
    alone = "pushed: that one alone, and figures of objects count no other (default %(default)s)"
    what("--marked", choices=("all", "pushed"), default="all", help=f"objects that the model is shown; {alone}")
    what("--i3d", metavar="FILE_OR_REPO", help="i3d_torchscript.pt or a hub id that has it: adds FVD")
    some = "some of lk,flow,pips,exact (exact checks the others; default %(default)s)"
    what("--trackers", default="lk,flow", help=f"of FVMD: {some}")
    what(
        "--pips", metavar="FILE", default="pips2_weights.pth", help="weights of the tracker pips (default %(default)s)"
    )
    how = parser.add_argument_group("how").add_argument
    how("--sampling-steps", type=int, default=10, help="of each stage (default %(default)s)")
    how("--guidance", type=float, nargs=2, default=[1.0, 1.0], metavar=("FIRST", "LAST"), help="default 1 1: none")
    how("--batch", type=int, default=8, help="clips that are sampled together (default %(default)s)")
    how("--seed", type=int, default=0, help="of the noise, and of training (default %(default)s)")
    how("--cache", metavar="DIR", help="where samples are kept; default: in the data folder")
    how("--json", default="evaluation.json", metavar="FILE", help="figures and settings (default %(default)s)")
    how("--quiet", action="store_true", help="no progress bar")
    rows = parser.add_argument_group("training of --table").add_argument
    rows("--steps", type=int, default=3000, help="of training, for each stage (default %(default)s)")
    rows("--train-batch", type=int, default=8, help="clips a step (default %(default)s)")
    rows("--preset", default="tiny", help="of train.py: size of the models (default %(default)s)")
    rows("--precision", choices=("fp32", "bf16"), help="of training; default: that of train.py")
    rows("--codec", metavar="DIR", help="VAE and image tower of this model folder; else they are trained")
    rows("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of (Small)StageConfig, in all rows")
    rows("--runs", default="runs/table", metavar="DIR", help="where its models are kept (default %(default)s)")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    for name, known in (("metrics", "physics,fvd,fvmd,demo"), ("trackers", "lk,flow,pips,exact")):
        setattr(arguments, name, getattr(arguments, name).split(","))
        if unknown := set(getattr(arguments, name)) - set(known.split(",")):
            raise ValueError(f"--{name} {','.join(sorted(unknown))}: expected some of {known}")
    counts = ("clips", "samples", "sampling_steps", "batch", "train_batch", "steps")
    if min(getattr(arguments, name) for name in counts) < 1:
        raise ValueError(f"--{', --'.join(counts).replace('_', '-')}: expected 1 at least")
    path = Path(arguments.json)
    if not path.parent.is_dir():
        raise ValueError(f"--json {path}: there is no folder {path.parent}")
    if arguments.table:
        if not arguments.val:
            raise ValueError("--table needs --val, clips that were not trained on")
        text, result = table(arguments)
    else:
        if not arguments.model:
            raise ValueError("expected --model DIR or --table 1 or 3")
        arguments.val = arguments.data
        result = evaluate(arguments, Path(arguments.model))
        scenarios = metrics.scenario_tables(result["scenarios"]) if len(result["scenarios"]) > 2 else []
        text = "\n\n".join([*scenarios, markdown(result["figures"]), footnote(result["settings"])])
    result = json.loads(json.dumps(result), parse_constant=lambda _: None)  # JSON has no NaN
    written_whole(path, lambda partial: partial.write_text(json.dumps(result, indent=1) + "\n"))
    print(text)


def main() -> None:
    try:
        run(parse_arguments())
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
