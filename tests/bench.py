"""The budgets, side by side in one run: `python tests/bench.py [--threads 2]`. No test: times depend on the machine.

Needs diffusers (`pip install diffusers`) for the UNet rows. Times are medians of alternating runs; peak memory is what
a process of its own holds beyond its start. With a GPU, the splatting and UNet rows are repeated there, the UNet's with
SVD itself in bfloat16; `--device cuda` prints these alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from splat import corners, softsplat  # noqa: E402
from svd import UNet, UNetConfig  # noqa: E402

WIDTHS = {"cpu": (64, 128, 256, 256), "cuda": (320, 640, 1280, 1280)}  # a small UNet; SVD's
LATENTS, FRAMES = (40, 72), 14  # 320x576


def clock(function: Callable, device: str) -> float:
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def alternate(functions: dict[str, Callable], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of each, after one round of warming up."""
    times = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            seconds = clock(function, device)
            if i:
                times[name].append(seconds)
    return {name: median(values) for name, values in times.items()}


def row(what: str, ours: float, against: float, unit: str, budget: str) -> None:
    print(f"| {what} | {ours:.4g} {unit} | {against:.4g} {unit} | {ours / against:.2f} | {budget} |", flush=True)


def bench_splat(device: str) -> None:
    """320x72x128 features of one clip, warped to 14 frames."""
    torch.manual_seed(0)
    B, C, H, W = 14, 320, 72, 128
    x, metric = torch.randn(1, C, H, W, device=device), torch.randn(1, 1, H, W, device=device)
    flow = torch.nn.functional.interpolate(torch.randn(B, 2, 9, 16, device=device) * 10, (H, W), mode="bilinear")
    out, flat = torch.empty(B, C, H * W, device=device), x.expand(B, -1, -1, -1).reshape(B, C, -1).contiguous()
    index = corners(flow, None, "average")[0].clamp(max=H * W - 1)  # [B, 4, H W]

    def scatter() -> None:
        out.zero_()
        for k in range(4):
            out.scatter_add_(2, index[:, k, None].expand(B, C, -1), flat)

    times = alternate({"ours": lambda: softsplat(x, flow, metric), "scatter": scatter, "copy": out.clone}, device, 5)
    if device == "cpu":
        row("softsplat / four scatter_add_", 1e3 * times["ours"], 1e3 * times["scatter"], "ms", "0.2")
        row("softsplat / one copy", 1e3 * times["ours"], 1e3 * times["copy"], "ms", "2.5")
    else:
        row("softsplat on the GPU / reading and writing its bytes", 1e3 * times["ours"], 1e3 * times["copy"], "ms", "2")


def unets(device: str) -> dict[str, Callable]:
    """The same weights in diffusers' UNet and ours, as functions of nothing."""
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    like = {"device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    size = {"block_out_channels": WIDTHS[device], "num_attention_heads": tuple(c // 64 for c in WIDTHS[device])}
    with torch.device(device):
        theirs, ours = UNetSpatioTemporalConditionModel(**size).to(**like), UNet(UNetConfig(**size)).to(**like)
    ours.load_state_dict(theirs.state_dict())
    x, c = torch.randn(1, FRAMES, 8, *LATENTS).to(**like), torch.full((1,), 0.3, device=device)
    context, ids = torch.randn(1, 1, 1024).to(**like), torch.tensor([[6, 127, 0.02]], device=device)

    def forward(model: torch.nn.Module) -> Callable:
        @torch.no_grad()
        def run() -> None:
            model(x, c, context, ids)

        return run

    def train(model: torch.nn.Module) -> Callable:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            out = model(x, c, context, ids)
            (out if isinstance(out, torch.Tensor) else out.sample).square().mean().backward()

        return run

    models = {"diffusers": theirs, "ours": ours}
    return {f"{name} {what.__name__}": what(model) for name, model in models.items() for what in (forward, train)}


def bench_unet(device: str, rounds: int) -> None:
    functions = unets(device)
    for what, budget in (("forward", "0.85"), ("train", "0.9")):
        pair = {name: functions[f"{name} {what}"] for name in ("diffusers", "ours")}
        times = alternate(pair, device, rounds)
        row(f"UNet {what} on {device}, time / diffusers", times["ours"], times["diffusers"], "s", budget)
        if device == "cuda":
            held = {name: peak_on_gpu(function) for name, function in pair.items()}
            row(f"UNet {what} on cuda, peak memory / diffusers", held["ours"], held["diffusers"], "MB", "1.0")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(function: Callable) -> int:
    """The most bytes that the process holds beyond its start while `function` runs."""
    start, most, stop = resident(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], resident() - start)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = function()
    stop.set()
    watcher.join()
    del kept
    return most[0]


def peak_on_gpu(function: Callable) -> float:
    """The most MB that `function` takes on the GPU beyond what is there."""
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - start) / 1e6


def in_own_process(*arguments: str) -> float:
    """MB that this file prints when called with `arguments`."""
    told = [sys.executable, __file__, *arguments, "--threads", str(torch.get_num_threads())]
    return float(subprocess.run(told, capture_output=True, text=True, check=True).stdout)


def bench_memory() -> None:
    for what, budget in (("forward", "1.0"), ("train", "-")):
        ours, theirs = (in_own_process("--peak", f"{name} {what}") for name in ("ours", "diffusers"))
        row(f"UNet {what}, peak memory / diffusers", ours, theirs, "MB", budget)
    with tempfile.TemporaryDirectory() as folder:
        UNet(
            UNetConfig(block_out_channels=(128, 256, 512, 512), num_attention_heads=(2, 4, 8, 8))
        ).half().save_pretrained(folder)
        size = (Path(folder) / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6
        row("loading a half-precision UNet, peak memory / file", in_own_process("--load", folder), size, "MB", "1.15")


def bench_demo(threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        told = [sys.executable, "sample.py", "--out", str(Path(folder) / "out")]
        seconds = clock(lambda: subprocess.run(told, cwd=ROOT, env=environment, capture_output=True, check=True), "cpu")
    row("python sample.py (demo)", seconds, 30, "s", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only the rows of one device")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak(unets("cpu")[arguments.peak]) / 1e6)
    elif arguments.load:
        print(peak(lambda: UNet.from_pretrained(arguments.load, dtype=torch.float16)) / 1e6)
    else:
        print(f"torch {torch.__version__}, {arguments.threads} threads\n\n| what | ours | against | ratio | at most |")
        print("|---|---|---|---|---|")
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            if arguments.device in (None, device):
                bench_splat(device)
                bench_unet(device, arguments.rounds)
        if arguments.device != "cuda":
            bench_memory()
            bench_demo(arguments.threads)


if __name__ == "__main__":
    main()
