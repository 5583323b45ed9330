"""Copies a trained model folder into demo/, in half precision.

python demo/export.py runs/demo
"""

import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from motion_dreamer import MotionDreamer  # noqa: E402
from svd import VAE, ImageEncoder  # noqa: E402

PARTS = {"vae": VAE, "image_encoder": ImageEncoder, "stage1": MotionDreamer, "stage2": MotionDreamer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="DIR", help="a model folder that train.py wrote")
    source = parser.parse_args().model
    for name, part in PARTS.items():
        part.from_pretrained(source, name, dtype=torch.float16).save_pretrained(HERE / name)
    size = sum(path.stat().st_size for path in HERE.rglob("*.safetensors"))
    print(f"{HERE}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
