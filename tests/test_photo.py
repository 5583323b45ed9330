"""inputs/photo.py: pictures, ids and depth that a user brings."""

import numpy as np
import pytest
import torch
from PIL import Image

from inputs import Arrows, Inputs, fit, read_depth, read_rgb, read_segmentation


def test_read_rgb_formats(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "plain.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "plain.png"), pixels)
    exif = picture.getexif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_rgb(tmp_path / "turned.png"), np.rot90(pixels, -1))
    clear = np.dstack([pixels, np.zeros((4, 6), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (read_rgb(tmp_path / "clear.png") == 255).all()
    Image.fromarray(np.full((2, 3), 0x8040, np.uint16)).save(tmp_path / "deep.png")
    assert (read_rgb(tmp_path / "deep.png") == 0x80).all()


def test_read_segmentation_gray_and_colour(tmp_path):
    ids = np.array([[0, 3, 200], [3, 3, 0]], np.uint8)
    Image.fromarray(ids).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_segmentation(tmp_path / "gray.png"), ids)
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)[np.array([[0, 1, 2], [1, 1, 0]])]
    Image.fromarray(colors).save(tmp_path / "color.png")
    np.testing.assert_array_equal(read_segmentation(tmp_path / "color.png"), [[0, 2, 1], [2, 2, 0]])
    Image.fromarray(colors[:1, 1:]).save(tmp_path / "full.png")  # nothing is black: no object becomes the background
    np.testing.assert_array_equal(read_segmentation(tmp_path / "full.png"), [[2, 1]])
    noise = np.random.default_rng(0).integers(256, size=(30, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="photo.png: has 901 colours"):
        read_segmentation(tmp_path / "photo.png")
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="large.png: holds the id 300"):
        read_segmentation(tmp_path / "large.png")


def test_read_depth(tmp_path):
    depth = np.array([[1000, 2500], [40000, 1]], np.uint16)
    Image.fromarray(depth).save(tmp_path / "d.png")
    np.testing.assert_array_equal(read_depth(tmp_path / "d.png"), depth)
    np.save(tmp_path / "d.npy", depth / 1000)
    np.testing.assert_allclose(read_depth(tmp_path / "d.npy"), depth / 1000, rtol=1e-6)
    Image.fromarray(depth * 0).save(tmp_path / "zero.png")
    with pytest.raises(ValueError, match="zero.png: holds the depth 0"):
        read_depth(tmp_path / "zero.png")
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="bad.npy"):
        read_depth(tmp_path / "bad.npy")


@pytest.mark.parametrize(
    ("said", "told", "moving"),
    [
        ({"arrows": []}, [], []),
        ({"arrows": [[5, 3]]}, [7], [7]),
        ({"arrows": [[2, 3]]}, [7], []),
        ({"arrows": [[5, 3]], "rest": "still"}, [7, 9], [7]),
        ({"arrows": [], "rest": "still"}, [7, 9], []),
    ],
)
def test_what_is_told_keeps_stay_from_nothing(said, told, moving):
    """F and mask on the model's canvas, after resizing, margin included."""
    ids = np.zeros((8, 20), np.uint8)
    ids[2:6, :5], ids[2:6, 12:18] = 7, 9  # one reaches the edge, which the margin repeats
    arrows = [{"start": [2, 3], "end": end, "instance": 7} for end in said["arrows"]]
    given = Arrows.from_dict(said | {"arrows": arrows, "camera": [0.5, -1]})
    rgb = np.zeros((8, 20, 3), np.uint8)
    inputs, canvas = fit(Inputs(rgb, given, given, torch.from_numpy(ids).long(), None, ""), 40, 40)
    found = inputs.told(5, canvas, "cpu")
    seen = found["segmentation"]
    assert found["depth"] is None and found["camera"].tolist() == [[0.5, -1]] and canvas.inner == (16, 40)
    assert found["image"].shape == (1, 3, 40, 40) and seen.shape == (1, 40, 40) and seen.unique().tolist() == [0, 7, 9]
    assert torch.equal(found["mask"][:, 0], torch.isin(seen, torch.tensor(told, dtype=torch.long)).float())
    assert torch.equal((found["F"] != 0).any(1), torch.isin(seen, torch.tensor(moving, dtype=torch.long)))


@pytest.mark.parametrize("read", [read_rgb, read_segmentation, read_depth])
def test_not_a_picture(read, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match="text.png: not an image"):
        read(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match="none.png: no such file"):
        read(tmp_path / "none.png")
