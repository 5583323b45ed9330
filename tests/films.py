"""Small videos for the tests: flat gray frames, which survive any codec, with times as a phone writes them."""

import subprocess

import imageio.v3 as imageio
import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe


def gray_levels(levels, height=24, width=36):
    return np.repeat(np.array(levels, np.uint8), height * width * 3).reshape(-1, height, width, 3)


def write_video(path, frames, fps):
    imageio.imwrite(path, frames, fps=fps, macro_block_size=1, quality=10)
    return path


def ffmpeg(*words):
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *map(str, words)], check=True, stdin=subprocess.DEVNULL)


def retimed(source, path, times):
    """The frames of `source` at other times, in milliseconds: a variable frame rate."""
    told = "+".join(f"eq(N\\,{number})*{time}" for number, time in enumerate(times))
    gif = path.suffix == ".gif"
    exact = ",split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none" if gif else ""
    base = ["-enc_time_base", "1/100" if gif else "1/1000"]
    ffmpeg("-i", source, "-vf", f"settb=1/1000,setpts={told}{exact}", "-fps_mode", "passthrough", *base, path)
    return path
