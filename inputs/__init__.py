"""What a person brings: arrows, and a picture of any size with ids and depth."""

from inputs.arrows import Arrow, Arrows, apply_shapes, arrows_to_flow, told_mask, told_to_stay
from inputs.examples import find_example
from inputs.photo import Canvas, Inputs, doubt_of, fit, read_depth, read_inputs, read_rgb, read_segmentation

__all__ = [
    "Arrow",
    "Arrows",
    "Canvas",
    "Inputs",
    "apply_shapes",
    "arrows_to_flow",
    "doubt_of",
    "find_example",
    "fit",
    "read_depth",
    "read_inputs",
    "read_rgb",
    "read_segmentation",
    "told_mask",
    "told_to_stay",
]
