"""The scenes that are simulated: what stands where, what is pushed, and from where it is seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import mujoco
import numpy as np

from clips import traffic
from clips.camera import UP, look, project, rotations
from clips.clip import CAMERA_YAW_UNIT

FRAME_TIME = 0.1  # seconds between frames
FAR = 100.0  # metres; what no ray hits is there
BOX, SPHERE, CYLINDER, PLANE = (
    getattr(mujoco.mjtGeom, f"mjGEOM_{name}") for name in ("BOX", "SPHERE", "CYLINDER", "PLANE")
)
Part = tuple[int, tuple[float, ...], tuple[float, ...]]  # geom type, half sizes, centre in the frame of its body


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
    other: int | None = None  # index of the thing that the ego car meets
    tempers: list[dict] = field(default_factory=list)  # what each thing on the road wishes: traffic.Temper
    truth: dict = field(default_factory=dict)  # what else belongs into the clip's meta

    @property
    def hidden(self) -> dict:
        """What decides the motion and no picture shows."""
        if self.path is not None:
            return {"tempers": self.tempers}
        return {"friction": self.friction, "density": [thing.density for thing in self.things]}


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


CAR: list[Part] = [
    (BOX, (2.1, 0.9, 0.45), (0, 0, 0)), (BOX, (1.15, 0.8, 0.35), (-0.2, 0, 0.75)),
    *[(SPHERE, (0.35, 0, 0), (x, y, -0.4)) for x in (-1.3, 1.3) for y in (-0.75, 0.75)],
]  # fmt: skip
WALKER: list[Part] = [
    *[(CYLINDER, (0.11, 0.45, 0), (0, y, -0.3)) for y in (-0.13, 0.13)],
    (CYLINDER, (0.25, 0.35, 0), (0, 0, 0.4)), (SPHERE, (0.16, 0, 0), (0, 0, 0.9)),
]  # fmt: skip
MIDDLE = 0.75  # metres above the road, of both


def streetside(rng: np.random.Generator, case: traffic.Case) -> list[tuple[Part, float]]:
    """Houses on both sides, none in a side road; and what a case needs on the road."""
    other, scenery = case.users[1], []
    for k in range(14):
        size = rng.uniform(2, [4.5, 4, 7])
        place = np.array([5 + 5 * (k // 2) + rng.uniform(-1, 1), (-1) ** k * rng.uniform(10, 13), 0])
        if other.axis == 0 or abs(place[0] - other.place[0]) > size[0] + 3.5:
            x, y, _ = traffic.on_road(place, case.curvature)
            scenery.append(((BOX, tuple(size), (x, y, size[2])), rng.uniform(0.35, 0.75)))
    if case.name == "walk":
        for d in np.arange(-2.7, 3, 0.9):
            scenery.append(((BOX, (1.2, 0.22, 0.01), (other.place[0], d, 0)), 0.95))
    if case.name == "merge":
        x, y, _ = traffic.on_road(np.array([other.ends + traffic.CLOSED + 0.3, other.lane, 0]), case.curvature)
        scenery.append(((BOX, (0.3, 0.9, 0.5), (x, y, 0.5)), 0.95))
    return scenery


def driving(
    rng: np.random.Generator, frames: int, hidden: np.random.Generator | None = None, **told: int | str
) -> Scene:
    """The camera is on a car in traffic that answers to it: one of the cases of clips/traffic.py.

    `told` overrides the ego car's motion and the other's: see traffic.OVERRIDES. `hidden` redraws what the others wish.
    """
    names = list(traffic.CASES)
    share = 1 + 2 * (np.array(names) == "follow")  # its lead car is told three things: nothing, its speed, its lane
    case = traffic.draw(rng, str(rng.choice(names, p=share / share.sum())))
    told = traffic.in_order(case.told | told)
    drive = traffic.drive(case, told, frames, FRAME_TIME)
    if hidden:
        case, drive = traffic.twin(case, told, drive, FRAME_TIME, hidden)
    ego, *others = np.moveaxis(traffic.on_road(drive.poses, case.curvature), 1, 0)
    path = np.zeros((frames + 1, len(others), 7))
    for i, (x, y, turn) in enumerate(np.moveaxis(others, -1, 1)):
        path[:, i] = np.stack([x, y, 0 * x + MIDDLE, np.cos(turn / 2), 0 * x, 0 * x, np.sin(turn / 2)], -1)
    parts = [WALKER if user.manner is traffic.WALKER else CAR for user in case.users[1:]]
    things = [Thing(parts[i], path[0, i, :3]) for i in range(len(others))]
    eyes = [np.array([*(place + 0.5 * heading(turn)[:2]), 1.6]) for *place, turn in ego]
    camera = np.stack([look(eye, heading(turn) - 0.08 * UP) for eye, (*_, turn) in zip(eyes, ego, strict=True)])
    way = np.linalg.norm(np.diff(camera[:, 0], axis=0), axis=1)
    motion = np.stack([way, -np.diff(ego[:, 2]) / CAMERA_YAW_UNIT], axis=1)  # yaw to the right is positive
    return Scene(
        things, path=path, camera_path=camera, scenery=streetside(rng, case), other=0,
        tempers=[user.temper._asdict() for user in case.users[1:]],
        truth={
            "camera_motion": motion.tolist(), "case": case.name, "told": told,
            "order": [("ego", "other")[k] for k in drive.order], "speeds": drive.speeds[:, :2].round(3).tolist(),
        },
    )  # fmt: skip


def branch(rng: np.random.Generator, frames: int) -> Scene:
    """A row of dominoes whose last hits two: from there, two rows go on. Some branches have a gap that stops them."""
    height, width, thickness = 0.6, rng.uniform(0.46, 0.52), rng.uniform(0.11, 0.15)
    step = thickness + rng.uniform(0.3, 0.4) * height
    trunk, spread = int(rng.integers(2, 4)), rng.uniform(0.4, 0.6)
    parts = [(BOX, (thickness / 2, width / 2, height / 2), (0, 0, 0))]
    slim = [(BOX, (thickness / 2, 0.38 * width, height / 2), (0, 0, 0))]
    things = [on_floor(parts, i * step, rng.normal(0, 0.005), rng.normal(0, 0.02)) for i in range(trunk)]
    wide = rng.choice([0, 1, -1], p=[0.6, 0.2, 0.2])  # neither, the branch to the left, the one to the right
    for turn in (1, -1):
        site = np.array([trunk * step, turn * 0.42 * width, 0])
        for i in range(2):
            things.append(on_floor(slim, *site[:2], turn * spread * (0.4 + 0.6 * i) + rng.normal(0, 0.02)))
            site = site + heading(turn * spread) * (step + (0.9 * height if turn == wide else 0.0))
    kind = rng.choice(3, p=[0.7, 0.2, 0.1])  # the first of the row, the end of a branch, none
    return Scene(
        things, [0, trunk + 1 + 2 * int(rng.integers(2)), None][kind], side=[1, -1, 1][kind],
        strength=rng.uniform(0.9, 2.2), lever=2 / height, friction=rng.uniform(0.3, 0.4),
        azimuth=rng.choice([-1, 1]) * rng.uniform(0.6, 1.1), pitch=math.radians(rng.uniform(34, 44)),
        extra=[np.array([-0.4, 0, 0.1]), *(things[trunk + i].position + [0.4, 0, -0.2] for i in (1, 3))],
        truth={"wide_gap": bool(wide), "height": height},
    )  # fmt: skip


def tower(rng: np.random.Generator, frames: int) -> Scene:
    """A ball rolls at a tower of blocks. A fifth of the balls goes past it."""
    radius, top = rng.uniform(0.17, 0.22), 0.0
    things = [Thing([(SPHERE, (radius, 0, 0), (0, 0, 0))], np.array([-1.0, 0, radius]), density=1500.0)]
    for _ in range(int(rng.integers(3, 6))):
        parts = [(BOX, (*rng.uniform(0.13, 0.19, 2), rng.uniform(0.1, 0.15)), (0, 0, 0))]
        things.append(on_floor(parts, 0.1 + rng.normal(0, 0.015), rng.normal(0, 0.015), rng.normal(0, 0.15), top))
        top += 2 * half_height(parts)
    miss = rng.choice([0.0, rng.uniform(0.45, 0.7) * rng.choice([-1, 1])], p=[0.8, 0.2])
    return Scene(
        things, 0, heading(rng.normal(0, 0.06) + miss), 1, rng.uniform(1.8, 4.5), lever=1 / radius,
        friction=rng.uniform(0.3, 0.5), azimuth=rng.uniform(-0.6, 0.6), pitch=math.radians(rng.uniform(15, 25)),
        extra=[np.array([0.9, -0.3, 0]), np.array([0.9, 0.3, 0])],
    )  # fmt: skip


SCENARIOS: dict[str, Callable[..., Scene]] = {
    scene.__name__: scene for scene in (dominoes, collide, drop, roll, support, contain, link, driving, branch, tower)
}
BY_THEMSELVES = ("drop", "roll", "driving")  # where things move without a push


# ----------------------------------------------------------------------------------------------- from where it is seen


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


# ----------------------------------------------------------------------------------------- what the picture cannot show


def redraw_hidden(scene: Scene, scenario: str, rng: np.random.Generator, frames: int) -> None:
    """Gives the scene the friction and the densities of another draw of its scenario: a twin, which looks the same.

    They come from the scenario itself, so that a twin is as likely as the scene for whoever sees only the picture.
    (What drives has neither: its scenario redraws what the others wish.)"""
    other = SCENARIOS[scenario](rng, frames)
    scene.friction = other.friction
    for thing in scene.things:
        alike = [some for some in other.things if some.parts[0][0] == thing.parts[0][0]] or other.things
        thing.density = alike[rng.integers(len(alike))].density  # a tower's ball is heavy, its blocks are not
