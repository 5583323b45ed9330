"""What a training clip is, and where clips come from."""

from clips.clip import CAMERA_YAW_UNIT, Clip, ClipDataset, ResumableSampler, find_clips

__all__ = ["CAMERA_YAW_UNIT", "Clip", "ClipDataset", "ResumableSampler", "find_clips"]
