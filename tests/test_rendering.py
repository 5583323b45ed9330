"""clips/rays.py and clips/rendering.py against MuJoCo's own `mj_ray`, ray by ray, and a shader of a few lines."""

import hashlib
import math
import subprocess
import sys

import mujoco
import numpy as np
import pytest

import clips.simulate
from clips.camera import rotations
from clips.rendering import render
from clips.scenes import FAR, SCENARIOS

SIZE, FRAME = (128, 64), 2


class Shot:
    """One clip, what it was made of, and MuJoCo's state in one of its frames."""

    def __init__(self, scenario, seed):
        def keep(*told):
            self.model, self.scene, self.look, self.poses, self.cameras, self.focal, _ = told
            return render(*told)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clips.simulate, "render", keep)
            self.clip = clips.simulate.simulate(scenario, seed, FRAME + 1, SIZE)
        self.data, self.camera = mujoco.MjData(self.model), self.cameras[FRAME]
        free = [i for i, thing in enumerate(self.scene.things) if not thing.fixed]
        self.data.qpos[:] = self.poses[FRAME, free].ravel()
        mujoco.mj_forward(self.model, self.data)

    def ray(self, x, y):
        local = np.array([x - (SIZE[0] - 1) / 2, y - (SIZE[1] - 1) / 2, self.focal])
        return local / np.linalg.norm(local) @ self.camera[1:]

    def meet(self, origin, ray):
        """Geom (-1 = sky), point, normal."""
        geom, normal = np.zeros(1, np.int32), np.zeros(3)
        distance = mujoco.mj_ray(self.model, self.data, origin, ray, None, True, -1, geom, normal)
        return geom[0], origin + (min(distance, FAR) if geom[0] >= 0 else FAR) * ray, normal

    def thing(self, geom):
        return self.model.geom_bodyid[geom] - 1 if geom >= 0 else -1

    def paint(self, geom, point):
        """Colour before light."""
        thing, look = self.thing(geom), self.look
        if thing >= 0:
            local = rotations(self.poses[FRAME, thing, 3:]).T @ (point - self.poses[FRAME, thing, :3])
            return look.things[thing] * (0.94 + 0.06 * math.sin(14 * local.sum() / (10 if look.tile > 1 else 1)))
        if geom > 0:
            return np.full(3, self.scene.scenery[geom - 1][1])
        x, y = point[:2] / look.tile
        tone = (math.floor(x) + math.floor(y)) % 2
        if look.wood:
            plank = math.floor(2 * y)
            tone = 0.5 + 0.35 * math.sin(12.9898 * plank) + 0.15 * math.sin(23 * y + 1.5 * math.sin(2.1 * x + plank))
        return look.floor[0] * (1 - tone) + look.floor[1] * tone

    def quarter(self, x, y, right, down):
        """Colour of a quarter of a pixel: -1 or 1 right, -1 or 1 down."""
        geom, point, normal = self.meet(self.camera[0], self.ray(x + right / 4, y + down / 4))
        if geom < 0:
            return np.array([0.72, 0.82, 0.92])
        light = self.look.light + 0.03 * self.look.light[2] * np.array([right, down, 0])
        reach = np.linalg.norm(point - light)
        ray = (point - light) / reach
        lit = np.linalg.norm(self.meet(light, ray)[1] - light) > reach - 1e-3
        return self.paint(geom, point) * (0.45 + 0.65 * lit * max(-ray @ normal, 0))

    def color(self, x, y):
        mean = sum(self.quarter(x, y, right, down) for right in (-1, 1) for down in (-1, 1)) / 4
        return 255 * mean.clip(0, 1)


@pytest.fixture(scope="module")
def shots():
    return {name: Shot(name, seed) for seed, name in enumerate(SCENARIOS)}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_pixel_shows_what_mujoco_hits_there(shots, scenario):
    shot, ids, depth = shots[scenario], np.zeros(SIZE[::-1], int), np.zeros(SIZE[::-1])
    for y, x in np.ndindex(ids.shape):
        geom, point, _ = shot.meet(shot.camera[0], shot.ray(x, y))
        ids[y, x], depth[y, x] = shot.thing(geom) + 1, (point - shot.camera[0]) @ shot.camera[3]
    assert (shot.clip.segmentation[FRAME] == ids).all()
    np.testing.assert_allclose(shot.clip.depth[FRAME], depth, rtol=1e-6)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_999_of_1000_pixels_are_within_two_grey_levels_of_four_rays(shots, scenario):
    shot, random = shots[scenario], np.random.default_rng(0)
    ids = np.pad(shot.clip.segmentation[FRAME], 1, mode="edge")
    edge = np.zeros(SIZE[::-1], bool)
    for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
        edge |= ids[dy : dy + SIZE[1], dx : dx + SIZE[0]] != ids[1:-1, 1:-1]
    pixels = np.concatenate([np.argwhere(edge)[:500], np.stack([random.integers(0, n, 1500) for n in SIZE[::-1]], 1)])
    wrong = [np.abs(shot.color(x, y) - shot.clip.rgb[FRAME, y, x]).max() > 2.5 for y, x in pixels]
    assert len(pixels) > 1600 and sum(wrong) <= 2


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_flow_is_that_of_rigid_things_and_the_camera(shots, scenario):
    shot, seen, total = shots[scenario], 0, 0
    for y, x in np.random.default_rng(1).integers(0, SIZE[::-1], (400, 2)):
        geom, point, _ = shot.meet(shot.camera[0], shot.ray(x, y))
        if (thing := shot.thing(geom)) >= 0:
            before, after = shot.poses[FRAME : FRAME + 2, thing]
            local = rotations(before[3:]).T @ (point - before[:3])
            point = rotations(after[3:]) @ local + after[:3]
        right, down, ahead = shot.cameras[FRAME + 1][1:] @ (point - shot.cameras[FRAME + 1][0])
        there = shot.focal * np.array([right, down]) / ahead + (np.array(SIZE) - 1) / 2
        if ahead > 0.05:
            np.testing.assert_allclose(shot.clip.flow[FRAME, :, y, x], there - [x, y], rtol=1e-5, atol=1e-5)
            seen, total = seen + 1, total + np.abs(there - [x, y]).max()
    assert seen > 300 and total > 1


def test_processes_make_the_same_bytes_and_only_the_first_compiles():
    """Importing clips.rendering compiles; the processes that `python -m clips.simulate` starts find it on disk."""
    program = """
import hashlib
from clips.rays import draw
from clips.simulate import simulate
clip = simulate("collide", 4, 3, (64, 32))
print(sum(draw.stats.cache_misses.values()), hashlib.sha256(clip.rgb.tobytes() + clip.flow.tobytes()).hexdigest())
"""
    clip = clips.simulate.simulate("collide", 4, 3, (64, 32))
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert told == ["0", hashlib.sha256(clip.rgb.tobytes() + clip.flow.tobytes()).hexdigest()]
