"""Pictures, exact flow, ids and depth of a simulated scene, by MuJoCo's ray casting."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import mujoco
import numpy as np

from clips.camera import project, rotations
from clips.scenes import FAR, Scene


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
