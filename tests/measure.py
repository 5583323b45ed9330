"""What tests/bench.py measures, each in a process of its own:

    python tests/measure.py SETTINGS NAME [WORD ...]      # the fields of `Bench` as JSON, a name of MEASURED

prints what was found as JSON. Nothing else on a GPU is in such a process: its peak memory is that of what is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import kernels.threads  # noqa: E402, F401 (before torch)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tiny import moving_squares  # noqa: E402

import sample  # noqa: E402
from kernels.replayed import Replayed  # noqa: E402
from motion_dreamer import STAGE1, STAGE2, MotionDreamer, dream  # noqa: E402
from splat import softsplat  # noqa: E402
from svd import VAE, ImageEncoder, ImageEncoderConfig, UNet, UNetConfig, VAEConfig, image_to_video  # noqa: E402
from training.compiled import compile_forward  # noqa: E402
from training.recorded import WARM_UP, Recorded  # noqa: E402

SMALL_UNET = UNetConfig(block_out_channels=(64, 128, 256, 256), num_attention_heads=(1, 2, 4, 4))  # of the CPU rows
GB = 1e9


@dataclass(frozen=True)
class Sizes:
    """What the GPU rows compute with; heights come before widths."""

    device: str = "cuda"
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    tower: ImageEncoderConfig = ImageEncoderConfig()
    frames: int = 14
    splat: tuple[int, int, int] = (320, 72, 128)  # channels, height, width
    small: tuple[int, int] = (320, 576)
    large: tuple[int, int] = (576, 1024)
    trained: tuple[int, int] = (320, 512)
    batch: int = 64  # of the demo's training
    steps: tuple[int, int] = (6, 25)  # of training: full size, demo

    @property
    def factor(self) -> int:
        return 2 ** (len(self.vae.block_out_channels) - 1)


# For --try: the same lines on a machine without a GPU.
TINY = Sizes(
    device="cpu",
    unet=UNetConfig(
        block_out_channels=(32, 64), layers_per_block=1, attention=(True, False), num_attention_heads=(1, 2),
        cross_attention_dim=32, addition_time_embed_dim=16,
    ),
    vae=VAEConfig(block_out_channels=(32, 32), layers_per_block=1),
    tower=ImageEncoderConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, patch_size=112,
        projection_dim=32,
    ),
    frames=3, splat=(8, 9, 16), small=(16, 24), large=(24, 32), trained=(16, 24), batch=2, steps=(3, 3),
)  # fmt: skip


@dataclass
class Bench:
    """What every row is given."""

    size: Sizes
    work: Path  # random weights, clips, runs
    threads: int
    rounds: int
    limit: float  # seconds that one measurement may take
    trying: bool = False

    def measure(self, name: str, *words: str) -> dict[str, float]:
        """What a function of MEASURED finds, in a process of its own. Raises RuntimeError: its last line of stderr."""
        settings = {"work": str(self.work), "threads": self.threads, "rounds": self.rounds, "limit": self.limit}
        told = [sys.executable, __file__, json.dumps(settings | {"trying": self.trying}), name, *words]
        process = subprocess.Popen(
            told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            printed, errors = process.communicate(timeout=self.limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"did not end in {self.limit:.0f} s") from None
        finally:
            end(process)
        if process.returncode:
            raise RuntimeError((errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
        return json.loads(printed.splitlines()[-1])

    def folder(self, name: str) -> Path:
        """Random weights: "svd" as it is published, "dreamer" with both stages of Motion Dreamer; made at first use."""
        if not (self.work / name).exists():
            self.measure(f"make {name}")
        return self.work / name


def end(process: subprocess.Popen) -> None:
    """Ends a process and what it started (the compiler's workers, too)."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# -------------------------------------------------------------------------------------------- clocks and memory


def clock(function: Callable) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def gpu_clock(function: Callable, repeats: int = 3, ahead: bool = False) -> float:
    """Seconds of one call, by the GPU's events around several. `ahead`: the GPU first waits until all are launched, so
    that it is its own work that counts, not the CPU that launches it."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if ahead:
        torch.cuda._sleep(100_000_000)  # cycles: about 50 ms
    start.record()
    for _ in range(repeats):
        function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3 / repeats


def alternate(functions: dict[str, Callable], rounds: int, seconds: Callable[[Callable], float]) -> dict[str, float]:
    """Median seconds of each, after one round of warming up."""
    times = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            taken = seconds(function)
            if i:
                times[name].append(taken)
    return {name: median(values) for name, values in times.items()}


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


def gpu_peak(function: Callable) -> int:
    """The most bytes that tensors take on the GPU while `function` runs, what is there already among them."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def seconds_and_peak(name: str, function: Callable, repeats: int) -> dict[str, float]:
    seconds = []
    memory = gpu_peak(lambda: seconds.append(gpu_clock(function, repeats)))
    return {name: seconds[0], f"{name} memory": memory}


def pretend_gpu() -> None:
    """For --try: the clock and the memory of this process in the place of a GPU's."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, stop: Event) -> float:
            return 1e3 * (stop.at - self.at)

    torch.cuda.Event = Event
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "_sleep", "set_per_process_memory_fraction"):
        setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(torch.cuda, name, lambda *_: resident())
    torch.cuda.mem_get_info = lambda *_: (0, 80 * 10**9)


# ------------------------------------------------------------------------------------------- what is computed with


def splat_inputs(channels: int, h: int, w: int, frames: int, device: str) -> tuple[torch.Tensor, ...]:
    """Features and metric of one picture, a smooth flow to every frame."""
    torch.manual_seed(0)
    x, metric = torch.randn(1, channels, h, w, device=device), torch.randn(1, 1, h, w, device=device)
    coarse = 10 * torch.randn(frames, 2, h // 8 + 1, w // 8 + 1, device=device)
    return x, torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear"), metric


def unets(config: UNetConfig, dtype: torch.dtype, device: str, frames: int, cells: tuple[int, int]) -> dict:
    """Ours and, where it is installed, diffusers' UNet of the same weights; and the arguments of both."""
    torch.manual_seed(0)
    like = {"device": device, "dtype": dtype}
    with torch.device(device):
        models = {"ours": UNet(config).to(**like)}
        try:
            from diffusers import UNetSpatioTemporalConditionModel

            models["diffusers"] = UNetSpatioTemporalConditionModel.from_config(config.to_dict()).to(**like)
            models["diffusers"].load_state_dict(models["ours"].state_dict())
        except ImportError as error:
            print(f"diffusers does not import: {error}", file=sys.stderr)
    x, c_noise = torch.randn(1, frames, 8, *cells).to(**like), torch.full((1,), 0.3, device=device)
    context = torch.randn(1, 1, config.cross_attention_dim).to(**like)
    given = (x, c_noise, context, torch.tensor([[6, 127, 0.02]], device=device))
    return {name: (model, given) for name, model in models.items()}


@torch.no_grad()
def forward(model: torch.nn.Module, given: tuple) -> None:
    model(*given)


def train(model: torch.nn.Module, given: tuple) -> None:
    model.zero_grad(set_to_none=True)
    out = model(*given)
    (out if isinstance(out, torch.Tensor) else out.sample).square().mean().backward()


def calls(models: dict, step: Callable) -> dict[str, Callable]:
    return {name: (lambda told=told: step(*told)) for name, told in models.items()}


def make_svd(bench: Bench) -> dict:
    """Random weights in the layout of the published folder, in half precision."""
    size, folder = bench.size, bench.work / "svd"
    torch.manual_seed(0)
    with torch.device(size.device):
        parts = {"unet": UNet(size.unet), "vae": VAE(size.vae), "image_encoder": ImageEncoder(size.tower)}
    for name, part in parts.items():
        part.half().save_pretrained(folder / name)
        file = folder / name / f"{part.STEM}.safetensors"
        file.rename(file.with_suffix(".fp16.safetensors"))
    return {}


def make_dreamer(bench: Bench) -> dict:
    """Both stages as they begin, from the random SVD, in half precision."""
    size, svd, folder = bench.size, bench.folder("svd"), bench.work / "dreamer"
    shape = {"frames": size.frames, "height": size.large[0], "width": size.large[1], "vae_factor": size.factor}
    for name, config in (("stage1", STAGE1), ("stage2", STAGE2)):
        stage = MotionDreamer.from_svd(svd, replace(config, **shape), size.device)
        stage.half().save_pretrained(folder / name)
    for part in ("vae", "image_encoder"):
        (folder / part).symlink_to(svd / part)
    return {}


def make_clips(folder: Path, count: int, frames: int, height: int, width: int) -> Path:
    for seed in range(0 if folder.exists() else count):
        folder.mkdir(exist_ok=True)
        moving_squares(seed, frames, height, width).save(folder / f"{seed}.safetensors")
    return folder


def load_as_sample(bench: Bench, *words: str) -> sample.Models:
    """What sample.py would load."""
    sys.argv = ["sample.py", "image.png", *words, "--device", bench.size.device]
    arguments = sample.parse_arguments()
    sample.choose_device(arguments)
    return sample.load_models(arguments)


# ------------------------------------------------------------------------- measurements, each in a process of its own


def splat_on_gpu(bench: Bench) -> dict[str, float]:
    size = bench.size
    given = splat_inputs(*size.splat, size.frames, size.device)
    learned = [value.clone().requires_grad_() for value in given]
    out = softsplat(*given)
    gradient = torch.randn_like(out)
    functions = {
        "copy": out.clone,
        "forward": lambda: softsplat(*given),
        "recorded": lambda: softsplat(*learned),
        "both": lambda: torch.autograd.grad(softsplat(*learned), learned, gradient),
    }
    found = alternate(functions, bench.rounds, lambda function: gpu_clock(function, 10, ahead=True))
    return found | {"called": alternate({"forward": functions["forward"]}, bench.rounds, gpu_clock)["forward"]}


def unet_on_gpu(bench: Bench, place: str, *steps: str) -> dict[str, float]:
    """Seconds and bytes of the steps "forward" and "train", at the size "small" or "large"; ours recorded, too."""
    size, found = bench.size, {}
    cells = tuple(side // size.factor for side in getattr(size, place))
    models = unets(size.unet, torch.bfloat16, size.device, size.frames, cells)
    for step in steps:
        run = {"forward": forward, "train": train}[step]
        functions = calls(models, run)
        times = alternate(functions, bench.rounds, gpu_clock)
        for name, function in functions.items():
            for model, _ in models.values():
                model.zero_grad(set_to_none=True)
            weights = torch.cuda.memory_allocated()
            found |= {f"{name} {step}": times[name], f"{name} {step} memory": gpu_peak(function) - weights}
        once = recorded(run, *models["ours"])
        for _ in range(WARM_UP + 1):
            once()
        found[f"recorded {step}"] = alternate({"ours": once}, bench.rounds, gpu_clock)["ours"]
    return found


def recorded(step: Callable, model: torch.nn.Module, given: tuple) -> Callable:
    """forward or train, one launch: as sample.py runs the network, or train.py --cuda-graph."""
    if given[0].device.type == "cpu":  # --try
        return partial(step, model, given)
    if step is forward:
        return partial(forward, Replayed(model), given)

    def compute(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        train(model, tuple(batch.values()))
        return {}

    batch = {str(i): value for i, value in enumerate(given)}
    return partial(Recorded(compute, model.parameters(), torch.Generator(given[0].device)), batch)


def unet_compiled(bench: Bench) -> dict[str, float]:
    size, found = bench.size, {}
    cells = tuple(side // size.factor for side in size.small)
    models = unets(size.unet, torch.bfloat16, size.device, size.frames, cells)
    compile_forward(models["ours"][0])  # as sample.py and train.py do
    if "diffusers" in models:
        models["diffusers"] = (torch.compile(models["diffusers"][0], dynamic=False), models["diffusers"][1])
    functions = calls(models, forward)
    for name, function in functions.items():
        found[f"{name} first"] = gpu_clock(function, 1)
    return found | alternate(functions, bench.rounds, gpu_clock)


def two_ways(run: Callable[[int, int | None], object]) -> dict[str, float]:
    """Seconds and bytes of run(steps, frames that are decoded at once): two frames at a time, and as many as it likes;
    after one step of warming up."""
    found = {}
    run(1, 2)
    for name, chunk in (("two", 2), ("free", None)):
        found |= seconds_and_peak(name, lambda chunk=chunk: run(5, chunk), 2)
    return found


def svd_ours(bench: Bench) -> dict[str, float]:
    """As `sample.py --svd` loads it: UNet and tower in half precision, the VAE's encoder in single."""
    folder, started = str(bench.folder("svd")), time.perf_counter()
    models = load_as_sample(bench, "--svd", folder, "--precision", "fp16")
    loading = time.perf_counter() - started
    image = torch.rand(1, 3, *bench.size.large, device=bench.size.device) * 2 - 1
    networks = models.unet, models.vae, models.tower

    def run(steps: int, chunk: int | None) -> torch.Tensor:
        settings = {"frames": bench.size.frames, "steps": steps, "guidance": (1.0, 3.0), "decode_chunk": chunk}
        return image_to_video(*networks, image, generator=torch.Generator().manual_seed(0), **settings)

    return two_ways(run) | {"loading": loading}


def svd_diffusers(bench: Bench) -> dict[str, float]:
    import diffusers  # noqa: F401 (not a part of loading)
    import transformers  # noqa: F401
    from PIL import Image

    folder, started = bench.folder("svd"), time.perf_counter()
    pipeline = diffusers_pipeline(folder, bench.size.device)
    loading = time.perf_counter() - started
    height, width = bench.size.large
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    settings = {"height": height, "width": width, "num_frames": bench.size.frames, "output_type": "pt"}

    def run(steps: int, chunk: int | None) -> object:
        settings["generator"] = torch.Generator().manual_seed(0)
        told = {"num_inference_steps": steps, "decode_chunk_size": chunk or bench.size.frames}
        return pipeline(Image.fromarray(pixels), **settings, **told)

    return two_ways(run) | {"loading": loading}


def diffusers_pipeline(folder: Path, device: str) -> Callable:
    """Their pipeline of the weights in a folder, in fp16, with SVD's scheduler and CLIP's mean and deviation."""
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, StableVideoDiffusionPipeline
    from diffusers import UNetSpatioTemporalConditionModel as TheirUNet
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0, steps_offset=1, timestep_spacing="leading",
        timestep_type="continuous",
    )  # fmt: skip
    half = {"variant": "fp16", "torch_dtype": torch.float16}
    pipeline = StableVideoDiffusionPipeline(
        vae=AutoencoderKLTemporalDecoder.from_pretrained(folder / "vae", **half),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", **half),
        unet=TheirUNet.from_pretrained(folder / "unet", **half),
        scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def dream_on_gpu(bench: Bench, gigabytes: str, *offload: str) -> dict[str, float]:
    """Both stages, 3 steps each, on a card that holds so much: torch may keep no more, and the VAE's chunks are chosen
    by what is left of it. Where that is too little, once more without an end ("fits": 0)."""
    size, limit = bench.size, float(gigabytes) * GB
    models = load_as_sample(bench, "--model", str(bench.folder("dreamer")), "--precision", "bf16", *offload)
    (h, w), device = size.large, size.device
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.mem_get_info = lambda *_: (max(0, int(limit) - torch.cuda.memory_reserved()), int(limit))
    image, F = torch.rand(1, 3, h, w, device=device) * 2 - 1, torch.zeros(1, 2, h, w, device=device)
    ids, depth = torch.zeros(1, h, w, dtype=torch.long, device=device), torch.full((1, h, w), 5.0, device=device)
    ids[:, h // 4 : h // 2, w // 4 : w // 2], F[:, 0, h // 4 : h // 2, w // 4 : w // 2] = 1, 4.0
    told = (*models.stages.values(), models.vae, models.tower, image, ids, depth, F)

    def run() -> None:
        dream(*told, frames=size.frames, steps=3, generator=torch.Generator().manual_seed(0))

    with suppress(torch.OutOfMemoryError):
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        return seconds_and_peak("dream", run, 1) | {"fits": 1}
    torch.cuda.set_per_process_memory_fraction(1.0)
    return seconds_and_peak("dream", run, 1) | {"fits": 0}


def unet_on_cpu(bench: Bench, name: str, step: str) -> dict[str, float]:
    model = unets(SMALL_UNET, torch.float32, "cpu", 14, (40, 72))[name]
    return {"memory": peak(lambda: {"forward": forward, "train": train}[step](*model))}


def load_on_cpu(bench: Bench, folder: str) -> dict[str, float]:
    return {"memory": peak(lambda: UNet.from_pretrained(folder, dtype=torch.float16))}


def train_steps(bench: Bench, name: str, steps: int, *words: object) -> list[dict[str, float]]:
    """The first lines of train.py's log. It is killed then: what it would save takes longer than what is measured."""
    out = bench.work / name
    shutil.rmtree(out, ignore_errors=True)
    log, errors = out / "training" / "stage1" / "log.jsonl", bench.work / f"{name}.txt"
    told = ["--stage", "1", "--out", out, "--steps", 10000, "--save-every", 10000, "--precision", "bf16", "--quiet"]
    told = [sys.executable, ROOT / "train.py", *told, "--sample-every", 0, *words]
    started, lines = time.monotonic(), []
    with open(errors, "w") as file:
        process = subprocess.Popen(list(map(str, told)), stdout=file, stderr=file, start_new_session=True)
    try:
        while len(lines) < steps:
            if process.poll() is not None:
                raise RuntimeError((errors.read_text().strip().splitlines() or ["train.py ended"])[-1])
            if time.monotonic() - started > bench.limit:
                raise RuntimeError(f"{len(lines)} of {steps} training steps in {bench.limit:.0f} s")
            time.sleep(0.05)
            lines = log.read_text().split("\n")[:-1] if log.exists() else []
    finally:
        end(process)
        shutil.rmtree(out, ignore_errors=True)
    return [json.loads(line) for line in lines[:steps]]


MEASURED = {
    "make svd": make_svd,
    "make dreamer": make_dreamer,
    "splat": splat_on_gpu,
    "unet": unet_on_gpu,
    "unet compiled": unet_compiled,
    "svd ours": svd_ours,
    "svd diffusers": svd_diffusers,
    "dream": dream_on_gpu,
    "unet on cpu": unet_on_cpu,
    "load on cpu": load_on_cpu,
}


def main() -> None:
    settings, name, *words = sys.argv[1:]
    settings = json.loads(settings)
    torch.set_num_threads(settings["threads"])
    if settings["trying"]:
        pretend_gpu()
    size = TINY if settings["trying"] else Sizes()
    bench = Bench(size, Path(settings.pop("work")), **settings)
    print(json.dumps(MEASURED[name](bench, *words)))


if __name__ == "__main__":
    main()
