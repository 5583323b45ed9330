"""Measures a model folder on held-out clips and prints the figures; the paper's Tables 1 to 3 (section 4); and videos
that any other model made of the same clips.

    python evaluate.py --model demo --data data/val                                   # the figures of the demo model
    python evaluate.py --model demo --data data/val --metrics physics,fvd,fvmd,demo --clips 50 --json figures.json
    python evaluate.py --table 1 --data data/train --val data/val --runs runs/table   # trains what is missing
    python evaluate.py --table 2 --data DRIVES --val data/val --runs runs/svd --init SVD --dry-run    # at paper's scale
    python evaluate.py --leave-out drop --data data/train --val data/val --runs runs/unseen    # a world never seen
    python evaluate.py --export-prompts prompts --data data/val                       # what another model is told
    python evaluate.py --videos a=out/a b=out/b --data data/val                       # what it made of that

A figure never stands alone. Beside the model's stand those of "still" (nothing moves: ids, depth and picture of the
first frame repeated, flow 0), of "codec" (the truth through the VAE and back: no model with this VAE can do better),
of "twin" (the scene simulated again with what no picture shows redrawn: nobody can be better for a reason) and of
"truth" (what the measure itself says of perfect motion: full marks, since nothing is asked that a measure cannot tell
of it); of Frechet distances, which are larger between fewer clips, also "half of the truth and the other". Brackets are
95 % bootstrap intervals over clips. Clips of several scenarios have figures by scenario, and their mean.

The model is told what a user would tell it: first frame, its ids and depth, and one arrow: the instance flow of the
object that was pushed. A careless user marks no other object: --marked pushed. The clips' own truth comes from
clips.simulate, which also says what another push would have done; of other clips, as those of clips.annotate and
clips.physion, figures that need what they lack are left out, which is said below the table.

Videos have the figures that a video allows, by the rules in metrics/videos.py. Two rows are compared by their
difference on the same clips, which has an interval of its own (metrics/paired.py).

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
from metrics import Features, Maps, Row, Scene, Sums, extractors_of, frozen, markdown
from motion_dreamer import StageConfig
from show import written_whole
from sources import expand_home
from training import tables
from training.prompts import export_prompts
from training.sampler import PUSHES, Model, Sampler
from training.scenes import STRONGER, add_other_pushes, add_twin, exact_features, first_of, truth_of, twin_of
from training.tables import TABLES, arguments_of, table_text, train_row

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
    """All figures of one model folder: {"figures": {source: {name: {value, interval, clips}}}, "settings": ..., "row":
    what other rows are compared with}.

    `shared` is filled with what does not depend on the model (figures and features of "still", "codec" and "truth"),
    or if it is filled already, for the same clips and VAE, spares measuring that again."""
    started, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    model = Model.load(folder, device, half=device == "cuda")
    frames, clips = model.stage2.config.frames, clips_of(arguments, model.stage2.config)
    paths = first_of(clips.paths, arguments.clips)
    sampler = sampler_of(arguments, model)
    metrics.check_sets(arguments.metrics, len(paths), frames, arguments.val)
    features, rows, shared = features_of(arguments, device), {}, {} if shared is None else shared
    scenarios, lacking = [], Counter()  # of every clip
    if alone := bool(shared):
        rows, features.found = dict(shared["rows"]), {key: dict(found) for key, found in shared["features"].items()}

    # A batch of clips at a time: what is true, what the model makes of it, and how far they differ.
    bar = tqdm(total=len(paths), desc=folder.name, unit="clip", disable=arguments.quiet)
    for i in range(0, len(paths), arguments.batch):
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
        bar.update(len(scenes))
    bar.close()
    if not alone:
        shared["rows"] = {source: found for source, found in rows.items() if source in BESIDE}
        shared["features"] = {key: {s: f[s] for s in BESIDE if s in f} for key, f in features.found.items()}

    order = ["model", *sorted(rows.keys() - {"model", *BESIDE}), *BESIDE]
    figures = {source: metrics.summarise(rows[source]) | features.distances(source) for source in order}
    figures |= {"half": half} if (half := features.distances("half")) else {}
    settings = settings_of(arguments, paths) | {
        "model": str(folder), "weights": model.identity()[0], "frames": frames, "size": [clips.width, clips.height],
        "device": device, "seconds": round(time.perf_counter() - started, 1), "lacking": dict(lacking),
    }  # fmt: skip
    return {
        "figures": figures,
        "scenarios": metrics.by_scenario({source: rows[source] for source in order}, scenarios),
        "settings": settings,
        "row": Row([rows["model"]], [features.draws("model")]),
    }


def settings_of(arguments: argparse.Namespace, paths: list[Path]) -> dict:
    clips = {"clips": len(paths), "first_clip": paths[0].name, "last_clip": paths[-1].name}
    return vars(arguments) | clips | {"torch": torch.__version__, "rules": rules()}


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
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {"told": arguments.told} if arguments.told != "arrow" else {}  # samples of an arrow keep their names
    return Sampler(model, cache, settings, videos, arguments.quiet)


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
        f"objects marked: {settings['marked']}; told of motion: {settings['told']}; "
        f"weights {settings['weights']}. Covariances: FVD over N, others over N - 1; nothing is added. "
        f"{metrics.left_out(settings['lacking'])}"
    ).strip()


# ------------------------------------------------------------------------------------------------ tables, and videos


def table(arguments: argparse.Namespace) -> tuple[str, dict]:
    """Our rows beside the paper's: Markdown, and the figures of every row, by seed. With --init instead, the commands
    that train them from SVD's weights."""
    if arguments.init:
        return tables.commands_of(arguments), {}
    held_out = ClipDataset(arguments.val)
    unseen = (arguments.leave_out, arguments.data, arguments.val)
    count = len(tables.leave_out(*unseen)["only"] if arguments.leave_out else held_out)
    metrics.check_sets(arguments.metrics, min(count, arguments.clips), held_out.frames, arguments.val)
    if arguments.leave_out:
        tables.link_clips(*unseen, arguments.runs)
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    shared: list[dict] = [{} for _ in seeds]
    results: dict[str, list[dict]] = {row: [] for row in tables.rows_of(arguments)}
    for row, several in results.items():
        for seed, known in zip(seeds, shared, strict=True):
            some = arguments_of(row, seed, arguments)
            several.append(evaluate(some, train_row(tables.model_of(row), some), known))
    rows = {row: sum((found["row"] for found in several[1:]), several[0]["row"]) for row, several in results.items()}
    first = tables.reference(arguments)
    found = {row: metrics.differences(rows[row], rows[first]) for row in rows if row != first}
    some = next(iter(results.values()))[0]
    means = {row: metrics.average(rows[row]) for row in rows}
    trained = f"{arguments.minutes:g} minutes" if arguments.minutes else f"{arguments.steps} steps"
    told = f"preset {arguments.preset}, {trained} a stage, trainings: {arguments.seeds}; {footnote(some['settings'])}"
    text = table_text(arguments, means, found, some["figures"], f"Ours: {told}")
    return text, {"rows": results, "means": means, "differences": found}


def evaluate_videos(arguments: argparse.Namespace) -> tuple[str, dict]:
    """Videos of any models, a folder a row: Markdown, and {"figures": ..., "differences": from the first row}."""
    started, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    folders, clips = metrics.named_folders(arguments.videos), ClipDataset(arguments.data, arguments.frames)
    paths = first_of(clips.paths, arguments.clips)
    metrics.check_sets(arguments.metrics, len(paths), clips.frames, arguments.data)
    videos = {name: metrics.videos_of(folder, [path.stem for path in paths]) for name, folder in folders.items()}
    size = (clips.height, clips.width)

    def read(k: int, fps: float) -> dict[str, Tensor]:
        parts = {name: some[k] for name, some in videos.items()}
        return {n: metrics.read_fitted(path, clips.frames, fps, size, arguments.stretch) for n, path in parts.items()}

    for k, path in enumerate(tqdm(paths, "reading", unit="clip", disable=arguments.quiet)):
        read(k, Clip.load(path, 0, 1).fps)  # what is refused is refused now, not after an hour
    features, rows = features_of(arguments, device), {name: [] for name in [*folders, "still", "truth"]}
    for k, path in enumerate(tqdm(paths, "measuring", unit="clip", disable=arguments.quiet)):
        scene = truth_of(path, clips.frames, device)
        true, seen = scene.truth["arrow"]["rgb"], read(k, scene.truth["arrow"]["fps"].item())
        for name, video in (seen | {"still": true[:1].expand_as(true), "truth": true}).items():
            video = video.to(device)
            rows[name].append(metrics.video_figures(video, scene) if "physics" in arguments.metrics else {})
            features.add(name, {"rgb_own": video}, scene)
    compared = {name: Row([some], [features.draws(name)]) for name, some in rows.items()}
    figures = {name: metrics.average(row) for name, row in compared.items()}
    figures |= {"half": half} if (half := features.distances("half")) else {}
    first, *others = folders
    found = {f"{name} - {first}": metrics.differences(compared[name], compared[first]) for name in others}
    made = {"frames": clips.frames, "size": [clips.width, clips.height], "device": device}
    settings = settings_of(arguments, paths) | made | {"seconds": round(time.perf_counter() - started, 1)}
    told = f"{len(paths)} clips of {arguments.data}, {clips.frames} frames of {clips.width}x{clips.height}. "
    tables = [markdown(figures), *([markdown(found, metrics.change)] if found else []), told + metrics.RULES]
    return "\n\n".join(tables), {"figures": figures, "differences": found, "settings": settings}


# ---------------------------------------------------------------------------------------------------- command line


USUAL = {"clips": 200, "sampling_steps": 10, "steps": 3000, "trackers": "lk,flow", "pips": "pips2_weights.pth"}
QUICK = {"clips": 8, "sampling_steps": 4}  # a first look: a minute


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    what = parser.add_argument_group("what is measured").add_argument
    what("--model", metavar="DIR", help="model folder")
    what("--table", type=int, choices=list(TABLES), help="train and compare the rows of a table instead")
    rules = "videos of these clips that any model made, by the clips' names; rules: metrics/videos.py"
    alone = "train on the other scenarios, measure on this one, beside a model that knew it"
    what("--leave-out", metavar="SCENARIO", help=alone)
    what("--videos", nargs="+", metavar="[NAME=]DIR", help=f"a row a folder: {rules}")
    what("--export-prompts", metavar="DIR", help="write what a model is told of each clip: see training/prompts.py")
    what("--data", required=True, metavar="DIR", help="held-out clips; with --table and --leave-out, to train on")
    what("--val", metavar="DIR", help="held-out clips for --table and --leave-out")
    usual = "default physics,demo; with --quick physics; of videos physics,fvd,fvmd"
    what("--metrics", help=f"some of physics,fvd,fvmd,demo ({usual})")
    what("--clips", type=int, help=f"at most (default {USUAL['clips']}; with --quick {QUICK['clips']})")
    first = "the first of each clip, with --videos, --export-prompts (default: all), --dry-run (25)"
    what("--frames", type=int, help=first)
    what("--stretch", action="store_true", help="--videos of another shape than the clips are resized all the same")
    what("--samples", type=int, default=1, help="of a clip: their mean, and the best of them (default %(default)s)")
    alone = "pushed: that one alone, and figures of objects count no other (default %(default)s)"
    what("--marked", choices=("all", "pushed"), default="all", help=f"objects that the model is shown; {alone}")
    told = "one arrow, of a drive the camera's motion and each car's first step; or nothing (supplement, section 9)"
    what("--told", choices=("arrow", "nothing"), default="arrow", help=f"of motion: {told} (default %(default)s)")
    what("--i3d", metavar="FILE_OR_REPO", help="i3d_torchscript.pt or a hub id that has it: adds FVD")
    some = f"some of lk,flow,pips,exact (exact checks the others; default {USUAL['trackers']})"
    what("--trackers", help=f"of FVMD: {some}")
    what("--pips", metavar="FILE", help=f"weights of the tracker pips (default {USUAL['pips']})")
    how = parser.add_argument_group("how").add_argument
    how("--quick", action="store_true", help="a first look: 8 clips, 4 sampling steps, --metrics physics")
    how("--sampling-steps", type=int, help="of each stage (default 10; with --quick 4)")
    how("--guidance", type=float, nargs=2, default=[1.0, 1.0], metavar=("FIRST", "LAST"), help="default 1 1: none")
    halved = "a batch that does not fit into a GPU is halved"
    how("--batch", type=int, default=8, help=f"clips that are sampled together; {halved} (default %(default)s)")
    how("--seed", type=int, default=0, help="of the noise, and of training (default %(default)s)")
    how("--cache", metavar="DIR", help="where samples are kept; default: in the data folder")
    how("--json", metavar="FILE", help="where figures and settings are written, too")
    how("--quiet", action="store_true", help="no progress bar")
    rows = parser.add_argument_group("training of --table and --leave-out").add_argument
    rows("--steps", type=int, help=f"of training, for each stage (default {USUAL['steps']})")
    rows("--minutes", type=float, help="of training, for each stage, instead of --steps")
    rows("--seeds", type=int, help="trainings of each row, from --seed on (default: 3 with a GPU, else 1)")
    rows("--train-batch", type=int, default=8, help="clips a step (default %(default)s)")
    rows("--preset", default="tiny", help="of train.py: size of the models (default %(default)s)")
    rows("--precision", choices=("fp32", "bf16"), help="of training; default: that of train.py")
    rows("--codec", metavar="DIR", help="VAE and image tower of this model folder; else they are trained")
    rows("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of (Small)StageConfig, in all rows")
    rows("--init", metavar="SVD", help="with --dry-run: rows that start from SVD's weights")
    rows("--dry-run", action="store_true", help="print the commands that train and measure the rows, data and hours")
    rows("--runs", metavar="DIR", help="where its models are kept, and found again")
    arguments = expand_home(parser.parse_args())
    check_flags(arguments, parser)
    return arguments


SAMPLED = "clips samples marked told i3d trackers pips quick sampling_steps guidance batch seed cache json"
TRAINED = "val runs steps minutes seeds train_batch preset precision codec set init dry_run"
TAKES = {  # which flags each task has a use for; all take --data and --quiet
    "model": f"{SAMPLED} metrics",
    "table": f"{SAMPLED} {TRAINED}",
    "leave_out": f"{SAMPLED} {TRAINED}",
    "videos": "clips frames metrics stretch i3d trackers pips quick json",
    "export_prompts": "clips frames quick",
    "dry_run": "table leave_out val runs steps set seed init frames",
}


def check_flags(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raises ValueError unless one task is asked for, and for a flag that it would ignore."""

    def flag(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    tasks = [name for name in TAKES if name != "dry_run"]
    asked = [name for name in tasks if getattr(arguments, name)]
    if len(asked) != 1:
        told = ", ".join(map(flag, asked)) or "nothing"
        raise ValueError(f"expected one of {', '.join(map(flag, tasks))}, got {told}")
    if (arguments.table or arguments.leave_out) and not (arguments.val and arguments.runs):
        wants = "--val, clips that were not trained on, and --runs, where its models are kept"
        raise ValueError(f"{flag(asked[0])} needs {wants}")
    if bool(arguments.init) != arguments.dry_run:
        raise ValueError(
            "--init SVD and --dry-run: of --table and --leave-out, together: prints commands, you run them"
        )
    task = "dry_run" if arguments.dry_run else asked[0]
    for name, value in vars(arguments).items():
        if value != parser.get_default(name) and name not in ("data", "quiet", task, *TAKES[task].split()):
            takers = ", ".join(flag(taker) for taker in TAKES if name in TAKES[taker].split())
            raise ValueError(f"{flag(name)}: of {takers}; with {flag(task)} it would be ignored")


def fill_in(arguments: argparse.Namespace) -> None:
    """Defaults that depend on what is asked. Raises ValueError for what makes no sense."""
    compared, given = not (arguments.model or arguments.export_prompts), vars(arguments).copy()
    usual = "physics,fvd,fvmd" if compared else "physics" if arguments.quick else "physics,demo"
    defaults = USUAL | (QUICK if arguments.quick else {}) | {"metrics": usual}
    for name, value in (defaults | {"seeds": 3 if torch.cuda.is_available() else 1}).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name, known in (("metrics", "physics,fvd,fvmd,demo"), ("trackers", "lk,flow,pips,exact")):
        setattr(arguments, name, getattr(arguments, name).split(","))
        if unknown := set(getattr(arguments, name)) - set(known.split(",")):
            raise ValueError(f"--{name} {','.join(sorted(unknown))}: expected some of {known}")
    wanted = {"i3d": ("metrics", "fvd"), "trackers": ("metrics", "fvmd"), "pips": ("trackers", "pips")}
    for name, (other, choice) in wanted.items():
        if given[name] and choice not in getattr(arguments, other):
            raise ValueError(f"--{name}: of --{other} {choice}, without which it would be ignored")
    if arguments.videos and "fvmd" in arguments.metrics and not {"lk", "pips"} & set(arguments.trackers):
        raise ValueError(f"--trackers {given['trackers']}: --videos are followed by lk or pips: they have no flow")
    if given["steps"] and arguments.minutes:
        raise ValueError(f"--steps {arguments.steps}: with --minutes it would be ignored")
    if arguments.table == 2 and arguments.told != "arrow":
        raise ValueError(f"--told {arguments.told}: --table 2 has rows of both")
    counts = ("clips", "frames", "samples", "sampling_steps", "batch", "train_batch", "steps", "seeds")
    for name, least in {"seed": 0, **dict.fromkeys(counts, 1)}.items():
        if (value := getattr(arguments, name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected {least} at least")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise ValueError(f"--minutes {arguments.minutes:g}: expected a number above 0")
    if arguments.videos and "demo" in arguments.metrics:
        raise ValueError("--metrics demo: asks what other pushes do, which --videos do not show: physics, fvd or fvmd")
    if arguments.json and not Path(arguments.json).parent.is_dir():
        raise ValueError(f"--json {arguments.json}: there is no folder {Path(arguments.json).parent}")


def run(arguments: argparse.Namespace) -> None:
    fill_in(arguments)
    if arguments.export_prompts:
        text, result = export_prompts(arguments.data, arguments.export_prompts, arguments.clips, arguments.frames), {}
    elif arguments.videos:
        text, result = evaluate_videos(arguments)
    elif arguments.table or arguments.leave_out:
        text, result = table(arguments)
    else:
        arguments.val = arguments.data
        result = evaluate(arguments, Path(arguments.model))
        scenarios = metrics.scenario_tables(result["scenarios"]) if len(result["scenarios"]) > 2 else []
        text = "\n\n".join([*scenarios, markdown(result["figures"]), footnote(result["settings"])])
    if arguments.json:
        write_json(Path(arguments.json), result)
    print(text)


def write_json(path: Path, result: dict) -> None:
    """Figures and settings, without what only serves to compare rows."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items() if not isinstance(part, Row)}
        return [plain(part) for part in value] if isinstance(value, list) else value

    result = json.loads(json.dumps(plain(result)), parse_constant=lambda _: None)  # JSON has no NaN
    written_whole(path, lambda partial: partial.write_text(json.dumps(result, indent=1) + "\n"))


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
