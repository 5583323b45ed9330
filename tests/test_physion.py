"""clips/physion.py: trials to clips; flow in closed form.

Files are written here as the generator (neuroailab/tdw_physics) writes them, whatever the reader thinks. Physion:
encoded pictures, but depth as three bytes a pixel; names without an ending; frames from 0000. Physion 1.5 (at 868d89f):
the names of pictures, matrices and poses end in _cam and the number of the camera, also of a single one; depth is a
float array in metres; frames from 0001, 10 ms each; a group "azimuth" beside the others.
"""

import io
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_annotate import names_in, noise, stand_in_torchvision

from clips import Clip, ClipDataset, physion


def command(*words) -> None:
    """What `python -m clips.physion WORDS` does, but for the printing of errors."""
    physion.run_physion(physion.parse_arguments([str(word) for word in words]))


def test_h5py_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)  # importing it raises ImportError
    with pytest.raises(ValueError, match=r"^physion needs h5py: pip install h5py$"):
        physion.read_trial(Path("x"), physion.Cut(), None, None)


def test_depth_bytes_by_hand():
    values = np.array([[[128, 0, 0], [1, 2, 3], [0, 0, 0], [255, 255, 255]]], np.uint8)
    expected = [49.95, 99.9 / 256 * (1 + 2 / 256 + 3 / 65536), 0.1, 99.9 * (1 - 2**-24)]
    assert physion.depth_from_bytes(values)[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_ids_are_exact_colors():
    table = np.array([[10, 20, 30], [0, 0, 0], [30, 20, 10]], np.uint8)
    pixels = np.array([[[10, 20, 30], [0, 0, 0], [30, 20, 10], [10, 20, 31], [10, 0, 0]]], np.uint8)
    assert physion.ids_from_colors(pixels, table).tolist() == [[1, 0, 3, 0, 0]]


def test_more_objects_than_ids_are_refused():
    table = np.stack([np.arange(256), np.arange(256), np.full(256, 9)], axis=1).astype(np.uint8)
    assert physion.trial_ids([table[None, :255]], table[:255]).tolist() == [[[*range(1, 256)]]]
    with pytest.raises(ValueError, match="has 256 objects, 255 at most fit a clip"):
        physion.trial_ids([table[None]], table)


def test_depth_and_pose_of_each_object_by_hand():
    """The camera stands at 0 and looks along -z."""
    places = np.array([[1.0, 0, -2], [0, 1, -9], [0, 0, -50]])
    view = physion.View(np.eye(4), np.eye(4), places, np.zeros((3, 3, 3)))
    ids = np.array([[0, 1, 1, 2, 2]])
    assert physion.misplaced(np.array([[7, 2.5, 2.1, 8, 9]]), ids, view) == ""
    wrong = physion.misplaced(np.array([[7, 8, 8, 1.5, 1.5]]), ids, view)
    assert wrong == "its _depth pass has object 2 at 1.5 m, its pose at 9.0 m"
    wrong = physion.misplaced(np.array([[7, 14, 14, 1.5, 1.5]]), ids, view)
    assert wrong == "its _depth pass has object 1 at 14.0 m, its pose at 2.0 m"


def turned(vectors: np.ndarray, axis: np.ndarray, angle: float) -> np.ndarray:
    """Rodrigues' formula."""
    along = (vectors @ axis)[..., None] * axis
    return along + np.cos(angle) * (vectors - along) + np.sin(angle) * np.cross(axis, vectors)


def test_rotations_against_rodrigues():
    random = np.random.default_rng(0)
    for _ in range(20):
        axis, vector = random.normal(size=(2, 3))
        axis, angle = axis / np.linalg.norm(axis), random.uniform(-4, 4)
        quaternion = np.array([[*(np.sin(angle / 2) * axis), np.cos(angle / 2)]]) * random.uniform(0.5, 2)
        np.testing.assert_allclose(physion.rotations(quaternion)[0] @ vector, turned(vector, axis, angle), atol=1e-12)


COLORS = np.array([[200, 10, 30], [5, 90, 250], [0, 0, 0]], np.uint8)
OBJECT_IDS = np.array([41, 7, 99])  # the third is never seen
FOV = math.radians(55)


class Spheres:
    """Two spheres that roll and a floor at y = 0, seen by a pinhole camera; every value in closed form."""

    def __init__(self, height: int, width: int, moving_camera: bool) -> None:
        random = np.random.default_rng(5)
        self.height, self.width, self.moving_camera = height, width, moving_camera
        self.focal = height / 2 / math.tan(FOV / 2)
        self.radius = np.array([0.8, 0.5, 0.1])
        self.axes = random.normal(size=(3, 3))
        self.axes /= np.linalg.norm(self.axes, axis=1, keepdims=True)
        self.spin = np.array([0.11, -0.2, 0.0])

    def center(self, t: float) -> np.ndarray:
        return np.array([[-0.9 + 0.12 * t, 0.8, 0.3], [1.0, 0.5, -0.4 + 0.07 * t], [0, -9, 0]])

    def camera(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Eye, and the axes right, up, ahead; it goes ahead by 0.2 and turns to the right by 0.03 a frame."""
        t = t if self.moving_camera else 0
        yaw = 0.03 * t
        eye = np.array([0.1, 1.0, -5.0])
        for k in range(t):
            eye = eye + 0.2 * np.array([np.sin(0.03 * (k + 1)), 0, np.cos(0.03 * (k + 1))])
        right, ahead = np.array([np.cos(yaw), 0, -np.sin(yaw)]), np.array([np.sin(yaw), 0, np.cos(yaw)])
        return eye, np.stack([right, np.array([0, 1.0, 0]), ahead])

    def points(self, t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What each pixel sees: points [H, W, 3], ids [H, W] (0 = floor or wall at z = 30), depth [H, W]."""
        eye, axes = self.camera(t)
        y, x = np.mgrid[: self.height, : self.width].astype(float)
        x, y = x - (self.width - 1) / 2, (self.height - 1) / 2 - y
        rays = np.stack([x / self.focal, y / self.focal, np.ones_like(x)], axis=-1) @ axes  # depth 1 along the view
        with np.errstate(divide="ignore", invalid="ignore"):
            floor = np.where(rays[..., 1] < 0, -eye[1] / rays[..., 1], np.inf)
            depth = np.minimum(floor, (30 - eye[2]) / rays[..., 2])
        ids = np.zeros(depth.shape, int)
        for i, (center, radius) in enumerate(zip(self.center(t), self.radius, strict=True), start=1):
            a, b = (rays**2).sum(-1), rays @ (eye - center)
            root = b**2 - a * (((eye - center) ** 2).sum() - radius**2)
            hit = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
            nearer = (hit > 0) & (hit < depth)
            ids, depth = np.where(nearer, i, ids), np.where(nearer, hit, depth)
        return eye + rays * depth[..., None], ids, depth

    def flow(self, t: int, later: int) -> np.ndarray:
        points, ids, _ = self.points(t)
        moved = points.copy()
        for i in range(3):
            inside = ids == i + 1
            around = turned(points[inside] - self.center(t)[i], self.axes[i], self.spin[i] * (later - t))
            moved[inside] = self.center(later)[i] + around
        pixels = []
        for time, where in ((t, points), (later, moved)):
            eye, (right, up, ahead) = self.camera(time)
            z = (where - eye) @ ahead
            pixels.append([self.focal * ((where - eye) @ right) / z, -self.focal * ((where - eye) @ up) / z])
        return np.array(pixels[1]) - np.array(pixels[0])

    def quaternions(self, t: int) -> np.ndarray:
        half = (0.4 + self.spin * t)[:, None] / 2
        return np.concatenate([np.sin(half) * self.axes, np.cos(half)], axis=1)

    def matrices(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """World to camera (looks along -z) and projection, both as TDW's 16 numbers, row by row."""
        eye, (right, up, ahead) = self.camera(t)
        view, project = np.eye(4), np.zeros((4, 4))
        view[:3, :3] = right, up, -ahead
        view[:3, 3] = -view[:3, :3] @ eye
        near, far, focal = 0.1, 100.0, 1 / math.tan(FOV / 2)
        project[0, 0], project[1, 1] = focal * self.height / self.width, focal
        project[2, 2:], project[3, 2] = (-(far + near) / (far - near), -2 * far * near / (far - near)), -1
        return view.ravel().astype(np.float32), project.ravel().astype(np.float32)


def encoded(rgb: np.ndarray, kind: str = "PNG") -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, kind)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def depth_bytes(depth: np.ndarray) -> np.ndarray:
    whole = np.round(depth / 99.9 * 2**24).astype(np.int64)
    return np.stack([whole >> 16, whole >> 8 & 255, whole & 255], axis=-1).astype(np.uint8)


def write_trial(
    path: Path, scene: Spheres, frames: int = 7, view: int | None = None, without: tuple[str, ...] = (), **images
) -> Path:  # fmt: skip
    """A trial of Physion, or (view) of Physion 1.5 as seen by that camera. images: what a pass holds instead, by name:
    a function of its frame's number."""
    h5py = pytest.importorskip("h5py")
    ending, first = ("", 0) if view is None else (f"_cam{view}", 1)
    with h5py.File(path, "w") as file:
        static = file.create_group("static")
        static["object_ids"], static["object_segmentation_colors"] = OBJECT_IDS, COLORS
        static["stimulus_name"], static["target_id"], static["probe_id"] = "rolling", 7, 41
        static["zone_id"] = np.array([], int)
        if first:
            file["azimuth/cam_0"] = np.eye(4)
        for t in range(frames):
            frame = file.create_group(f"frames/{t + first:04d}")
            _, ids, depth = scene.points(t)
            passes = {"_img": encoded(noise(scene.height, scene.width, 3, seed=t)),
                      "_id": encoded(np.concatenate([[[0, 0, 0]], COLORS]).astype(np.uint8)[ids]),
                      "_depth": depth.astype(np.float32) if first else depth_bytes(depth)}  # fmt: skip
            passes |= {name: tell(t) for name, tell in images.items()}
            for name in set(passes) - set(without):
                frame.create_dataset(f"images/{name}{ending}", data=passes[name], compression="gzip")
            if "camera_matrices" not in without:
                matrix, projection = scene.matrices(t)
                frame[f"camera_matrices/camera_matrix{ending}"] = matrix
                frame[f"camera_matrices/projection_matrix{ending}"] = projection
            frame[f"objects/positions{ending}"] = scene.center(t).astype(np.float32)
            frame[f"objects/rotations{ending}"] = scene.quaternions(t).astype(np.float32)
            pairs = {2: [[7, 41]], 3: [[41, 7], [99, 7], [41, 1234]], 4: [[41, 99]]}.get(t, [])
            frame["collisions/object_ids"] = np.array(pairs, int).reshape(-1, 2)
            states = [b"exit" if t == 4 else b"enter"] * len(pairs)
            frame.create_dataset("collisions/states", data=np.array(states, "S5"))
            frame["labels/target_contacting_zone"], frame["labels/trial_timeout"] = t == 5, False
            frame["labels/target_delta_position"] = np.zeros(3)
    return path


def trial(path: Path, **cut) -> Clip:
    return physion.read_trial(path, physion.Cut(**cut), None, physion.depth_annotator("none", ""))


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize(("view", "step"), [(None, 1), (0, 1), (None, 2)])
def test_a_trial_has_exact_flow(tmp_path, moving, view, step):
    scene = Spheres(33, 47, moving)
    clip = trial(write_trial(tmp_path / "t.hdf5", scene, view=view), step=step, frames=3)
    for k in range(3):
        _, ids, depth = scene.points(k * step)
        np.testing.assert_array_equal(clip.segmentation[k], ids)
        np.testing.assert_allclose(clip.depth[k], depth, atol=1e-4)
        np.testing.assert_allclose(clip.flow[k], scene.flow(k * step, (k + 1) * step), atol=2e-3)
        np.testing.assert_array_equal(clip.rgb[k], noise(33, 47, 3, seed=k * step))
    assert set(np.unique(clip.segmentation)) == {0, 1, 2} and np.abs(clip.flow).max() > 1
    assert clip.fps == (30 if view is None else 100) / step  # a frame of Physion 1.5 is 10 ms
    if moving:
        np.testing.assert_allclose(clip.camera, camera_of(scene, step), atol=1e-5)
    else:
        assert (clip.flow.transpose(1, 0, 2, 3)[:, clip.segmentation == 0] == 0).all() and not clip.camera.any()


def camera_of(scene: Spheres, step: int = 1, frames: int = 3) -> np.ndarray:
    """How far the eye goes along the way it looks afterwards, and the angle between both ways, by their dot product;
    [frames, 2]."""
    moves = []
    for k in range(frames):
        (eye, axes), (later, turned_axes) = scene.camera(k * step), scene.camera((k + 1) * step)
        moves.append([(later - eye) @ turned_axes[2], math.acos(min(1, axes[2] @ turned_axes[2])) / 0.1])
    return np.array(moves)


class Stops(Spheres):
    """Its camera stands still from frame 3 on."""

    def camera(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        return super().camera(min(t, 3))


def test_windows_of_a_trial_have_their_own_camera_motion(tmp_path):
    scene = Stops(16, 21, True)
    trial(write_trial(tmp_path / "t.hdf5", scene, frames=7), frames=6).save(tmp_path / "t.safetensors")
    clips, steps = ClipDataset(tmp_path, frames=3), camera_of(scene, frames=6)
    for start in range(4):
        expected = steps[start : start + 3].mean(axis=0)
        np.testing.assert_allclose(clips[(0, start)]["camera"], expected, atol=1e-5)
    assert steps[:3].min() > 0.19 and not steps[3:].any()


def test_the_last_frame_of_a_trial_repeats_its_flow(tmp_path):
    scene = Spheres(16, 21, True)
    clip = trial(write_trial(tmp_path / "t.hdf5", scene, frames=4))
    assert len(clip.rgb) == 4
    np.testing.assert_allclose(clip.camera, camera_of(scene)[[0, 1, 2, 2]], atol=1e-5)
    np.testing.assert_array_equal(clip.flow[3], clip.flow[2])
    np.testing.assert_allclose(clip.flow[2], scene.flow(2, 3), atol=2e-3)


def test_truth_of_a_trial(tmp_path):
    path = write_trial(tmp_path / "t.hdf5", Spheres(16, 21, False))
    meta = trial(path, frames=5).meta
    assert meta["contacts"] == [[1, 2, 1], [2, 3, 2]]  # seen at frames 2 and 3: in the steps that lead there
    assert meta["labels"] == {"target_contacting_zone": True, "trial_timeout": False}  # any, over the whole trial
    assert (meta["target"], meta["probe"], meta["zone"]) == (2, 1, 0)
    assert (meta["scenario"], meta["source"]) == ("physion", "t.hdf5")
    assert trial(path, start=1, step=3, frames=2).meta["contacts"] == [[1, 2, 0], [2, 3, 0]]
    assert trial(path, start=3, frames=2).meta["contacts"] == [[1, 2, 0], [2, 3, 0]]
    assert trial(path, start=4, frames=2).meta["contacts"] == []


@pytest.mark.parametrize("size", [(94, 66), (24, 17), (20, 33)])
def test_a_resized_trial(tmp_path, size):
    clip = trial(write_trial(tmp_path / "t.hdf5", Spheres(33, 47, True)), frames=2)
    small = physion.resize_clip(clip, size)
    left, top, right, bottom = physion.crop_box(47, 33, size)
    scale = size[0] / (right - left)
    assert small.rgb.shape == (2, size[1], size[0], 3) and (small.fps, small.meta) == (clip.fps, clip.meta)
    for row, column in [(0, 0), (size[1] // 2, size[0] // 3), (size[1] - 1, size[0] - 1)]:
        x, y = int(left + (column + 0.5) / scale), int(top + (row + 0.5) / scale)
        np.testing.assert_allclose(small.flow[:, :, row, column], clip.flow[:, :, y, x] * scale, rtol=1e-5)
        np.testing.assert_array_equal(small.segmentation[:, row, column], clip.segmentation[:, y, x])
        np.testing.assert_array_equal(small.depth[:, row, column], clip.depth[:, y, x])


def test_physion_from_the_command_line(tmp_path):
    scene = Spheres(33, 47, False)
    paths = [write_trial(tmp_path / f"{name}.hdf5", scene, view=view) for name, view in (("a", None), ("b", 0))]
    words = [*paths, "--out", tmp_path / "out", "--step", 2, "--frames", 3, "--size", "94x66"]
    command(*words)
    assert names_in(tmp_path / "out") == ["a.safetensors", "b.safetensors"]
    clip = Clip.load(tmp_path / "out" / "b.safetensors")
    np.testing.assert_allclose(clip.flow[1][:, ::2, ::2], 2 * scene.flow(2, 4), atol=0.02)  # half precision
    before = (tmp_path / "out" / "a.safetensors").stat().st_mtime_ns
    command(*words)
    assert (tmp_path / "out" / "a.safetensors").stat().st_mtime_ns == before


def test_a_trial_without_depth_needs_an_estimator(tmp_path, monkeypatch):
    path = write_trial(tmp_path / "t.hdf5", Spheres(33, 47, False), without=("_depth",))
    words = [path, "--out", tmp_path / "out", "--frames", 3]
    with pytest.raises(ValueError, match=r"t\.hdf5: has no depth, so no exact flow; give --flow raft"):
        command(*words)
    assert not (tmp_path / "out").exists()
    stand_in_torchvision(monkeypatch)
    command(*words, "--flow", "raft")
    clip = Clip.load(tmp_path / "out" / "t.safetensors")
    expected = np.stack([clip.rgb[:-1, ..., 0], clip.rgb[1:, ..., 2]], axis=1) / 127.5 - 1
    np.testing.assert_allclose(clip.flow[:2], expected, atol=1e-3)
    np.testing.assert_array_equal(clip.flow[2], clip.flow[1])
    assert (clip.depth == 1).all() and set(np.unique(clip.segmentation)) == {0, 1, 2}


def test_cloth_is_not_rigid(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = write_trial(tmp_path / "pilot_Drape_0001.hdf5", Spheres(16, 21, False))
    with pytest.raises(ValueError, match=r"Drape_0001\.hdf5: shows cloth \(drape\).*; give --flow raft or a folder"):
        trial(path)
    path = write_trial(tmp_path / "0001.hdf5", Spheres(16, 21, False))
    with h5py.File(path, "a") as file:
        file["static/stimulus_name"][()] = "pilot_it2_drape_1"
    with pytest.raises(ValueError, match="shows cloth"):
        trial(path)


@pytest.mark.parametrize(
    ("without", "words", "message"),
    [
        (("_id",), [], "has no _id pass"),
        (("_img",), [], "has no _img pass"),
        (("camera_matrices",), [], "has no poses or camera, so no exact flow; give --flow raft"),
        ((), ["--frames", 8], "has 7 frames, --start 0 --step 1 --frames 8 needs 8"),
        ((), ["--start", 6], "has 7 frames, --start 6 --step 1 --frames 2 needs 8"),
        ((), ["--step", 0], "--step 0: expected 1 at least"),
        ((), ["--view", -1], "--view -1: expected 0 at least"),
        ((), ["--fps", 0], "--fps 0: expected a number above 0"),
        ((), ["--fps", "nan"], "--fps nan: expected a number above 0"),
        ((), ["--view", 1], "has no _img pass of --view 1, but _img$"),
        ((), ["--flow", "nowhere"], "--flow nowhere: expected raft, raft-small or a folder"),
    ],
)
def test_physion_refuses(tmp_path, without, words, message):
    path = write_trial(tmp_path / "t.hdf5", Spheres(16, 21, False), without=without)
    with pytest.raises(ValueError, match=message):
        command(path, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--step", 2), "step = 1, now step = 2"),
        (("--start", 1), "start = 0, now start = 1"),
        (("--size", "8x8"), "size = 16x16, now size = 8x8"),
        (("--frames", 3), "frames = None, now frames = 3"),
    ],
)
def test_clips_of_other_settings_are_not_mixed(tmp_path, words, told):
    path, out = write_trial(tmp_path / "t.hdf5", Spheres(21, 16, False)), tmp_path / "out"
    told_first = path, "--out", out, "--size", "16x16"
    command(*told_first)
    before = (out / "t.safetensors").read_bytes()
    command(*told_first)  # with the same ones, it is there
    with pytest.raises(ValueError, match=f"out/t.safetensors: was made with {told}: take another --out"):
        command(*told_first, *words)
    assert (out / "t.safetensors").read_bytes() == before


def test_of_several_trials_the_damaged_one_is_told_and_the_others_are_done(tmp_path, capsys, monkeypatch):
    pytest.importorskip("h5py")
    (tmp_path / "a.hdf5").write_bytes(b"no such format" * 9)
    write_trial(tmp_path / "b.hdf5", Spheres(16, 21, False))
    told = ["clips.physion", tmp_path / "a.hdf5", tmp_path / "b.hdf5", "--out", tmp_path / "out"]
    for _ in range(2):  # the second time, the good one is there
        monkeypatch.setattr(sys, "argv", [str(word) for word in told])
        with pytest.raises(SystemExit) as end:
            physion.main()
        out, error = capsys.readouterr()
        assert end.value.code == 2 and "1 of 2 trials done" in out
        assert [line for line in error.splitlines() if "clips.physion: " in line and "a.hdf5: " in line]
        assert names_in(tmp_path / "out") == ["b.safetensors"]


def test_damaged_trials_are_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "a.hdf5").write_bytes(b"no such format" * 9)
    with pytest.raises(ValueError, match=r"a\.hdf5: "):
        trial(tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        file["static/object_ids"] = OBJECT_IDS
    with pytest.raises(ValueError, match=r"b\.hdf5: is no trial as .*frames"):
        trial(tmp_path / "b.hdf5")
    path = write_trial(tmp_path / "c.hdf5", Spheres(16, 21, False))
    with h5py.File(path, "a") as file:
        stored = file["frames/0001/images/_id"][:]
        del file["frames/0001/images/_id"]
        file["frames/0001/images/_id"] = stored[:30]
    with pytest.raises(ValueError, match=r"c\.hdf5: "):
        trial(path)
    path = write_trial(tmp_path / "d.hdf5", Spheres(16, 21, False))
    with h5py.File(path, "a") as file:
        kept = file["frames/0001/objects/positions"][:]
        file["frames/0001/objects/positions"][...] = np.nan
    with pytest.raises(ValueError, match=r"d\.hdf5: flow holds a value that is not finite"):
        trial(path)
    with h5py.File(path, "a") as file:
        file["frames/0001/objects/positions"][...] = kept
        file["frames/0001/objects/rotations"][...] = 0  # numpy says nothing of the division: the line alone is printed
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"d\.hdf5: flow holds a value that is not finite"):
        warnings.simplefilter("error")
        trial(path)
    with h5py.File(path, "a") as file:
        for name in ("positions", "rotations"):  # of one object alone
            stored = file[f"frames/0001/objects/{name}"][:1]
            del file[f"frames/0001/objects/{name}"]
            file[f"frames/0001/objects/{name}"] = stored
    with pytest.raises(ValueError, match=r"d\.hdf5: "):
        trial(path)


# --------------------------------------------------------------------------------------------- passes as they are found


def test_another_camera_of_a_trial(tmp_path):
    """A file holds one camera's view or several; nothing of one is mixed with another's."""
    h5py = pytest.importorskip("h5py")
    scene, still = Spheres(33, 47, True), Spheres(33, 47, False)
    alone, both = (write_trial(tmp_path / f"{name}.hdf5", scene, view=1) for name in "ab")
    other = write_trial(tmp_path / "c.hdf5", still, view=0)
    with h5py.File(both, "a") as file, h5py.File(other) as source:
        for number, frame in source["frames"].items():
            for group in ("images", "camera_matrices", "objects"):
                for name in frame[group]:
                    source.copy(f"frames/{number}/{group}/{name}", file[f"frames/{number}/{group}"])
    with pytest.raises(ValueError, match=r"a\.hdf5: has no _img pass of --view 0, but _img_cam1$"):
        trial(alone, frames=2)
    with pytest.raises(ValueError, match=r"b\.hdf5: has no _img pass of --view 2, but _img_cam0, _img_cam1$"):
        trial(both, frames=2, view=2)
    for path, view, seen in ((alone, 1, scene), (both, 1, scene), (both, 0, still)):
        clip = trial(path, frames=2, view=view)
        np.testing.assert_allclose(clip.depth[1], seen.points(1)[2], atol=1e-4)
        np.testing.assert_allclose(clip.flow[1], seen.flow(1, 2), atol=2e-3)
    with h5py.File(both, "a") as file:
        del file["frames/0002/images/_id_cam1"]
    with pytest.raises(ValueError, match=r"b\.hdf5: has no _id pass"):
        trial(both, frames=2, view=1)
    command(both, "--out", tmp_path / "out", "--view", 0, "--frames", 2, "--step", 2, "--fps", 30)
    assert Clip.load(tmp_path / "out" / "b.safetensors").fps == 15


def smooth(t: int) -> np.ndarray:
    """A picture that JPG hardly changes."""
    ramp = np.linspace(20, 230, 47)[None, :, None] * np.array([0.5, 1, 0.8]) + np.arange(33)[:, None, None] + t
    return ramp.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("view", [None, 0])
@pytest.mark.parametrize("kind", ["array", "upside down", "PNG", "beside a JPG"])
def test_depth_that_is_the_picture_is_refused(tmp_path, monkeypatch, kind, view):
    """As in released files. It would read as depth: 2 to 98 m."""
    holds = {"array": smooth, "upside down": lambda t: smooth(t)[::-1], "PNG": lambda t: encoded(smooth(t))}
    images = {"_img": lambda t: encoded(smooth(t), "JPEG" if kind == "beside a JPG" else "PNG")}
    images["_depth"] = holds.get(kind, smooth)
    path = write_trial(tmp_path / "t.hdf5", Spheres(33, 47, False), view=view, **images)
    words = [path, "--out", tmp_path / "out", "--frames", 2]
    with pytest.raises(ValueError, match=r"t\.hdf5: its _depth pass holds the picture, so no exact flow; give --flow"):
        command(*words)
    assert not (tmp_path / "out").exists()
    stand_in_torchvision(monkeypatch)
    command(*words, "--flow", "raft")  # who brings estimators does not need the pass
    assert (Clip.load(tmp_path / "out" / "t.safetensors").depth == 1).all()


def test_depth_that_poses_contradict_is_refused(tmp_path):
    """Whatever else a pass may hold: shares of the far plane, colours of another pass, millimetres."""
    scene = Spheres(33, 47, False)

    def depth(t: int) -> np.ndarray:
        return scene.points(t)[2]

    wrong = {
        "shares": lambda t: (depth(t) / 100).astype(np.float32),
        "millimetres": lambda t: (depth(t) * 1000).astype(np.float32),
        "noise": lambda t: noise(33, 47, 3, seed=50 + t),
    }
    for name, tell in wrong.items():
        path = write_trial(tmp_path / f"{name}.hdf5", scene, view=0, _depth=tell)
        with pytest.raises(ValueError, match=r"its _depth pass has object \d at .* m, its pose at .* m, so no exact"):
            trial(path, frames=2)
    for name, tell in {"single": depth, "half": lambda t: depth(t).astype(np.float16)}.items():
        clip = trial(write_trial(tmp_path / f"{name}.hdf5", scene, view=0, _depth=tell), frames=2)
        np.testing.assert_allclose(clip.depth[0], depth(0), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "tell", "message"),
    [
        ("_depth", lambda t: np.ones((33, 47), np.uint16), r"its _depth pass is uint16 \[33, 47\]"),
        ("_depth", lambda t: np.ones((33, 47, 3), np.float32), r"its _depth pass is float32 \[33, 47, 3\]"),
        ("_depth", lambda t: encoded(smooth(t)[..., 0]), r"its _depth pass is PNG \(L\), expected"),
        ("_depth", lambda t: encoded(smooth(t), "JPEG"), r"its _depth pass is JPEG \(RGB\), expected"),
        ("_depth", lambda t: np.full((33, 47), -1.0), "its _depth pass holds -1, expected metres"),
        ("_depth", lambda t: np.full((33, 47), np.nan), "its _depth pass has object . at nan m"),
        ("_depth", lambda t: np.ones((32, 47), np.float32), r"its _depth pass is \[32, 47\], its _img pass"),
        ("_id", lambda t: encoded(smooth(t), "JPEG"), r"its _id pass is JPEG \(RGB\), expected"),
        ("_id", lambda t: encoded(smooth(t)), "its _id pass shows no colour of static/object_segmentation_colors"),
        ("_img", lambda t: np.zeros((33, 47), np.uint8), r"its _img pass is uint8 \[33, 47\]"),
        ("_img", lambda t: np.zeros(90, np.uint8), "its _img pass is no picture"),
    ],
)
def test_a_pass_without_a_clear_meaning_is_refused(tmp_path, name, tell, message):
    path = write_trial(tmp_path / "t.hdf5", Spheres(33, 47, False), frames=3, **{name: tell})
    with pytest.raises(ValueError, match=rf"t\.hdf5: {message}"):
        trial(path, frames=2)


def test_a_trial_in_which_nothing_is_seen_has_no_ids(tmp_path):
    scene = Spheres(33, 47, False)
    path = write_trial(tmp_path / "t.hdf5", scene, _id=lambda t: encoded(np.zeros((33, 47, 3), np.uint8)))
    assert not trial(path, frames=2).segmentation.any()
