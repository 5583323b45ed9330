"""What a training clip is, and where clips come from."""

import kernels  # noqa: F401 (kernels.threads: before torch)
from clips.clip import CAMERA_YAW_UNIT, Clip, ClipDataset, ResumableSampler, find_clips
from clips.maps import open_picture, read_depth, read_ids
from clips.motion import Motion, draft_video, render, unrender
from clips.pictures import CODEC_VERSION
from clips.video import SLOWER, frames_a_second, read_video

__all__ = [
    "CAMERA_YAW_UNIT",
    "CODEC_VERSION",
    "SLOWER",
    "Clip",
    "ClipDataset",
    "Motion",
    "ResumableSampler",
    "draft_video",
    "find_clips",
    "frames_a_second",
    "open_picture",
    "read_depth",
    "read_ids",
    "read_video",
    "render",
    "unrender",
]
