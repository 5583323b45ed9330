"""Every public function of the method by what people hand it: read as it was meant, or a ValueError with its name.

A row of a table is a name, a change of a call that works, and what the error says; None: it is read, and the result is
that of the plain call (within a tolerance where numbers are rounded).
"""

import copy
import errno
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_motion_dreamer import SMALL, random_condition, small
from tiny import UNET_CONFIG, moving_squares, randomize, tiny_stage, tiny_tower, tiny_vae

from instance_flow import instance_flow, marked_objects, motion_mask, paint_arrows, random_mask, sparse_flow
from instance_flow import sparse_points as few_points
from motion_dreamer import STAGE1, STAGE2, Batch, dream, precondition, resize_flow
from svd import UNet, image_to_video

NAN = math.nan
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def parts():
    """Both stages, plain SVD's UNet, VAE and image tower, all of random weights; and what `dream` is told."""
    vae, tower = tiny_vae(), tiny_tower()
    stages = [tiny_stage(replace(config, **SMALL), seed) for seed, config in enumerate((STAGE1, STAGE2))]
    clip = {name: value[None] for name, value in moving_squares(1).tensors().items()}
    told = {name: clip[name][:, 0] for name in ("segmentation", "depth")} | {"image": clip["rgb"][:, 0]}
    told |= {"F": instance_flow(clip["flow"], clip["segmentation"]), "camera": torch.tensor([[0.3, -0.2]])}
    motion, _ = dream(stages[0], None, vae, tower, **told, frames=3, steps=1)
    return {"stages": stages, "unet": randomize(UNet(UNET_CONFIG), scale=0.1), "vae": vae, "tower": tower} | {
        "told": told | {"frames": 3, "steps": 1, "mask": (told["F"] != 0).any(1, keepdim=True).float()},
        "motion": motion,
    }


def dreamt(parts, stages=None, **changes):
    made = dream(
        *(parts["stages"] if stages is None else stages), parts["vae"], parts["tower"],
        **parts["told"] | {"generator": torch.Generator().manual_seed(0)} | changes,
    )  # fmt: skip
    return made[1]


def twice(value):
    return torch.cat([value, value])


MAPS = ("image", "segmentation", "depth", "F", "mask", "camera")
TOLD = [(f"{name} {kind}", {name: change}, f"^{name} {says}") for name in MAPS for kind, change, says in (
    ("of NumPy", lambda value: value.numpy(), "is of type ndarray, expected a tensor"),
    ("as a list", lambda value: value.tolist(), "is of type list"),
    ("without a batch", lambda value: value[0], "has shape"),
    ("of another place", lambda value: value.to("meta"), "(is on meta|holds)"),
) if (name, kind) != ("image", "of another place")]  # fmt: skip
TOLD += [(f"{name} of another batch", {name: twice}, f"^{name} has shape") for name in MAPS[1:]]
TOLD += [(f"{name} of another size", {name: lambda v: v[..., :8, :12]}, f"^{name} has shape") for name in MAPS[1:5]]
TOLD += [
    (f"{name} {value}", {name: lambda v, value=value: v + value}, f"^{name} holds a value that is not finite")
    for name in ("image", "depth", "F", "mask", "camera")
    for value in (NAN, math.inf)
]
TOLD += [
    ("image of bytes", {"image": lambda v: ((v + 1) * 127.5).byte()}, "^image is torch.uint8, expected floating"),
    ("image to 255", {"image": lambda v: (v + 1) * 127.5}, "^image reaches from .* expected -1 to 1"),
    ("gray image", {"image": lambda v: v[:, :1]}, r"^image has shape \[1, 1, 16, 24\], expected \[B, 3, H, W\]"),
    ("image with alpha", {"image": lambda v: torch.cat([v, v[:, :1]], 1)}, "^image has shape"),
    ("odd image", {"image": lambda v: v[..., :15, :]}, "^image is 24x15, expected multiples of 2"),
    ("no pixel", {"image": lambda v: v[..., :0]}, "^image has shape"),
    ("depth 0", {"depth": torch.zeros_like}, "^depth holds 0, expected positive"),
    ("depth below 0", {"depth": lambda v: -v}, "^depth holds -8, expected positive"),
    ("whole depth", {"depth": lambda v: v.long()}, "^depth is torch.int64"),
    ("depth with a channel", {"depth": lambda v: v[:, None]}, "^depth has shape"),
    ("ids to 300", {"segmentation": lambda v: v + 298}, "^segmentation holds ids from 298 to 300, expected 0 to 255"),
    ("ids below 0", {"segmentation": lambda v: v - 1}, "^segmentation holds ids from -1"),
    ("half an id", {"segmentation": lambda v: v + 0.5}, "^segmentation is torch.float32, expected whole"),
    ("NaN as an id", {"segmentation": lambda v: v * NAN}, "^segmentation is torch.float32"),
    ("ids as a mask", {"segmentation": lambda v: v > 0}, "^segmentation is torch.bool"),
    ("no F", {"F": lambda _: None}, "^F is of type NoneType"),
    ("F of a clip", {"F": lambda v: v[:, None].expand(-1, 3, -1, -1, -1)}, "^F has shape"),
    ("camera of three", {"camera": lambda v: torch.zeros(1, 3)}, r"^camera has shape \[1, 3\], expected \[1, 2\]"),
    ("camera as a tuple", {"camera": lambda v: (0.0, 1.0)}, "^camera is of type tuple"),
    ("ids uint8", {"segmentation": lambda v: v.byte()}, None),
    ("ids int16", {"segmentation": lambda v: v.short()}, None),
    ("ids int32", {"segmentation": lambda v: v.int()}, None),
    ("ids float32", {"segmentation": lambda v: v.float()}, None),
    ("image float64", {"image": lambda v: v.double()}, None),
    ("depth float64", {"depth": lambda v: v.double()}, None),
    ("depth float16", {"depth": lambda v: v.half()}, None),
    ("F float64", {"F": lambda v: v.double()}, None),
    ("F bfloat16", {"F": lambda v: v.bfloat16()}, None),
    ("camera float64", {"camera": lambda v: v.double()}, None),
    ("mask float16", {"mask": lambda v: v.half()}, None),
    ("F with strides", {"F": lambda v: v.movedim(1, -1).contiguous().movedim(-1, 1)}, None),
]
NUMBERS = [(f"{name} {value!r}", {name: value}, f"^{name} is .*expected a whole number of at least 1")
           for name in ("frames", "steps") for value in (0, -1, 2.0, None, "4")]  # fmt: skip
NUMBERS += [
    (f"guidance {value!r}", {"guidance": value}, "^guidance is .*expected two numbers")
    for value in (3.0, (1.0,), (1.0, 2.0, 3.0), (1.0, NAN), "x", None)
]
NUMBERS += [("a seed as generator", {"generator": 0}, "^generator is 0, expected a torch.Generator")]
PER_CLIP = [
    (f"{name} {value!r}", {name: value}, f"^{name} is .*expected a number")
    for name in ("fps", "motion_bucket")
    for value in (NAN, -1, "7", torch.ones(2), [[7.0]])
] + [("motion_bucket None", {"motion_bucket": None}, "^motion_bucket is None")]
READ = [
    ("fps of a tensor", {"fps": torch.tensor([7])}, {"fps": 7.0}),
    ("fps of the stage", {"fps": None}, {"fps": 7.0}),
    ("fps of a list", {"fps": [7.0]}, {"fps": 7.0}),
    ("frames of NumPy", {"frames": np.int64(3)}, {}),
    ("guidance as a list", {"guidance": [1.0, 2.0]}, {"guidance": (1.0, 2.0)}),
]


def ids_of(rows):
    return [row[0] for row in rows]


@pytest.mark.parametrize(("name", "changes", "says"), TOLD, ids=ids_of(TOLD))
def test_dream_reads_or_refuses_maps(parts, name, changes, says):
    changes = {key: change(parts["told"][key]) for key, change in changes.items()}
    if says is None:
        torch.testing.assert_close(dreamt(parts, **changes), dreamt(parts), rtol=1e-2, atol=1e-2)
    else:
        with pytest.raises(ValueError, match=says):
            dreamt(parts, **changes)


@pytest.mark.parametrize(("name", "changes", "says"), NUMBERS + PER_CLIP, ids=ids_of(NUMBERS + PER_CLIP))
def test_dream_refuses_numbers(parts, name, changes, says):
    with pytest.raises(ValueError, match=says):
        dreamt(parts, **changes)


@pytest.mark.parametrize(("name", "changes", "plain"), READ, ids=ids_of(READ))
def test_dream_reads_numbers(parts, name, changes, plain):
    assert torch.equal(dreamt(parts, **changes), dreamt(parts, **plain))


MOTIONS = [(f"{kind} {name}", name, change, f"^motion.{name} {says}") for name, kind, change, says in (
    ("flow", "short", lambda v: v[:, :2], r"has shape \[1, 2, 2, 16, 24\], expected \[1, 3, 2, 16, 24\]"),
    ("flow", "long", lambda v: torch.cat([v, v], 1), "has shape"),
    ("flow", "of two", twice, "has shape"),
    ("flow", "small", lambda v: v[..., :8, :12], "has shape"),
    ("flow", "NumPy", lambda v: v.numpy(), "is of type ndarray"),
    ("flow", "NaN", lambda v: v * NAN, "holds a value that is not finite"),
    ("segmentation", "to 300", lambda v: v + 298, "holds ids from 298"),
    ("segmentation", "half", lambda v: v + 0.5, "is torch.float32"),
    ("segmentation", "small", lambda v: v[..., :8], "has shape"),
    ("depth", "zero", torch.zeros_like, "holds 0"),
    ("depth", "misshapen", lambda v: v[:, :, None], "has shape"),
)]  # fmt: skip
MOTIONS += [("no depth", "depth", lambda v: None, "^motion has no depth, which stage2 needs")]
MOTIONS += [(f"{dtype} {name}", name, lambda v, dtype=dtype: v.to(dtype), None) for name, dtype in (
    ("segmentation", torch.uint8), ("segmentation", torch.float32), ("flow", torch.float64), ("flow", torch.float16),
    ("depth", torch.float64), ("depth", torch.bfloat16),
)]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "change", "says"), MOTIONS, ids=ids_of(MOTIONS))
def test_dream_reads_or_refuses_a_motion(parts, name, part, change, says):
    stages, motion = (None, parts["stages"][1]), parts["motion"]
    changed = replace(motion, **{part: change(getattr(motion, part))})
    if says is None:
        made = dreamt(parts, stages, motion=changed)
        torch.testing.assert_close(made, dreamt(parts, stages, motion=motion), rtol=1e-2, atol=1e-2)
    else:
        with pytest.raises(ValueError, match=says):
            dreamt(parts, stages, motion=changed)


def test_dream_refuses_stages_that_do_not_go_together(parts):
    (stage1, stage2), motion = parts["stages"], parts["motion"]
    flow_only = tiny_stage(replace(STAGE1, **SMALL, predict=("flow",)))
    for stages, given, says in (
        ((None, None), None, "^stage1 is None"),
        ((None, None), motion, "^stage1 is None"),
        ((None, stage2), None, "^stage1 is None"),
        ((stage2, stage1), None, "^stage2 predicts flow, segmentation, depth, expected rgb"),
        ((flow_only, stage2), None, "^stage1 has no depth, segmentation, which stage2 needs"),
        ((None, stage2), vars(motion), "^motion is of type dict, expected a Motion"),
    ):
        with pytest.raises(ValueError, match=says):
            dreamt(parts, stages, motion=given)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
def test_networks_of_another_precision_dream_sample_and_learn(parts, dtype):
    """Weights as `from_pretrained(dtype=...)` makes them; what comes out is that of float32, coarser."""
    cast = {name: copy.deepcopy(parts[name]).to(dtype) for name in ("vae", "tower")}
    stages = [copy.deepcopy(stage).to(dtype) for stage in parts["stages"]]
    plain = dreamt(parts)
    for video in (dreamt(parts, stages), dreamt(parts | cast, stages)):
        assert video.dtype == torch.float32 and video.isfinite().all()
        assert (video - plain).square().mean() < 0.02 * plain.square().mean()
    for stage, exact in zip(stages, parts["stages"], strict=True):
        torch.manual_seed(0)
        cond, x0 = random_condition(stage.config), torch.randn(2, 3, stage.config.out_channels, 5, 7)
        batch = Batch(x0, cond, torch.ones(2, 1, 10, 14))
        losses = [s.loss(batch, torch.Generator().manual_seed(0))["loss"] for s in (stage, exact)]
        torch.testing.assert_close(losses[0].float(), losses[1].float(), rtol=0.1, atol=0.0)
        losses[0].mean().backward()
        grads = [value.grad for value in stage.parameters() if value.grad is not None]
        assert len(grads) > 50 and all(grad.isfinite().all() and grad.dtype == dtype for grad in grads)


@pytest.mark.parametrize("size", [(2, 2), (6, 10), (14, 22)])
def test_sizes_that_the_unet_cannot_halve_evenly(parts, size):
    h, w = size
    told = {name: parts["told"][name][..., :h, :w] for name in MAPS[:5]}
    assert dreamt(parts, **told).shape == (1, 3, 3, h, w)


# ------------------------------------------------------------------------------------------------ a stage's own methods


CONDITIONS = [(name, change, f"^cond.{name} has shape") for name, change in (
    ("first_pictures", lambda v: v[:, :6]), ("first_pictures", lambda v: v[..., :8, :]),
    ("first_latents", lambda v: v[..., :4]), ("given", lambda v: v[:, :2]), ("token", lambda v: v[:1]),
    ("added_ids", lambda v: v[:, :2]), ("F", lambda v: v[..., :8, :8]), ("F", lambda v: v[:1]),
    ("camera", lambda v: v[:1]), ("camera", lambda v: v[:, :1]),
)]  # fmt: skip
CONDITIONS += [("camera", lambda v: v.numpy(), "^cond.camera is of type ndarray")]


def test_denoise_and_loss_name_what_does_not_fit(parts):
    """What is one instead of B, or of another size, would be stretched in silence."""
    stage = parts["stages"][1]
    cond, x, sigma = random_condition(stage.config), torch.randn(2, 3, 4, 5, 7), torch.tensor([0.5, 2.0])
    stage.denoise(x, sigma, cond)
    for name, change, says in CONDITIONS:
        wrong = replace(cond, **{name: change(getattr(cond, name))})
        with pytest.raises(ValueError, match=says):
            stage.denoise(x, sigma, wrong)
        with pytest.raises(ValueError, match=says):
            stage.loss(Batch(x, wrong, torch.ones(2, 1, 10, 14)))
    for arguments, says in (
        ((x[:, :, :3], sigma), "^x has shape"), ((x[0], sigma), "^x has shape"), ((x.numpy(), sigma), "^x is of type"),
        ((x, sigma[:1]), r"^sigma has shape \[1\], expected \[2\]"), ((x, 0.5), "^sigma is of type float"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            stage.denoise(*arguments, cond)
    for x0, M, says in (
        (x[:, :, :3], torch.ones(2, 1, 10, 14), "^batch.x0 has shape"),
        (x, torch.ones(2, 1, 5, 7), r"^batch.M has shape \[2, 1, 5, 7\], expected \[2, 1, 10, 14\]"),
        (x, torch.ones(1, 1, 10, 14), "^batch.M has shape"),
        (x, torch.ones(2, 1, 10, 14) > 0, "^batch.M is torch.bool"),
        (x.numpy(), torch.ones(2, 1, 10, 14), "^batch.x0 is of type ndarray"),
    ):
        with pytest.raises(ValueError, match=says):
            stage.loss(Batch(x0, cond, M))


def test_a_small_stage_sees_as_many_pictures_as_it_wants():
    stage = tiny_stage(small(replace(STAGE1, **SMALL), show_flow=True, told=True))
    cond = random_condition(stage.config)
    assert stage.denoise(torch.randn(2, 3, 12, 5, 7), torch.tensor([0.5, 2.0]), cond).isfinite().all()
    with pytest.raises(
        ValueError, match=r"^cond.first_pictures has shape \[2, 9, 10, 14\], expected \[2, 12, 10, 14\]"
    ):
        stage.denoise(
            torch.randn(2, 3, 12, 5, 7), torch.ones(2), replace(cond, first_pictures=cond.first_pictures[:, :9])
        )


# -------------------------------------------------------------------------------------------------------- plain SVD


LATENTS = torch.randn(1, 3, 4, 8, 12)
SVD = [row for row in TOLD if set(row[1]) == {"image"} and "of another place" not in row[0]]
SVD += [(name, {key: lambda _, value=value: value for key, value in changes.items()}, says)
        for name, changes, says in NUMBERS]  # fmt: skip
SVD += [
    (f"{name} {value!r}", {name: lambda _, value=value: value}, f"^{name} is .*expected a number")
    for name in ("fps", "motion_bucket_id", "noise_aug")
    for value in (NAN, "7", None, torch.ones(2))
]
SVD += [
    (f"chunk {value}", {"decode_chunk": lambda _, value=value: value}, "^decode_chunk is") for value in (0, -1, 1.5)
]
SVD += [(f"latents {kind}", {"latents": lambda _, value=value: value}, says) for kind, value, says in (
    ("of two frames", LATENTS[:, :2], "^latents has shape"), ("of two clips", twice(LATENTS), "^latents has shape"),
    ("of NumPy", LATENTS.numpy(), "^latents is of type ndarray"), ("NaN", LATENTS * NAN, "^latents holds a value"),
)]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "says"), SVD, ids=ids_of(SVD))
def test_image_to_video_reads_or_refuses(parts, name, changes, says):
    told = {"image": parts["told"]["image"], "frames": 3, "steps": 1, "latents": LATENTS}

    def run(changes):
        changed = told | {key: change(told.get(key)) for key, change in changes.items()}
        seeded = {"generator": torch.Generator().manual_seed(0)} | changed
        return image_to_video(parts["unet"], parts["vae"], parts["tower"], **seeded)

    if says is None:
        torch.testing.assert_close(run(changes), run({}), rtol=1e-3, atol=1e-3)
    else:
        with pytest.raises(ValueError, match=says):
            run(changes)


# ---------------------------------------------------------------------------------------------- instance flow and Eq. 6


FLOW = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 3, (3, 5, 7), generator=torch.Generator().manual_seed(0))
IDS[0, 0, :2] = torch.tensor([1, 2])
ARROWS = {"vectors": torch.tensor([[3.0, 1.0], [0.0, -2.0]]), "ids": torch.tensor([1, 2])}
CALLS = {
    "instance_flow": (instance_flow, {"flow": FLOW, "segmentation": IDS}),
    "marked_objects": (
        lambda **told: marked_objects(**told, generator=torch.Generator().manual_seed(0)),
        {"flow": FLOW, "segmentation": IDS},
    ),
    "sparse_flow": (sparse_flow, {"flow": FLOW, "segmentation": IDS, "points": 3}),
    "random_mask": (random_mask, {"F": FLOW[0], "p": 0.5, "segmentation": IDS[0]}),
    "motion_mask": (motion_mask, {"F": FLOW[:1], "tau": 0.5}),
    "sparse_points": (few_points, {"F": FLOW[0], "points": 3}),
    "paint_arrows": (paint_arrows, ARROWS | {"segmentation": IDS[0], "delta": 0.5}),
    "resize_flow": (resize_flow, {"F": FLOW[:1], "s": 2, "size": (2, 3)}),
    "precondition": (precondition, {"sigma": torch.tensor([0.5, 2.0]), "parameterization": "v"}),
}
TENSORS = {"flow", "F", "vectors", "sigma"}


def refusals():
    """Function, argument, value, what the error says: first what no function takes, then one by one."""
    for function, (_, told) in CALLS.items():
        for name, value in told.items():
            if isinstance(value, torch.Tensor):
                yield function, name, value.numpy(), "is of type ndarray, expected a tensor"
                yield function, name, value.tolist(), "is of type list"
                yield function, name, None, "is of type NoneType"
            if name in TENSORS:
                yield function, name, value.long(), "is torch.int64, expected floating point"
                yield function, name, value > 0, "is torch.bool"
            if name in {"flow", "F", "vectors"}:
                yield function, name, value[..., 0, 0] if name != "vectors" else value[:, 0], "has shape"
            if name == "segmentation":
                yield function, name, value + 298, "holds ids from"
                yield function, name, value - 5, "holds ids from"
                yield function, name, value.float(), "is torch.float32, expected whole numbers"
                yield function, name, value[..., :6] if function != "paint_arrows" else value[None], "has shape"
            if name in {"tau", "delta", "p"}:
                yield from ((function, name, number, "is") for number in (NAN, math.inf, None, "1", torch.zeros(2)))
            if name == "points":
                yield from ((function, name, number, "is") for number in (-1, 2.5, NAN, None, "1", torch.tensor(1)))
    yield "motion_mask", "F", torch.randn(1, 3, 5, 7), "has shape"
    yield "sparse_points", "F", torch.randn(1, 4, 5, 7), "has shape"
    yield "resize_flow", "F", FLOW[0], "has shape"
    yield "instance_flow", "flow", FLOW[:0], "has shape"
    yield "instance_flow", "segmentation", IDS[:2], "has shape"
    yield "paint_arrows", "vectors", torch.zeros(2, 3), "has shape"
    yield "paint_arrows", "vectors", ARROWS["vectors"] * NAN, "hold a value that is not finite"
    yield "paint_arrows", "ids", torch.tensor([1]), r"has shape \[1\], expected \[2\]"
    yield "random_mask", "generator", 0, "is 0, expected a torch.Generator"


@pytest.mark.parametrize(("function", "name", "value", "says"), list(refusals()))
def test_functions_refuse(function, name, value, says):
    call, told = CALLS[function]
    call(**told)
    with pytest.raises(ValueError, match=f"^{name} {says}"):
        call(**told | {name: value})


@pytest.mark.parametrize(
    "function", [name for name in CALLS if name not in ("random_mask", "sparse_flow", "sparse_points")]
)
@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_functions_read_any_precision_and_width_of_ids(function, dtype):
    call, told = CALLS[function]
    floats = {name: value.to(dtype) for name, value in told.items() if name in TENSORS}
    made, plain = call(**told | floats), call(**told)
    for a, b in zip(made, plain, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=3e-2, atol=3e-2)
    for width in (torch.uint8, torch.int16, torch.int32):
        whole = {name: value.to(width) for name, value in told.items() if name in ("segmentation", "ids")}
        for a, b in zip(call(**told | whole), plain, strict=True):
            assert torch.equal(a, b)


# ----------------------------------------------------------------------------------- where compiled code cannot be kept


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "change", [("CacheImpl._locator_classes", []), ("IndexDataCacheFile.save", full)], ids=lambda change: change[0]
)
def test_the_simulator_draws_where_nothing_can_be_kept(monkeypatch, change):
    """A read-only install of a user without a home; a full disk. (Splatting: tests/test_splat.py.)"""
    rays = pytest.importorskip("clips.rays")
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.load", lambda *_: None)  # no code of a former run
    monkeypatch.setattr(f"numba.core.caching.{change[0]}", change[1])
    compiled = rays.kept(lambda geoms, views, rgb, flow, ids, depth: None)
    assert len(compiled.signatures) == 1
