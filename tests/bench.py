"""The budgets, side by side in one run. No test: times depend on the machine.

    python tests/bench.py                            # the CPU's rows, then the GPU's where there is one
    python tests/bench.py --device cuda              # the GPU's alone, at SVD's size: under four minutes on an H200
    python tests/bench.py --compiled                 # what torch.compile makes of them: minutes of compilation
    python tests/bench.py --device cuda --rows splat,train

Needs diffusers and transformers for what is compared with them; a row without says so. Times are medians, of
alternating runs where two are compared in one process; those of a GPU are between two of its events. Peak memory is
that of a process of its own. A row that fails is one line, and the others go on. Random weights are written once to a
temporary folder (GPU rows: 11 GB).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kernels.threads  # noqa: E402, F401 (before torch)

import torch  # noqa: E402
from measure import (  # noqa: E402
    GB,
    ROOT,
    SMALL_UNET,
    TINY,
    Bench,
    Sizes,
    alternate,
    calls,
    clock,
    forward,
    make_clips,
    splat_inputs,
    train,
    train_steps,
    unets,
)

from clips.simulate import SCENARIOS, simulate  # noqa: E402
from splat import softsplat  # noqa: E402
from svd import UNet, UNetConfig  # noqa: E402


def row(what: str, ours: float, against: float | None, unit: str, budget: str) -> None:
    other, ratio = (f"{against:.4g} {unit}", f"{ours / against:.2f}") if against else ("-", "-")
    print(f"| {what} | {ours:.4g} {unit} | {other} | {ratio} | {budget} |", flush=True)


# ---------------------------------------------------------------------------------------------------- rows of a CPU


def bench_splat(bench: Bench) -> None:
    """Features of one picture, warped to all frames: at the finest and at the coarsest scale of SVD's UNet."""
    for (C, h, w), B, most in (((320, 72, 128), 14, "2.5"), ((1280, 18, 32), 4, "3")):
        x, flow, metric = splat_inputs(C, h, w, B, "cpu")
        out, flat = torch.empty(B, C, h * w), x.expand(B, -1, -1, -1).reshape(B, C, -1).contiguous()
        y, x0 = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        rows, columns = (flow[:, 1] + y).long().clamp(0, h - 2), (flow[:, 0] + x0).long().clamp(0, w - 2)
        index = (rows * w + columns).flatten(1)[:, None].expand(-1, C, -1)  # the upper left of four corners

        def scatter(out=out, index=index, flat=flat, w=w) -> None:
            out.zero_()
            for corner in (0, 1, w, w + 1):
                out.scatter_add_(2, index + corner, flat)

        functions = {"ours": lambda x=x, f=flow, m=metric: softsplat(x, f, m), "scatter": scatter, "copy": out.clone}
        times = {name: 1e3 * t for name, t in alternate(functions, bench.rounds, clock).items()}
        row(f"softsplat {C}x{h}x{w} to {B} frames / four scatter_add_", times["ours"], times["scatter"], "ms", "0.2")
        row(f"softsplat {C}x{h}x{w} to {B} frames / one copy", times["ours"], times["copy"], "ms", most)


def bench_unet(bench: Bench) -> None:
    models = unets(SMALL_UNET, torch.float32, "cpu", 14, (40, 72))
    for step, budget in ((forward, "0.85"), (train, "0.9")):
        times = alternate(calls(models, step), bench.rounds, clock)
        row(f"UNet {step.__name__}, time / diffusers", times["ours"], times.get("diffusers"), "s", budget)


def bench_memory(bench: Bench) -> None:
    for step, budget in (("forward", "1.0"), ("train", "-")):
        ours, theirs = (bench.measure("unet on cpu", name, step)["memory"] / 1e6 for name in ("ours", "diffusers"))
        row(f"UNet {step}, peak memory / diffusers", ours, theirs, "MB", budget)


def bench_load(bench: Bench) -> None:
    folder = bench.work / "half"
    UNet(UNetConfig(block_out_channels=(128, 256, 512, 512), num_attention_heads=(2, 4, 8, 8))).half().save_pretrained(
        folder
    )
    size = (folder / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6
    held = bench.measure("load on cpu", str(folder))["memory"] / 1e6
    row("loading a half-precision UNet, peak memory / file", held, size, "MB", "1.15")


def bench_sample(bench: Bench) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(bench.threads), "CUDA_VISIBLE_DEVICES": ""}
    del environment["OMP_WAIT_POLICY"]  # which sample.py sets by itself
    told = [sys.executable, "sample.py", "--out", str(bench.work / "out")]
    seconds = clock(lambda: subprocess.run(told, cwd=ROOT, env=environment, capture_output=True, check=True))
    row("python sample.py (demo) on the CPU", seconds, 20, "s", "1")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        seconds = clock(lambda: subprocess.run(told, cwd=ROOT, env=environment, capture_output=True, check=True))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    row("the same, two busy processes beside it", seconds, 60, "s", "1")


def bench_simulate(bench: Bench) -> None:
    """All scenarios, as many seeds as there are rounds; one thread, whatever --threads says."""
    simulate("drop", 0, 1, 16)
    jobs = [(scenario, seed, 16, (256, 128)) for scenario in SCENARIOS for seed in range(bench.rounds)]
    speed = 1 / median(clock(lambda job=job: simulate(*job)) for job in jobs)
    what = "simulated clips of 256x128x16: clips a second and core, 3 required, 4 aimed"
    row(what, speed, 3, "clips/s", "at least 1")


# ---------------------------------------------------------------------------------------------------- rows of a GPU


def gpu_splat(bench: Bench) -> None:
    found = {name: 1e3 * seconds for name, seconds in bench.measure("splat").items()}
    copy, what = found["copy"], "softsplat {}x{}x{} to {} frames".format(*bench.size.splat, bench.size.frames)
    row(f"{what}: forward / a copy of the result", found["forward"], copy, "ms", "3")
    row(f"{what}: forward, one call at a time / the same", found["called"], copy, "ms", "-")
    row(f"{what}: forward and backward / the same", found["both"], copy, "ms", "9")
    row(f"{what}: backward (the difference) / the same", found["both"] - found["recorded"], copy, "ms", "6")


def unet_rows(bench: Bench, place: str, *steps: str) -> None:
    found = bench.measure("unet", place, *steps)
    height, width = getattr(bench.size, place)
    for step in steps:
        what = f"UNet {step}, {bench.size.frames} frames of {width}x{height}, bf16"
        theirs, held = found.get(f"diffusers {step}"), found.get(f"diffusers {step} memory")
        row(f"{what}: time / diffusers", 1e3 * found[f"ours {step}"], theirs and 1e3 * theirs, "ms", "0.75")
        once = found[f"recorded {step}"]
        row(f"{what}, one launch: time / diffusers as it is", 1e3 * once, theirs and 1e3 * theirs, "ms", "-")
        row(f"{what}: activations / diffusers", found[f"ours {step} memory"] / GB, held and held / GB, "GB", "-")


def gpu_unet(bench: Bench) -> None:
    unet_rows(bench, "small", "forward", "train")


def gpu_unet_large(bench: Bench) -> None:
    unet_rows(bench, "large", "forward")


def gpu_svd(bench: Bench) -> None:
    """Budgets hold where both decode two frames at a time; by itself, each decodes as many as it likes."""
    ours, theirs = bench.measure("svd ours"), {}
    try:
        theirs = bench.measure("svd diffusers")
    except RuntimeError as error:
        print(f"| diffusers' pipeline | skipped: {error} | | | |", flush=True)
    what = "plain SVD, {} frames of {}x{}, 5 steps".format(bench.size.frames, *bench.size.large[::-1])
    row(f"{what}: time / diffusers in fp16", ours["two"], theirs.get("two"), "s", "0.85")
    for way, says, budget in (("two", "2 frames at a time", "0.75"), ("free", "decoded as it likes", "-")):
        other = theirs.get(f"{way} memory")
        row(f"{what}, {says}: memory / diffusers", ours[f"{way} memory"] / GB, other and other / GB, "GB", budget)
    row(f"{what}, decoded as it likes: time / diffusers", ours["free"], theirs.get("free"), "s", "-")
    row("loading SVD, time / diffusers", ours["loading"], theirs.get("loading"), "s", "-")


def gpu_sample(bench: Bench) -> None:
    """25 steps of both stages; the first run compiles Triton's kernels, which stay on disk."""
    told = [sys.executable, "sample.py", "--device", bench.size.device, "--out", str(bench.work / "out")]
    told += ["--steps", "2"] * bench.trying
    seconds = [clock(lambda: subprocess.run(told, cwd=ROOT, capture_output=True, check=True)) for _ in range(2)]
    row("python sample.py (demo), a process of its own", seconds[1], None, "s", "-")


def gpu_dream(bench: Bench) -> None:
    size = bench.size
    what = "Motion Dreamer of SVD's size, {} frames of {}x{}".format(size.frames, *size.large[::-1])
    for name, limit, words in (("", 12, ()), (", --offload", 8.5, ("--offload",))):
        found = bench.measure("dream", str(limit), *words)
        fits = "" if found["fits"] else f" (does not fit a card of {limit} GB)"
        row(f"{what}{name}: memory / budget{fits}", found["dream memory"] / GB, limit, "GB", "1")
        row(f"{what}{name}: both stages, 3 steps each, first run", found["dream"], None, "s", "-")


def gpu_train(bench: Bench) -> None:
    """A full-size Stage I, by train.py itself, with its moving average."""
    size, (height, width) = bench.size, bench.size.trained
    clips = make_clips(bench.work / "clips", 2, size.frames, height, width)
    told = ("--init", bench.folder("svd"), "--data", clips, "--batch", 1)
    for name, words, limit in ((", --checkpointing", ("--checkpointing",), 40), ("", (), None)):
        what = f"Stage I of SVD's size, {size.frames} frames of {width}x{height}, batch 1{name}"
        log = train_steps(bench, "full", size.steps[0], *told, *words)
        row(f"{what}: memory / budget", log[-1]["memory"] / GB, limit, "GB", "1" if limit else "-")
        row(f"{what}: a step", 1e3 * median(line["seconds"] for line in log[2:]), None, "ms", "-")


def demo_steps(bench: Bench, what: str, budget: float | None, *words: str) -> None:
    size = bench.size
    clips = make_clips(bench.work / "demo clips", 2 * size.batch, 16, 64, 128)
    told = ("--start", ROOT / "demo", "--data", clips, "--batch", size.batch)
    log = train_steps(bench, "demo", size.steps[1], *told, *words)
    seconds = [1e3 * line["seconds"] for line in log]
    row(
        f"{what}: a step of {size.batch} clips",
        median(seconds[len(seconds) // 2 :]),
        budget,
        "ms",
        "1" if budget else "-",
    )
    row(f"{what}: its first step", seconds[0] / 1e3, None, "s", "-")
    row(f"{what}: memory", log[-1]["memory"] / GB, None, "GB", "-")


GRAPH = {False: ("--cuda-graph",), True: ()}  # which --try has not


def gpu_demo(bench: Bench) -> None:
    demo_steps(bench, "demo's Stage I, 128x64x16, eager", None)
    demo_steps(bench, "demo's Stage I, 128x64x16, --cuda-graph", 40, *GRAPH[bench.trying])


def compiled_demo(bench: Bench) -> None:
    demo_steps(bench, "demo's Stage I, 128x64x16, --compile --cuda-graph", 40, "--compile", *GRAPH[bench.trying])


def compiled_unet(bench: Bench) -> None:
    found = bench.measure("unet compiled")
    what = "UNet forward, {} frames of {}x{}, bf16, compiled".format(bench.size.frames, *bench.size.small[::-1])
    theirs = found.get("diffusers")
    row(f"{what}: time / diffusers compiled", 1e3 * found["ours"], theirs and 1e3 * theirs, "ms", "0.9")
    row(f"{what}: the first call / diffusers'", found["ours first"], found.get("diffusers first"), "s", "-")


ROWS = {
    "cpu": {
        "splat": bench_splat,
        "unet": bench_unet,
        "memory": bench_memory,
        "load": bench_load,
        "sample": bench_sample,
        "simulate": bench_simulate,
    },
    "cuda": {
        "splat": gpu_splat,
        "demo": gpu_demo,
        "unet": gpu_unet,
        "sample": gpu_sample,
        "svd": gpu_svd,
        "dream": gpu_dream,
        "train": gpu_train,
        "unet_large": gpu_unet_large,
    },
    "compiled": {"demo": compiled_demo, "unet": compiled_unet},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only the rows of one device")
    parser.add_argument("--compiled", action="store_true", help="only the rows of torch.compile, on a GPU")
    parser.add_argument("--rows", help=f"only these, such as {','.join(ROWS['cuda'])}")
    parser.add_argument("--limit", type=float, help="seconds that one measurement may take (150, compiled 500)")
    hidden = argparse.SUPPRESS  # GPU rows, tiny, where there is no GPU
    parser.add_argument("--try", action="store_true", dest="trying", help=hidden)
    return parser.parse_args()


def kinds_of(arguments: argparse.Namespace) -> list[str]:
    """Which of ROWS are asked for. Raises ValueError: --rows names another."""
    kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    kinds = ["compiled"] if arguments.compiled else [arguments.device] if arguments.device else kinds
    names = set(arguments.rows.split(",")) if arguments.rows else set()
    unknown = names - {name for kind in kinds for name in ROWS[kind]}
    if unknown:
        raise ValueError(f"--rows {arguments.rows}: {', '.join(kinds)} has no row {', '.join(sorted(unknown))}")
    return kinds


def run_rows(arguments: argparse.Namespace, bench: Bench, kinds: list[str]) -> None:
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"torch {torch.__version__}, {arguments.threads} threads, {card}{', tiny sizes' * bench.trying}\n")
    print("| what | ours | against | ratio | at most |\n|---|---|---|---|---|", flush=True)
    names = arguments.rows.split(",") if arguments.rows else None
    for kind in kinds:
        for name, function in ROWS[kind].items():
            if names is None or name in names:
                try:
                    function(bench)
                except Exception as error:  # whatever it is: the other rows go on
                    line = (str(error).strip() or repr(error)).splitlines()[0]
                    print(f"| {name} ({kind}) | failed: {line} | | | |", flush=True)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    limit = arguments.limit or (500 if arguments.compiled else 150)
    settings = (arguments.threads, arguments.rounds, limit, arguments.trying)
    size = TINY if arguments.trying else Sizes()
    try:
        kinds, started = kinds_of(arguments), time.perf_counter()
    except ValueError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as work:
        run_rows(arguments, Bench(size, Path(work), *settings), kinds)
    print(f"\n{time.perf_counter() - started:.0f} seconds in all")


if __name__ == "__main__":
    main()
