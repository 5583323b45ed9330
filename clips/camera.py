"""A pinhole camera, and the rotations of rigid bodies."""

from __future__ import annotations

import numpy as np

UP = np.array([0.0, 0.0, 1.0])


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


def rotations(quaternions: np.ndarray) -> np.ndarray:
    """[..., 4] (w, x, y, z) -> [..., 3, 3], body to world."""
    w, x, y, z = np.moveaxis(quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))
