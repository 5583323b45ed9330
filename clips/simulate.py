"""Physion-like clips with exact optical flow, instance ids and depth: MuJoCo's physics and MuJoCo's ray casting.

    python -m clips.simulate data --clips 2000 --scenario dominoes,collide --size 128x64 --workers 2 --seed 0

Eight scenarios: dominoes, collide, drop, roll, support (a stack that loses its base), contain, link (joined bodies) and
driving (the camera is on a car). One object is pushed; everything else follows from physics. No OpenGL: pictures come
from `mj_multiRay`, which returns for each ray the geom that it hits, the distance and the surface normal; a second ray,
from the light, finds shadows. Flow is exact: every hit point moves rigidly with its body (and with the camera).

The same (scenario, seed, frames, size) gives the same bytes. What is true of a clip is in its `meta`:
    pushed, push          id that was pushed (0 = none) and its velocity in m/s; also side (+1, -1) and strength
    contacts              [id, id, first frame step in which they touch]
    fallen                ids that lie down, or far below where they began, at the end
    poses                 [T + 1][N][7]: position and quaternion (w, x, y, z) of ids 1..N; energy [T + 1] in joules
    camera                [T + 1][4][3]: position, and the axes right, down, forward; focal length in pixels
    wide_gap              (dominoes) whether some gap is wider than a domino is high
"""

from __future__ import annotations

import argparse
import colorsys
import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mujoco
import numpy as np
from tqdm import tqdm

from clips.clip import CAMERA_YAW_UNIT, Clip

FRAME_TIME = 0.1  # seconds between frames
TIMESTEP = 0.0025  # of the physics
SETTLE_TIME = 0.1  # seconds before frame 0, in which things come to rest
REST = 1e-3  # metres or quaternion parts a frame
FAR = 100.0  # metres; what no ray hits is there
UP = np.array([0.0, 0.0, 1.0])
BOX, SPHERE, CYLINDER, PLANE = (
    getattr(mujoco.mjtGeom, f"mjGEOM_{name}") for name in ("BOX", "SPHERE", "CYLINDER", "PLANE")
)
Part = tuple[int, tuple[float, ...], tuple[float, ...]]  # geom type, half sizes, centre in the frame of its body


# ------------------------------------------------------------------------------------------------------ what a scene is


@dataclass
class Thing:
    """One rigid object: its parts, where it is, and whether it is fixed to the ground."""

    parts: list[Part]
    position: np.ndarray
    angle: float = 0.0  # about the vertical
    tilt: float = 0.0  # about its own y axis, downwards in x
    fixed: bool = False
    density: float = 300.0

    @property
    def quaternion(self) -> np.ndarray:
        turn, lean = np.zeros(4), np.zeros(4)
        mujoco.mju_axisAngle2Quat(turn, UP, self.angle)
        mujoco.mju_axisAngle2Quat(lean, np.array([0.0, 1.0, 0.0]), self.tilt)
        product = np.zeros(4)
        mujoco.mju_mulQuat(product, turn, lean)
        return product


@dataclass
class Scene:
    """Things, the push, and the camera; `path` and `camera_path` replace physics and the camera that stands still."""

    things: list[Thing]
    pushed: int | None = None  # index of the thing that is pushed
    direction: np.ndarray = field(default_factory=lambda: np.array([1.0, 0.0, 0.0]))  # of a push to side +1
    side: int = 1
    strength: float = 0.0  # m/s
    lever: float = 0.0  # spin about the horizontal axis across the push, in radians/m
    links: list[tuple[int, int, np.ndarray]] = field(default_factory=list)  # thing, thing, joint in the first's frame
    friction: float = 0.4
    azimuth: float = 0.0  # the camera stands at -y, turned by this about the vertical
    pitch: float = math.radians(25)
    extra: list[np.ndarray] = field(default_factory=list)  # points that the camera must see as well
    path: np.ndarray | None = None  # [T + 1, N, 7]: poses of things that drive by themselves
    camera_path: np.ndarray | None = None  # [T + 1, 4, 3]
    scenery: list[tuple[Part, float]] = field(default_factory=list)  # fixed boxes of the background, and their grey
    truth: dict = field(default_factory=dict)  # what else belongs into the clip's meta


def thing_of(rng: np.random.Generator, size: float, kinds: tuple[int, ...] = (BOX, SPHERE, CYLINDER)) -> list[Part]:
    """One part about `size` metres across."""
    kind = kinds[rng.integers(len(kinds))]
    half = size / 2 * rng.uniform(0.85, 1.15)
    if kind == BOX:
        return [(BOX, (half, half * rng.uniform(0.8, 1.2), half * rng.uniform(0.8, 1.2)), (0, 0, 0))]
    if kind == SPHERE:
        return [(SPHERE, (half, 0, 0), (0, 0, 0))]
    return [(CYLINDER, (half, half * rng.uniform(0.8, 1.2), 0), (0, 0, 0))]


def half_height(parts: list[Part]) -> float:
    """How far the first part reaches below its centre."""
    kind, size, _ = parts[0]
    return {BOX: size[2], SPHERE: size[0], CYLINDER: size[1]}[kind]


def on_floor(parts: list[Part], x: float, y: float, angle: float = 0.0, above: float = 0.0) -> Thing:
    return Thing(parts, np.array([x, y, half_height(parts) + above]), angle)


def heading(angle: float) -> np.ndarray:
    return np.array([math.cos(angle), math.sin(angle), 0.0])


# ------------------------------------------------------------------------------------------------------------ scenarios


def dominoes(rng: np.random.Generator, frames: int) -> Scene:
    """A row of dominoes. A quarter of the rows has a gap that no domino can bridge."""
    wide = rng.random() < 0.25
    count = int(rng.integers(3, 6 if wide else 7))
    height, width, thickness = 0.6, rng.uniform(0.34, 0.46), rng.uniform(0.11, 0.15)
    gaps = rng.uniform(0.28, 0.5, count - 1) * height
    if wide:
        gaps[rng.integers(count - 1)] = rng.uniform(1.25, 1.5) * height
    along = np.concatenate([[0], np.cumsum(gaps + thickness)])
    along -= along.mean()
    parts = [(BOX, (thickness / 2, width / 2, height / 2), (0, 0, 0))]
    things = [on_floor(parts, x, rng.normal(0, 0.008), rng.normal(0, 0.03)) for x in along]
    kind = rng.choice(4, p=[0.62, 0.2, 0.12, 0.06])  # inward, outward, from the middle, not at all
    first, side = int(rng.integers(2)) * (count - 1), int(rng.choice([-1, 1]))
    inward = 1 if first == 0 else -1
    pushed = [first, first, int(rng.integers(count)), None][kind]
    side = [inward, -inward, side, 1][kind]
    reach = [np.array([along[0] - 0.4, 0, 0.1]), np.array([along[-1] + 0.4, 0, 0.1])]  # what falls outwards
    return Scene(
        things, pushed, side=side, strength=0.55 * 3.6 ** rng.random(), lever=2 / height,
        friction=rng.uniform(0.3, 0.4), azimuth=rng.choice([-1, 1]) * rng.uniform(0.35, 0.7),
        pitch=math.radians(rng.uniform(20, 30)), extra=reach,
        truth={"wide_gap": bool(wide), "gaps": gaps.round(4).tolist(), "height": height},
    )  # fmt: skip


def collide(rng: np.random.Generator, frames: int) -> Scene:
    """One thing is pushed towards another, which it hits or misses; sometimes there is a third."""
    target = on_floor(thing_of(rng, 0.65), 0.35, 0, rng.uniform(0, 3))
    mover = on_floor(thing_of(rng, 0.6), -0.75, 0, rng.uniform(0, 3))
    things = [mover, target]
    if rng.random() < 0.5:
        things.append(on_floor(thing_of(rng, 0.5), 1.1, rng.uniform(-0.3, 0.3), rng.uniform(0, 3)))
    miss = rng.choice([0.0, rng.uniform(0.5, 0.9) * rng.choice([-1, 1])], p=[0.75, 0.25])
    rolls = mover.parts[0][0] == SPHERE
    return Scene(
        things, 0, heading(rng.normal(0, 0.1) + miss), int(rng.choice([1, -1], p=[0.9, 0.1])), rng.uniform(1.2, 3.0),
        lever=1 / half_height(mover.parts) if rolls else 0.0, friction=rng.uniform(0.15, 0.3),
        azimuth=rng.uniform(-0.6, 0.6), extra=[np.array([1.2, 0, 0.1])],
    )  # fmt: skip


def drop(rng: np.random.Generator, frames: int) -> Scene:
    """One thing falls onto, or beside, another."""
    target = on_floor(thing_of(rng, 0.8), 0, 0, rng.uniform(0, 3))
    above = 2 * half_height(target.parts) + rng.uniform(0.2, 0.5)
    mover = on_floor(thing_of(rng, 0.6), rng.uniform(-0.45, 0.45), rng.uniform(-0.1, 0.1), rng.uniform(0, 3), above)
    return Scene(
        [mover, target], 0, heading(rng.uniform(0, 2 * math.pi)), int(rng.choice([-1, 1])), rng.uniform(0.0, 0.6),
        friction=rng.uniform(0.3, 0.6), azimuth=rng.uniform(-0.6, 0.6), pitch=math.radians(rng.uniform(15, 25)),
        extra=[np.array([-0.7, 0, 0]), np.array([0.7, 0, 0])],
    )  # fmt: skip


def roll(rng: np.random.Generator, frames: int) -> Scene:
    """A ball or a cylinder on its side rolls down a ramp, towards a thing at its foot."""
    slope, length, radius = rng.uniform(0.25, 0.45), 1.2, rng.uniform(0.16, 0.22)
    normal = np.array([math.sin(slope), 0, math.cos(slope)])
    ramp_center = np.array([-0.55, 0, length / 2 * math.sin(slope)]) - 0.05 * normal
    ramp = Thing([(BOX, (length / 2, 0.3, 0.05), (0, 0, 0))], ramp_center, tilt=slope, fixed=True)
    along = np.array([math.cos(slope), 0, -math.sin(slope)])
    ball = Thing([(SPHERE, (radius, 0, 0), (0, 0, 0))], ramp_center + (0.05 + radius) * normal - 0.4 * along)
    target = on_floor(thing_of(rng, 0.45), rng.uniform(0.5, 0.8), rng.choice([0.0, 0.45]), rng.uniform(0, 3))
    return Scene(
        [ball, ramp, target], 0, along, int(rng.choice([1, -1], p=[0.9, 0.1])), rng.uniform(0.3, 1.5), lever=1 / radius,
        friction=rng.uniform(0.5, 0.8), azimuth=rng.uniform(-0.5, 0.5),
    )  # fmt: skip


def support(rng: np.random.Generator, frames: int) -> Scene:
    """A stack of boxes, whose base is pushed away."""
    things, top = [], 0.0
    for _ in range(int(rng.integers(2, 5))):
        half = rng.uniform(0.13, 0.19)
        parts = [(BOX, (half * rng.uniform(1, 1.3), half, half), (0, 0, 0))]
        things.append(on_floor(parts, rng.normal(0, 0.02), rng.normal(0, 0.02), rng.normal(0, 0.1), top))
        top += 2 * half
    return Scene(
        things, 0, np.array([1.0, 0, 0]), int(rng.choice([-1, 1])), rng.uniform(2.0, 6.0),
        friction=rng.uniform(0.1, 0.2), azimuth=rng.uniform(-0.5, 0.5), pitch=math.radians(rng.uniform(15, 25)),
        extra=[np.array([-0.7, 0, 0]), np.array([0.7, 0, 0])],
    )  # fmt: skip


def contain(rng: np.random.Generator, frames: int) -> Scene:
    """An open box with things in it, or falling into it, is pushed."""
    half, wall, rim = rng.uniform(0.4, 0.5), 0.03, rng.uniform(0.1, 0.16)
    sides = [(BOX, (half, wall, rim), (0, y, rim)) for y in (-half, half)]
    sides += [(BOX, (wall, half, rim), (x, 0, rim)) for x in (-half, half)]
    crate = Thing([(BOX, (half, half, wall), (0, 0, 0)), *sides], np.array([0, 0, wall]), rng.uniform(-0.3, 0.3))
    things, height = [crate], 2 * wall
    for _ in range(int(rng.integers(1, 3))):
        parts = thing_of(rng, 0.3)
        things.append(on_floor(parts, rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1), rng.uniform(0, 3), height))
        height += 2 * half_height(parts) + rng.uniform(0.1, 0.3)
    return Scene(
        things, 0, heading(rng.normal(0, 0.5)), int(rng.choice([-1, 1])), rng.uniform(0.5, 2.5),
        friction=rng.uniform(0.25, 0.4), azimuth=rng.uniform(-0.5, 0.5), pitch=math.radians(rng.uniform(25, 35)),
        extra=[np.array([-0.8, 0, 0]), np.array([0.8, 0, 0])],
    )  # fmt: skip


def link(rng: np.random.Generator, frames: int) -> Scene:
    """Two or three boxes in a row, joined end to end by ball joints; the first is pushed and drags the others."""
    count, half, height = int(rng.integers(2, 4)), rng.uniform(0.2, 0.28), rng.uniform(0.12, 0.18)
    step = 2 * half + 0.06
    parts = [(BOX, (half, height, height), (0, 0, 0))]
    things = [on_floor(parts, (i - (count - 1) / 2) * step, 0) for i in range(count)]
    links = [(i, i + 1, np.array([step / 2, 0, 0])) for i in range(count - 1)]
    end = int(rng.integers(2)) * (count - 1)
    return Scene(
        things, end, heading(rng.uniform(0.6, 2.5)), int(rng.choice([-1, 1])), rng.uniform(1.5, 4.5), links=links,
        friction=rng.uniform(0.15, 0.25), azimuth=rng.uniform(-0.5, 0.5), pitch=math.radians(rng.uniform(25, 35)),
        extra=[np.array([0, -0.6, 0]), np.array([0, 0.6, 0])],
    )  # fmt: skip


def safe_speed(x: float, y: float, others_x: np.ndarray, others_y: np.ndarray) -> float:
    """m/s that keeps 1 m plus 0.8 s of way behind the next car of this lane (cars are 4 m long)."""
    ahead = (others_x > x) & (np.abs(others_y - y) < 1.9)
    return max(0.0, ((others_x[ahead] - x).min(initial=FAR) - 5.0) / 0.8)


def driving(rng: np.random.Generator, frames: int) -> Scene:
    """The camera is on a car that drives and turns. Others keep their own speeds and brake for who is ahead of them."""
    lanes, count = (-3.2, 0.0, 3.2), int(rng.integers(2, 5))
    lane = rng.permutation(np.resize(np.arange(3), count))
    ahead = np.sort(rng.uniform(6, 16, count)) + 1.5 * np.arange(count)
    speed = rng.uniform(2, 11, count)
    ego, yaw_rate = rng.uniform(2, 9), rng.choice([0.0, rng.uniform(-0.25, 0.25)])
    body = [(BOX, (2.0, 0.9, 0.45), (0, 0, 0)), (BOX, (1.1, 0.8, 0.35), (-0.2, 0, 0.75))]
    wheels = [(SPHERE, (0.35, 0, 0), (x, y, -0.4)) for x in (-1.3, 1.3) for y in (-0.75, 0.75)]
    things = [Thing([*body, *wheels], np.array([x, lanes[k], 0.75])) for x, k in zip(ahead, lane, strict=True)]
    path, camera = np.zeros((frames + 1, count, 7)), np.zeros((frames + 1, 4, 3))
    path[..., 2], path[..., 3] = 0.75, 1.0
    x, v, here, yaw, motion = ahead.copy(), speed.copy(), np.zeros(2), 0.0, []
    y = np.array([lanes[k] for k in lane])
    for t in range(frames + 1):
        path[t, :, 0], path[t, :, 1] = x, y
        forward = np.array([math.cos(yaw), math.sin(yaw), -0.08])
        camera[t] = look(np.array([*here, 1.6]), forward)
        v = np.minimum(np.minimum(v + 0.1, speed), [safe_speed(x[i], y[i], x, y) for i in range(count)])
        step = min(ego, safe_speed(here[0] + 0.5, here[1], x, y)) * FRAME_TIME
        x, yaw = x + v * FRAME_TIME, yaw + yaw_rate * FRAME_TIME
        here = here + step * heading(yaw)[:2]
        motion.append([step, -yaw_rate * FRAME_TIME / CAMERA_YAW_UNIT])  # yaw to the right is positive
    scenery = []
    for k in range(14):
        size = (rng.uniform(2, 5), rng.uniform(2, 4), rng.uniform(2, 7))
        where = (5 + 5 * (k // 2) + rng.uniform(-1, 1), (-1) ** k * rng.uniform(10, 13), size[2])
        scenery.append(((BOX, size, where), rng.uniform(0.35, 0.75)))
    return Scene(things, path=path, camera_path=camera, scenery=scenery, truth={"camera_motion": motion[:frames]})


SCENARIOS: dict[str, Callable[[np.random.Generator, int], Scene]] = {
    scene.__name__: scene for scene in (dominoes, collide, drop, roll, support, contain, link, driving)
}


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


def roll_out(model: mujoco.MjModel, scene: Scene, frames: int) -> tuple[np.ndarray, list[list[int]], list[float]]:
    """Physics -> poses [T + 1, N, 7], contacts [thing, thing, frame step], total energy at each frame."""
    data, things = mujoco.MjData(model), len(scene.things)
    for _ in range(round(SETTLE_TIME / TIMESTEP)):
        mujoco.mj_step(model, data)
    data.qvel[:] = 0
    push_thing(model, data, scene)
    mujoco.mj_forward(model, data)
    poses, energy, touched = [], [], {}
    for t in range(frames + 1):
        pose = np.concatenate([data.xpos[1 : things + 1], data.xquat[1 : things + 1]], axis=1)
        if poses:  # what creeps by less than REST rests: its flow is exactly zero
            pose = np.where(np.abs(pose - poses[-1]).max(axis=1, keepdims=True) < REST, poses[-1], pose)
        poses.append(pose)
        energy.append(float(data.energy.sum()))
        for _ in range(round(FRAME_TIME / TIMESTEP) if t < frames else 0):
            mujoco.mj_step(model, data)
            for pair in np.unique(np.sort(model.geom_bodyid[data.contact.geom[: data.ncon]], axis=1), axis=0):
                touched.setdefault(tuple(pair), t)
    contacts = [[int(a) - 1, int(b) - 1, t] for (a, b), t in touched.items() if a > 0]
    return np.array(poses), contacts, energy


def rotations(quaternions: np.ndarray) -> np.ndarray:
    """[..., 4] (w, x, y, z) -> [..., 3, 3], body to world."""
    w, x, y, z = np.moveaxis(quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def has_fallen(poses: np.ndarray) -> np.ndarray:
    """[T + 1, N, 7] -> [N]: turned over by more than 30 degrees, or less than 0.7 of its height above the floor."""
    upright = (rotations(poses[0, :, 3:])[:, :, 2] * rotations(poses[-2, :, 3:])[:, :, 2]).sum(-1)
    return (upright < math.cos(math.radians(30))) | (poses[-2, :, 2] < 0.7 * poses[0, :, 2])


# --------------------------------------------------------------------------------------------------------------- camera


def look(position: np.ndarray, forward: np.ndarray) -> np.ndarray:
    """[4, 3]: position, and the axes right, down, forward of a camera that is level."""
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, UP)
    right /= np.linalg.norm(right)
    return np.stack([position, right, np.cross(forward, right), forward])


def project(points: np.ndarray, camera: np.ndarray, focal: float, size: tuple[int, int]) -> np.ndarray:
    """World [..., 3] -> (x, y, depth) in pixels, where (0, 0) is the centre of the top left pixel, and metres."""
    right, down, depth = np.moveaxis((points - camera[0]) @ camera[1:].T, -1, 0)
    center_x, center_y = (size[0] - 1) / 2, (size[1] - 1) / 2
    return np.stack([focal * right / depth + center_x, focal * down / depth + center_y, depth], axis=-1)


def corners(thing: Thing) -> np.ndarray:
    """Points that enclose a thing, [K, 3]."""
    signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), axis=-1).reshape(-1, 3)
    reach = {BOX: lambda s: s, SPHERE: lambda s: (s[0],) * 3, CYLINDER: lambda s: (s[0], s[0], s[1])}
    local = np.concatenate([np.array(p) + signs * reach[kind](size) for kind, size, p in thing.parts])
    return local @ rotations(thing.quaternion).T + thing.position


def frame_camera(scene: Scene, focal: float, size: tuple[int, int]) -> np.ndarray:
    """The nearest camera at the scene's azimuth and pitch that has every thing in the picture."""
    points = np.concatenate([*(corners(thing) for thing in scene.things), np.array(scene.extra).reshape(-1, 3)])
    target = (points.min(0) + points.max(0)) / 2
    flat = np.array([math.sin(scene.azimuth), math.cos(scene.azimuth), 0])
    forward = math.cos(scene.pitch) * flat - math.sin(scene.pitch) * UP
    near, far = 0.5, 50.0
    for _ in range(30):
        middle = (near + far) / 2
        x, y, depth = project(points, look(target - middle * forward, forward), focal, size).T
        inside = (depth > 0.1) & (x > 1) & (x < size[0] - 2) & (y > 1) & (y < size[1] - 2)
        near, far = (near, middle) if inside.all() else (middle, far)
    return look(target - far * forward, forward)


# ------------------------------------------------------------------------------------------------------------- pictures


@dataclass
class Look:
    """Colours of one clip: of things and floor, and where the light is."""

    things: np.ndarray  # [N, 3], 0 to 1
    floor: np.ndarray  # [2, 3]
    wood: bool
    light: np.ndarray  # (3)
    tile: float  # metres

    @classmethod
    def random(cls, rng: np.random.Generator, count: int, outdoors: bool) -> Look:
        """Hues of the things are spread over the circle: no two look alike."""
        hues = (rng.random() + rng.permutation(count) / count + rng.uniform(-0.2, 0.2, count) / count) % 1
        things = [colorsys.hsv_to_rgb(h, rng.uniform(0.65, 0.95), rng.uniform(0.75, 1.0)) for h in hues]
        grey, tint, wood = rng.uniform(0.45, 0.75), rng.normal(0, 0.02, 3), bool(rng.random() < 0.5) and not outdoors
        base = np.array([0.62, 0.46, 0.32]) * rng.uniform(0.8, 1.15) if wood else grey + tint
        floor = np.stack([base, base * rng.uniform(0.72, 0.85)])
        light = np.array([rng.uniform(-1.5, 1.5), rng.uniform(-2.5, -0.5), rng.uniform(3.5, 5.0)])
        return cls(np.array(things), floor, wood, light * (10 if outdoors else 1), 3.2 if outdoors else 0.5)

    def floor_color(self, points: np.ndarray) -> np.ndarray:
        """Checker, or planks with a grain; [K, 3] world -> [K, 3]."""
        x, y = points[:, 0] / self.tile, points[:, 1] / self.tile
        if not self.wood:
            return self.floor[(np.floor(x) + np.floor(y)).astype(int) % 2]
        plank = np.floor(2 * y)
        tone = 0.5 + 0.35 * np.sin(12.9898 * plank) + 0.15 * np.sin(23 * y + 1.5 * np.sin(2.1 * x + plank))
        return self.floor[0] + tone[:, None] * (self.floor[1] - self.floor[0])


@dataclass
class Hits:
    """What rays meet: [K] thing (-1 = background), [K] geom (-1 = sky), [K, 3] point and normal in the world."""

    thing: np.ndarray
    geom: np.ndarray
    point: np.ndarray
    normal: np.ndarray


def cast(model: mujoco.MjModel, data: mujoco.MjData, origin: np.ndarray, rays: np.ndarray) -> Hits:
    """Unit rays [K, 3] from one point."""
    count = len(rays)
    geom, distance, normal = np.full(count, -1, np.int32), np.zeros(count), np.zeros((count, 3))
    mujoco.mj_multiRay(
        model, data, origin, rays.ravel(), None, True, -1, geom, distance, normal.reshape(-1), count, 1e6
    )
    distance = np.where(geom < 0, FAR, np.minimum(distance, FAR))
    thing = np.where(geom < 0, -1, model.geom_bodyid[geom] - 1)
    return Hits(thing, geom, origin + distance[:, None] * rays, normal)


def pixel_rays(camera: np.ndarray, focal: float, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
    """Unit rays [H W, 3] through pixel centres moved by `offset`."""
    x, y = np.meshgrid(np.arange(size[0]) + offset[0], np.arange(size[1]) + offset[1])
    local = np.stack([x - (size[0] - 1) / 2, y - (size[1] - 1) / 2, np.full(x.shape, focal)], axis=-1).reshape(-1, 3)
    return (local / np.linalg.norm(local, axis=1, keepdims=True)) @ camera[1:]


def shade(
    model: mujoco.MjModel, data: mujoco.MjData, hits: Hits, look_: Look, light: np.ndarray, scene: Scene
) -> np.ndarray:
    """Diffuse colour with a shadow ray to the light; [K, 3] in 0 to 1."""
    color = look_.floor_color(hits.point)
    for k, (_, grey) in enumerate(scene.scenery):
        color = np.where((hits.geom == k + 1)[:, None], grey, color)
    on_thing = hits.thing >= 0
    index = hits.thing[on_thing] + 1
    local = np.einsum("kji,kj->ki", data.xmat[index].reshape(-1, 3, 3), hits.point[on_thing] - data.xpos[index])
    stripes = 0.94 + 0.06 * np.sin(14 * local.sum(1) / (10 if look_.tile > 1 else 1))
    color[on_thing] = look_.things[index - 1] * stripes[:, None]
    to_point = hits.point - light
    reach = np.linalg.norm(to_point, axis=1)
    rays = to_point / reach[:, None]
    first = cast(model, data, light, rays)
    lit = np.linalg.norm(first.point - light, axis=1) > reach - 1e-3
    diffuse = np.abs((rays * hits.normal).sum(1)) * lit * ((rays * hits.normal).sum(1) < 0)
    color = color * (0.45 + 0.65 * diffuse)[:, None]
    return np.where((hits.geom < 0)[:, None], [0.72, 0.82, 0.92], color)


def render(
    model: mujoco.MjModel, scene: Scene, look_: Look, poses: np.ndarray, cameras: np.ndarray, focal: float,
    size: tuple[int, int],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Poses [T + 1, N, 7] and cameras [T + 1, 4, 3] -> arrays of a Clip. Colour is the mean of 2x2 rays a pixel."""
    data, clip = mujoco.MjData(model), {name: [] for name in ("rgb", "flow", "segmentation", "depth")}
    turns, shape = rotations(poses[..., 3:]), (size[1], size[0])
    free = [i for i, thing in enumerate(scene.things) if not thing.fixed]
    for t in range(len(poses) - 1):
        data.qpos[:] = poses[t, free].ravel()
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        rgb = 0
        for k, offset in enumerate([(-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)]):
            hits = cast(model, data, cameras[t, 0], pixel_rays(cameras[t], focal, size, offset))
            light = look_.light + 0.06 * look_.light[2] * np.array([k % 2 - 0.5, k // 2 - 0.5, 0])  # soft shadows
            rgb = rgb + shade(model, data, hits, look_, light, scene) / 4
        hits = cast(model, data, cameras[t, 0], pixel_rays(cameras[t], focal, size, (0, 0)))
        thing = np.maximum(hits.thing, 0)
        local = np.einsum("kji,kj->ki", turns[t, thing], hits.point - poses[t, thing, :3])
        moved = np.einsum("kij,kj->ki", turns[t + 1, thing], local) + poses[t + 1, thing, :3]
        moves = (poses[t + 1] != poses[t]).any(axis=1)[thing] & (hits.thing >= 0)
        moved = np.where(moves[:, None], moved, hits.point)  # exactly zero flow for what rests
        here, there = (project(p, cameras[t + i], focal, size) for i, p in enumerate((hits.point, moved)))
        flow = (there - here)[:, :2] * (there[:, 2:] > 0.05)  # what ends behind the camera has no flow
        clip["rgb"].append((rgb.clip(0, 1) * 255).round().astype(np.uint8).reshape(*shape, 3))
        clip["flow"].append(flow.T.reshape(2, *shape).astype(np.float32))
        clip["segmentation"].append((hits.thing + 1).astype(np.uint8).reshape(shape))
        clip["depth"].append(here[:, 2].astype(np.float32).reshape(shape))
    return {name: np.stack(values) for name, values in clip.items()}


# ---------------------------------------------------------------------------------------------------------- whole clips


def simulate(
    scenario: str, seed: int, frames: int = 16, size: int | tuple[int, int] = 128, push: dict | None = None
) -> Clip:
    """One clip. size: (width, height) in pixels, or one number for both.

    `push` overrides {"side": 1 or -1, "strength": m/s} of the same scene: everything else stays, so it gives the exact
    counterfactual. Strength 0 pushes nothing. Raises ValueError for an unknown scenario, size, frames or push.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario {scenario!r}: expected one of {', '.join(SCENARIOS)}")
    size = (size, size) if isinstance(size, int) else tuple(size)
    if min(size) < 8 or frames < 1 or seed < 0:
        raise ValueError(f"size {size}, frames {frames}, seed {seed}: expected 8 pixels, 1 frame, 0 at least")
    if unknown := set(push or {}) - {"side", "strength"}:
        raise ValueError(f"push has {', '.join(sorted(unknown))}; expected side, strength")
    rng = np.random.default_rng([seed, list(SCENARIOS).index(scenario)])
    scene = SCENARIOS[scenario](rng, frames)
    look_ = Look.random(rng, len(scene.things), outdoors=scenario == "driving")
    order = rng.permutation(len(scene.things))  # ids say nothing about who is pushed
    scene = reorder(scene, order)
    fov = math.radians(rng.uniform(30, 40) if scenario != "driving" else 50)
    if push:
        scene.side, scene.strength = push.get("side", scene.side), push.get("strength", scene.strength)
    focal = size[1] / 2 / math.tan(fov / 2)
    model = build(scene)
    if scene.path is None:
        cameras = np.repeat(frame_camera(scene, focal, size)[None], frames + 1, axis=0)
        poses, contacts, energy = roll_out(model, scene, frames)
    else:
        cameras, poses, contacts, energy = scene.camera_path, scene.path, [], []
    pushed = scene.pushed is not None and scene.strength > 0
    truth = dict(scene.truth)
    camera = np.array(truth.pop("camera_motion", (0, 0)), np.float32)
    meta = truth | {
        "scenario": scenario, "seed": seed, "pushed": scene.pushed + 1 if pushed else 0,
        "push": push_velocity(scene).tolist(), "side": scene.side, "strength": scene.strength if pushed else 0.0,
        "contacts": sorted([min(a, b) + 1, max(a, b) + 1, t] for a, b, t in contacts),
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


def write_clip(job: tuple[list[Path], str, int, int, tuple[int, int]]) -> None:
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
        return int(width), int(height or width)
    except ValueError:
        raise ValueError(f"--size {text}: expected WIDTHxHEIGHT, such as 128x64, or one number") from None


def main() -> None:
    parser = argparse.ArgumentParser("python -m clips.simulate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", metavar="DIR", help="where the clips go")
    add("--clips", type=int, default=64, help="how many (default %(default)s)")
    add("--scenario", default="dominoes", help=f"one or more of {','.join(SCENARIOS)} (default %(default)s)")
    add("--size", default="128x64", help="WIDTHxHEIGHT, or one number for a square (default %(default)s)")
    add("--frames", type=int, default=16, help="of a clip (default %(default)s)")
    add("--mirror", action="store_true", help="for training: the mirror image of every clip, too (default: no)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core, here %(default)s)")
    add("--seed", type=int, default=0, help="of the first clip; the next ones count up from it (default %(default)s)")
    arguments = parser.parse_args()
    folder, scenarios = Path(arguments.folder), arguments.scenario.split(",")
    try:
        size = parse_size(arguments.size)
        if unknown := set(scenarios) - set(SCENARIOS):
            raise ValueError(f"--scenario {','.join(sorted(unknown))}: expected some of {', '.join(SCENARIOS)}")
        if min(size) < 8 or arguments.clips < 1 or arguments.frames < 1 or arguments.workers < 1 or arguments.seed < 0:
            raise ValueError("--size, --clips, --frames, --workers, --seed: expected 8 pixels, 1, 1, 1, 0 at least")
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"clips.simulate: {error}", file=sys.stderr)
        sys.exit(2)
    jobs = []
    for i in range(arguments.clips):
        scenario, seed = scenarios[i % len(scenarios)], arguments.seed + i
        names = [f"{scenario}_{seed:08d}"] + [f"{scenario}_{seed:08d}_mirrored"] * arguments.mirror
        paths = [folder / f"{name}.safetensors" for name in names]
        if not all(path.exists() for path in paths):  # an interrupted run goes on where it was
            jobs.append((paths, scenario, seed, arguments.frames, size))
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for _ in tqdm(pool.imap_unordered(write_clip, jobs, chunksize=4), total=len(jobs), unit="clip"):
            pass


if __name__ == "__main__":
    main()
