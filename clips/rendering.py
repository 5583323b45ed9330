"""Pictures, exact flow, ids and depth of a simulated scene, by casting rays."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import mujoco
import numpy as np

from clips.camera import rotations
from clips.rays import GEOM, VIEW, draw
from clips.scenes import FAR, Scene

QUARTERS = np.array([[-0.5, -0.5, 0.0], [0.5, -0.5, 0.0], [-0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])


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


def geoms_of(model: mujoco.MjModel, data: mujoco.MjData, scene: Scene, look_: Look, origins: np.ndarray) -> np.ndarray:
    """[N] of rays.GEOM: where everything is in the frame that `data` holds, and its colour."""
    geoms, thing = np.zeros(model.ngeom, GEOM), model.geom_bodyid - 1
    geoms["kind"], geoms["thing"], geoms["size"], geoms["radius"] = (
        model.geom_type, thing, model.geom_size, model.geom_rbound,
    )  # fmt: skip
    geoms["center"], geoms["turn"] = data.geom_xpos, data.geom_xmat.reshape(-1, 3, 3)
    away = origins - geoms["center"][:, None]
    geoms["away"], geoms["local"] = away, away @ geoms["turn"]
    geoms["outside"] = (away**2).sum(-1) - geoms["radius"][:, None] ** 2
    for k, (_, grey) in enumerate(scene.scenery):
        geoms["color"][k + 1] = grey
    on = thing >= 0
    geoms["color"][on] = look_.things[thing[on]]
    geoms["stripe"] = 14 * data.xmat.reshape(-1, 3, 3).sum(2)[thing + 1] / (10 if look_.tile > 1 else 1)
    return geoms


def render(
    model: mujoco.MjModel, scene: Scene, look_: Look, poses: np.ndarray, cameras: np.ndarray, focal: float,
    size: tuple[int, int],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Poses [T + 1, N, 7] and cameras [T + 1, 4, 3] -> arrays of a Clip. Colour is the mean of 2x2 rays a pixel."""
    frames, (width, height) = len(poses) - 1, size
    data, turns, view = mujoco.MjData(model), rotations(poses[..., 3:]), np.zeros(1, VIEW)
    rgb, flow = np.zeros((frames, height, width, 3), np.uint8), np.zeros((frames, 2, height, width), np.float32)
    ids, depth = np.zeros((frames, height, width), np.uint8), np.zeros((frames, height, width), np.float32)
    view["focal"], view["far"], view["floor"] = focal, FAR, look_.floor
    view["tile"], view["wood"] = look_.tile, look_.wood
    lights = 0.06 * look_.light[2] * QUARTERS  # soft shadows
    view["lamp"], view["spread"], view["origins"][0, 1:] = look_.light, np.linalg.norm(lights[0]), look_.light + lights
    free, thing = [i for i, thing in enumerate(scene.things) if not thing.fixed], model.geom_bodyid - 1
    moves = (poses[1:] != poses[:-1]).any(axis=2)  # what rests has a flow of exactly zero
    for t in range(frames):
        data.qpos[:] = poses[t, free].ravel()
        mujoco.mj_kinematics(model, data)
        view["origins"][0, 0] = cameras[t, 0]
        view["positions"], view["axes"] = cameras[t : t + 2, 0], cameras[t : t + 2, 1:]
        geoms = geoms_of(model, data, scene, look_, view["origins"][0])
        on, pair = thing >= 0, slice(t, t + 2)
        geoms["turns"][on] = turns[pair, thing[on]].swapaxes(0, 1)
        geoms["places"][on] = poses[pair, thing[on], :3].swapaxes(0, 1)
        geoms["moves"][on] = moves[t, thing[on]]
        draw(geoms, view, rgb[t], flow[t], ids[t], depth[t])
    return {"rgb": rgb, "flow": flow, "segmentation": ids, "depth": depth}
