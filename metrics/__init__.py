"""Measures of generated motion and video, one function a figure: tensors in, dict out."""

from metrics.frechet import *  # noqa: F403
from metrics.motion import *  # noqa: F403
from metrics.physics import *  # noqa: F403
