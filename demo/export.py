"""Copies a trained model folder into demo/, in half precision.

python demo/export.py runs/demo
"""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from motion_dreamer import MotionDreamer  # noqa: E402
from svd import VAE, ImageEncoder  # noqa: E402

PARTS = {"vae": VAE, "image_encoder": ImageEncoder, "stage1": MotionDreamer, "stage2": MotionDreamer}

if __name__ == "__main__":
    for name, part in PARTS.items():
        part.from_pretrained(sys.argv[1], name, dtype=torch.float16).save_pretrained(HERE / name)
    size = sum(path.stat().st_size for path in HERE.rglob("*.safetensors"))
    print(f"{HERE}: {size / 1e6:.1f} MB of weights")
