"""Physion-like clips with exact optical flow, instance ids and depth: MuJoCo's physics, and rays of our own.

    python -m clips.simulate data --clips 2000 --scenario dominoes,collide --size 128x64 --workers 2 --seed 0

Ten scenarios: dominoes, branch (a row of them that splits), collide, drop, roll, support (a stack that loses its base),
contain, link (joined bodies), tower (a ball rolls at one) and driving (the camera is on a car). One object is pushed;
everything else follows from physics. With `--still 0.15`, that share of the clips has no push, and all things rest; but
in drop and roll they fall and roll by themselves, and driving knows no push. No OpenGL: clips/rays.py
finds for each ray the geom that it hits, the distance and the surface normal; others, from four lights, find soft
shadows. It compiles itself on its first import (some seconds) and keeps that on disk. Flow is exact: every hit point
moves rigidly with its body (and with the camera).

The same (scenario, seed, frames, size) gives the same bytes. What is true of a clip is in its `meta`:
    pushed, push          id that was pushed (0 = none) and its velocity in m/s; also side (+1, -1) and strength
    contacts              [id, id, first frame step in which they touch]
    touching, fixed       pairs [id, id] that touch or are joined at frame 0; ids that cannot move
    hidden                what no picture shows: friction and densities; in driving, what each of the others wishes
    fallen                ids that lie down, or far below where they began, at the end
    poses                 [T + 1][N][7]: position and quaternion (w, x, y, z) of ids 1..N; energy [T + 1] in joules
    camera                [T + 1][4][3]: position, and the axes right, down, forward; focal length in pixels
    still                 (only in a scene without a push, of `--still`) true
    case, told, order     (driving) which case of clips/traffic.py; wishes of the ego car and the other, as for
                          `simulate`; "ego" and "other" in the order of passing, [] where nobody has passed yet
    other, speeds         (driving) id of the car, or person, that the ego car meets; [T + 1][2] m/s of both
    wide_gap              (dominoes, branch) whether some gap is wider than a domino is high
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import mujoco
import numpy as np
from tqdm import tqdm

from clips.camera import UP, project, rotations
from clips.clip import Clip, clip_header
from clips.rendering import Look, render
from clips.scenes import BY_THEMSELVES, FRAME_TIME, PLANE, SCENARIOS, Scene, frame_camera, redraw_hidden
from clips.traffic import OVERRIDES
from sources import expand_home

TIMESTEP = 0.0025  # of the physics
SETTLE_TIME = 0.1  # seconds before frame 0, in which things come to rest
REST = 1e-3  # metres or quaternion parts a frame
CREEP = 0.02  # the same in a still clip: MuJoCo's contacts are soft, and what stands on them slips a little
STILL_TRIALS = 30

# -------------------------------------------------------------------------------------------------------------- physics


def build(scene: Scene) -> mujoco.MjModel:
    """Floor, scenery and things; the geoms of thing i have `group` 1 and belong to body i + 1."""
    spec = mujoco.MjSpec()
    spec.option.timestep = TIMESTEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.enableflags |= mujoco.mjtEnableBit.mjENBL_ENERGY
    friction = [scene.friction, 0.003, 0.0001]
    spec.worldbody.add_geom(type=PLANE, size=[0, 0, 1], friction=friction)
    for (kind, size, position), _ in scene.scenery:
        spec.worldbody.add_geom(type=kind, size=size, pos=position)
    for i, thing in enumerate(scene.things):
        body = spec.worldbody.add_body(name=f"thing{i}", pos=thing.position, quat=thing.quaternion)
        if not thing.fixed:
            body.add_freejoint()
        for kind, size, position in thing.parts:
            body.add_geom(type=kind, size=size, pos=position, friction=friction, density=thing.density, condim=4)
    for a, b, joint in scene.links:
        equality = spec.add_equality(
            type=mujoco.mjtEq.mjEQ_CONNECT, objtype=mujoco.mjtObj.mjOBJ_BODY, name1=f"thing{a}", name2=f"thing{b}"
        )
        equality.data[:3] = joint
    return spec.compile()


def push_velocity(scene: Scene) -> np.ndarray:
    """(3), metres per second; zero when nothing is pushed."""
    return scene.side * scene.strength * scene.direction * (scene.pushed is not None)


def push_thing(model: mujoco.MjModel, data: mujoco.MjData, scene: Scene) -> None:
    """Gives the pushed thing its velocity and spin."""
    if scene.pushed is None:
        return
    velocity = push_velocity(scene)
    start = model.jnt_dofadr[model.body_jntadr[scene.pushed + 1]]
    spin = scene.lever * np.cross(UP, velocity)
    local = np.zeros(3)  # a free joint's linear velocity is in the world frame, its angular velocity in the body's
    mujoco.mju_rotVecQuat(local, spin, data.xquat[scene.pushed + 1] * [1, -1, -1, -1])
    data.qvel[start : start + 3] += velocity
    data.qvel[start + 3 : start + 6] += local


def advance(model: mujoco.MjModel, data: mujoco.MjData, seconds: float) -> None:
    for _ in range(round(seconds / TIMESTEP)):
        mujoco.mj_step(model, data)


def come_to_rest(model: mujoco.MjModel, data: mujoco.MjData, seconds: float) -> None:
    """Lets things fall and roll until nothing moves by CREEP within `seconds`, and goes back to where that began.

    Raises RuntimeError if that never is.
    """
    for _ in range(STILL_TRIALS):
        before, moved = data.qpos.copy(), 0.0
        data.qvel[:], data.qacc_warmstart[:] = 0, 0
        for _ in range(round(seconds / SETTLE_TIME)):
            advance(model, data, SETTLE_TIME)
            moved = max(moved, np.abs(data.qpos - before).max())
        if moved < CREEP:
            data.qpos[:], data.qvel[:], data.qacc_warmstart[:] = before, 0, 0
            return
    raise RuntimeError("a still scene does not come to rest")


def roll_out(
    model: mujoco.MjModel, scene: Scene, frames: int, rest: bool = False
) -> tuple[np.ndarray, list[list[int]], list[float]]:
    """Physics -> poses [T + 1, N, 7], contacts [thing, thing, frame step], total energy at each frame.

    `rest`: nothing moves in all these frames.
    """
    data, things = mujoco.MjData(model), len(scene.things)
    advance(model, data, SETTLE_TIME)
    data.qvel[:] = 0
    if rest:
        come_to_rest(model, data, max(1.6, (frames + 1) * FRAME_TIME))
    push_thing(model, data, scene)
    mujoco.mj_forward(model, data)
    poses, energy, touched, slack = [], [], {}, CREEP if rest else REST
    for t in range(frames + 1):
        pose = np.concatenate([data.xpos[1 : things + 1], data.xquat[1 : things + 1]], axis=1)
        if poses:  # what creeps by less rests: its flow is exactly zero
            pose = np.where(np.abs(pose - poses[-1]).max(axis=1, keepdims=True) < slack, poses[-1], pose)
        poses.append(pose)
        energy.append(float(data.energy.sum()))
        for _ in range(round(FRAME_TIME / TIMESTEP) if t < frames else 0):
            mujoco.mj_step(model, data)
            for pair in np.unique(np.sort(model.geom_bodyid[data.contact.geom[: data.ncon]], axis=1), axis=0):
                touched.setdefault(tuple(pair), t)
    contacts = [[int(a) - 1, int(b) - 1, t] for (a, b), t in touched.items() if a > 0]
    return np.array(poses), contacts, energy


def touching(model: mujoco.MjModel, scene: Scene, poses: np.ndarray) -> list[list[int]]:
    """Pairs [id, id] of things that touch at poses [N, 7], and of those that are joined."""
    data = mujoco.MjData(model)
    free = [i for i, thing in enumerate(scene.things) if not thing.fixed]
    data.qpos[:] = poses[free].ravel()
    mujoco.mj_forward(model, data)
    pairs = model.geom_bodyid[data.contact.geom[: data.ncon]].tolist() + [[a + 1, b + 1] for a, b, _ in scene.links]
    return [list(pair) for pair in sorted({(min(pair), max(pair)) for pair in pairs}) if min(pair) > 0]


def has_fallen(poses: np.ndarray) -> np.ndarray:
    """[T + 1, N, 7] -> [N]: turned over by more than 30 degrees, or less than 0.7 of its height above the floor."""
    upright = (rotations(poses[0, :, 3:])[:, :, 2] * rotations(poses[-2, :, 3:])[:, :, 2]).sum(-1)
    return (upright < math.cos(math.radians(30))) | (poses[-2, :, 2] < 0.7 * poses[0, :, 2])


# ---------------------------------------------------------------------------------------------------------- whole clips


def draw_scene(scenario: str, seed: int, frames: int, told: dict) -> tuple[Scene, Look, np.random.Generator]:
    """The scene of a seed, with what `told` overrides; ids say nothing about who is pushed."""
    index, k, drives = list(SCENARIOS).index(scenario), told.get("hidden"), scenario == "driving"
    rng = np.random.default_rng([seed, index])
    redraw = None if k is None else np.random.default_rng([seed, index, k, 1])
    wishes = {name: value for name, value in (told | {"hidden": redraw}).items() if drives}
    scene = SCENARIOS[scenario](rng, frames, **wishes)
    look_ = Look.random(rng, len(scene.things), outdoors=drives)
    scene = reorder(scene, rng.permutation(len(scene.things)))
    scene.side, scene.strength = told.get("side", scene.side), told.get("strength", scene.strength)
    if redraw and not drives:
        redraw_hidden(scene, scenario, redraw, frames)
    return scene, look_, rng


def check_push(scenario: str, push: dict) -> None:
    """Raises ValueError for what cannot be overridden."""
    known = (OVERRIDES if scenario == "driving" else {"side": (1, -1), "strength": None}) | {"hidden": None}
    if unknown := set(push) - set(known):
        raise ValueError(f"push of {scenario} has {', '.join(sorted(unknown))}; expected {', '.join(known)}")
    for name, value in push.items():
        if known[name] is not None and value not in known[name]:
            raise ValueError(f"push: {name} is {value!r}; expected one of {', '.join(map(str, known[name]))}")


def simulate(
    scenario: str, seed: int, frames: int = 16, size: int | tuple[int, int] = 128, push: dict | None = None,
    still: bool = False,
) -> Clip:  # fmt: skip
    """One clip. size: (width, height) in pixels, or one number for both.

    `push` overrides {"side": 1 or -1, "strength": m/s} of the same scene: everything else stays, so it gives the exact
    counterfactual. Strength 0 pushes nothing. {"hidden": k >= 0} redraws what no picture shows: a twin. In driving, it
    overrides the wishes {"ego": -1 slower, 0, 1 faster; "ego_lane": -1 right, 0, 1 left; "order": "first" or "second"
    where the ego car meets the other one} and, of that other car, {"lead_speed", "lead_lane"}. `still`: without a push,
    and where things do not move by themselves, all rest before the first frame. Raises ValueError for an unknown
    scenario, size, frames or push.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario {scenario!r}: expected one of {', '.join(SCENARIOS)}")
    size = (size, size) if isinstance(size, int) else tuple(size)
    if min(size) < 8 or frames < 1 or seed < 0:
        raise ValueError(f"size {size}, frames {frames}, seed {seed}: expected 8 pixels, 1 frame, 0 at least")
    check_push(scenario, push or {})
    if still and (asked := set(push or {}) - {"hidden"}):
        raise ValueError(f"push of {', '.join(sorted(asked))}: a still scene has none")
    scene, look_, rng = draw_scene(scenario, seed, frames, push or {})
    scene.strength = 0.0 if still else scene.strength
    fov = math.radians(rng.uniform(30, 40) if scenario != "driving" else 50)
    focal = size[1] / 2 / math.tan(fov / 2)
    model = build(scene)
    if scene.path is None:
        cameras = np.repeat(frame_camera(scene, focal, size)[None], frames + 1, axis=0)
        poses, contacts, energy = roll_out(model, scene, frames, still and scenario not in BY_THEMSELVES)
    else:
        cameras, poses, contacts, energy = scene.camera_path, scene.path, [], []
    pushed = scene.pushed is not None and scene.strength > 0
    truth = scene.truth | ({"still": True} if still and scene.path is None else {})
    truth |= {} if scene.other is None else {"other": scene.other + 1}
    camera = np.array(truth.pop("camera_motion", (0, 0)), np.float32)
    meta = truth | {
        "scenario": scenario, "seed": seed, "pushed": scene.pushed + 1 if pushed else 0,
        "push": push_velocity(scene).tolist(), "side": scene.side, "strength": scene.strength if pushed else 0.0,
        "contacts": sorted([min(a, b) + 1, max(a, b) + 1, t] for a, b, t in contacts),
        "touching": touching(model, scene, poses[0]),
        "hidden": scene.hidden,
        "fixed": [i + 1 for i, thing in enumerate(scene.things) if thing.fixed],
        "fallen": (np.flatnonzero(has_fallen(poses)) + 1).tolist(), "energy": [round(e, 4) for e in energy],
        "poses": poses.round(6).tolist(), "camera": cameras.round(6).tolist(), "focal": focal,
        "frame_time": FRAME_TIME,
    }  # fmt: skip
    return Clip(
        **render(model, scene, look_, poses, cameras, focal, size), camera=camera, fps=1 / FRAME_TIME, meta=meta
    )


def reorder(scene: Scene, order: np.ndarray) -> Scene:
    """The same scene with its things in another order."""
    new = np.argsort(order)
    scene.things = [scene.things[i] for i in order]
    scene.links = [(int(new[a]), int(new[b]), joint) for a, b, joint in scene.links]
    scene.pushed = None if scene.pushed is None else int(new[scene.pushed])
    scene.other = None if scene.other is None else int(new[scene.other])
    scene.tempers = [scene.tempers[i] for i in order] if scene.tempers else []
    scene.path = None if scene.path is None else scene.path[:, order]
    return scene


def tracks(clip: Clip, points: np.ndarray) -> np.ndarray:
    """Pixels [N, 2] (x, y) of frame 0 -> exact positions [T, N, 2] of what is seen there, hidden or not, from `meta`.

    Between pixels, the depth of the nearest one counts.
    """
    poses, cameras, focal = np.array(clip.meta["poses"]), np.array(clip.meta["camera"]), clip.meta["focal"]
    size = clip.rgb.shape[2], clip.rgb.shape[1]
    x, y = np.rint(points).astype(int).T
    depth, thing = clip.depth[0, y, x].astype(np.float64), clip.segmentation[0, y, x].astype(int) - 1
    right, down = (points[:, 0] - (size[0] - 1) / 2) / focal, (points[:, 1] - (size[1] - 1) / 2) / focal
    world = cameras[0, 0] + (depth[:, None] * np.stack([right, down, np.ones_like(right)], 1)) @ cameras[0, 1:]
    turns, index = rotations(poses[..., 3:]), np.maximum(thing, 0)
    local = np.einsum("kji,kj->ki", turns[0, index], world - poses[0, index, :3])
    out = []
    for t in range(len(clip.rgb)):
        moved = np.einsum("kij,kj->ki", turns[t, index], local) + poses[t, index, :3]
        moved = np.where(thing[:, None] >= 0, moved, world)
        out.append(project(moved, cameras[t], focal, size)[:, :2])
    return np.stack(out)


# --------------------------------------------------------------------------------------------------------- command line


def is_still(scenario: str, seed: int, share: float) -> bool:
    """Whether this seed belongs to the share of clips without a push. A larger share keeps those of a smaller one."""
    return bool(np.random.default_rng([seed, list(SCENARIOS).index(scenario), 1]).random() < share)


def write_clip(job: tuple[list[Path], str, int, int, tuple[int, int], None, bool]) -> None:
    """The clip and, where there is a second path, its mirror image."""
    (path, *mirror), *told = job
    clip = simulate(*told)
    clip.save(path)
    for path in mirror:
        clip.mirrored().save(path)


def parse_size(text: str) -> tuple[int, int]:
    """ "128" or "128x64" (width x height)."""
    width, _, height = text.partition("x")
    try:
        size = int(width), int(height or width)
    except ValueError:
        raise ValueError(f"--size {text}: expected WIDTHxHEIGHT, such as 128x64, or one number") from None
    if min(size) < 8:
        raise ValueError(f"--size {text}: expected 8 pixels at least")
    return size


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m clips.simulate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", metavar="DIR", help="where the clips go")
    add("--clips", type=int, default=64, help="how many (default %(default)s)")
    add("--scenario", default="dominoes", help=f"one or more of {','.join(SCENARIOS)} (default %(default)s)")
    add("--size", default="128x64", help="WIDTHxHEIGHT, or one number for a square (default %(default)s)")
    add("--frames", type=int, default=16, help="of a clip (default %(default)s)")
    add("--still", type=float, default=0.0, help="share of the clips without a push, 0 to 1 (default %(default)s)")
    add("--mirror", action="store_true", help="for training: the mirror image of every clip, too (default: no)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core, here %(default)s)")
    add("--seed", type=int, default=0, help="of the first clip; the next ones count up from it (default %(default)s)")
    return expand_home(parser.parse_args(words))


def jobs_of(arguments: argparse.Namespace) -> list[tuple]:
    """For `write_clip`, of all clips that are not there. Raises ValueError for what the command line says, and for a
    clip that is there with other frames, another size or another `--still`."""
    folder, scenarios, size = Path(arguments.folder), arguments.scenario.split(","), parse_size(arguments.size)
    if unknown := set(scenarios) - set(SCENARIOS):
        raise ValueError(f"--scenario {','.join(sorted(unknown))}: expected some of {', '.join(SCENARIOS)}")
    for name, least in {"clips": 1, "frames": 1, "workers": 1, "seed": 0}.items():
        if (value := getattr(arguments, name)) < least:
            raise ValueError(f"--{name} {value}: expected {least} at least")
    if not 0 <= arguments.still <= 1:
        raise ValueError(f"--still {arguments.still}: expected a share from 0 to 1")
    jobs, wanted = [], (arguments.frames, size[1], size[0], 3)
    for i in range(arguments.clips):
        scenario, seed = scenarios[i % len(scenarios)], arguments.seed + i
        names = [f"{scenario}_{seed:08d}"] + [f"{scenario}_{seed:08d}_mirrored"] * arguments.mirror
        paths = [folder / f"{name}.safetensors" for name in names]
        still = is_still(scenario, seed, arguments.still)
        for path in filter(Path.exists, paths):
            shape, _, meta = clip_header(path)
            if shape != wanted:
                told = f"{shape[0]} frames of {shape[2]}x{shape[1]}, now {wanted[0]} of {wanted[2]}x{wanted[1]}"
                raise ValueError(f"{path}: was made with {told}: take another DIR")
            if scenario != "driving" and not meta.get("mirrored") and meta.get("still", False) != still:
                raise ValueError(f"{path}: was made with another --still: take another DIR")
        if not all(path.exists() for path in paths):  # an interrupted run goes on where it was
            jobs.append((paths, scenario, seed, arguments.frames, size, None, still))
    return jobs


def leave_signals_to_parent() -> None:
    """In a worker, which ends with its parent, however that ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Workers that leave Ctrl-C and SIGTERM to this process: told to stop, each finishes the clip that it is at."""
    others = signal.signal(signal.SIGTERM, signal.default_int_handler)
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), leave_signals_to_parent)
    try:
        own = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they inherit that
        try:
            for _ in range(count):
                pool.submit(int)  # starts another one, since none is idle yet
        finally:
            signal.signal(signal.SIGINT, own)
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, others)


def main() -> None:
    arguments = parse_arguments()
    try:
        jobs = jobs_of(arguments)
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
        with processes(arguments.workers) as pool:
            for _ in tqdm(pool.map(write_clip, jobs), total=len(jobs), unit="clip"):
                pass
    except (ValueError, OSError) as error:
        print(f"clips.simulate: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenProcessPool:
        print("clips.simulate: a worker was killed; the same command goes on from here", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("clips.simulate: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
