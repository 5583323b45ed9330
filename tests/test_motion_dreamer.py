"""motion_dreamer.py: every equation against an independent statement of it, and the conventions between its parts."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file
from torch import nn

import motion_dreamer as md
from clips import Motion, draft_video
from clips.pictures import PALETTE, flow_to_picture
from instance_flow import instance_flow
from motion_dreamer import (
    ABLATIONS,
    ONE_STAGE,
    STAGE1,
    STAGE2,
    Batch,
    Condition,
    MotionDreamer,
    SmallStageConfig,
    StageConfig,
    precondition,
)
from svd import UNet, decode_video, encode_video, karras_sigmas
from tests.tiny import UNET_CONFIG, moving_squares, randomize, tiny_stage, tiny_tower, tiny_vae

SMALL = {"vae_factor": 2, "frames": 4, "width": 24, "height": 16, "sigma_max": 80.0}
SIGMAS = torch.tensor([0.002, 0.05, 0.7, 1.0, 3.3, 80.0, 700.0])


def small(config: StageConfig, **extras) -> SmallStageConfig:
    return SmallStageConfig(**(vars(config) | extras))


def random_condition(config: md.StageConfig, batch: int = 2, frames: int = 3, h: int = 5, w: int = 7) -> Condition:
    c, f = config.latent_channels, config.vae_factor
    return Condition(
        first_pictures=torch.randn(batch, config.picture_channels, h * f, w * f),
        first_latents=torch.randn(batch, 1, c * len(config.first_frame), h, w),
        known=torch.full((batch, c * len(config.predict), h, w), math.nan),
        given=torch.randn(batch, frames, c * len(config.given), h, w),
        token=torch.randn(batch, 1, UNET_CONFIG.cross_attention_dim),
        added_ids=torch.tensor([[6.0, 127, 0.02]]).repeat(batch, 1),
        F=torch.randn(batch, 2, h * f, w * f) * 3,
        camera=torch.randn(batch, 2),
    )


def pick(cond: Condition, i: int) -> Condition:
    return Condition(**{name: value[i : i + 1] for name, value in vars(cond).items()})


# ---------------------------------------------------------------------------------------------------------- the configs


def test_stage_configs_of_the_paper():
    assert (STAGE1.in_channels, STAGE1.out_channels) == (24, 12)
    assert (STAGE2.in_channels, STAGE2.out_channels) == (20, 4)
    assert (STAGE1.parameterization, STAGE2.parameterization) == ("x0", "v")
    assert ONE_STAGE.predict == ("rgb",) and ONE_STAGE.given == ()
    assert len(ABLATIONS) == 6
    for row, (one, two) in ABLATIONS.items():
        assert two.given == one.predict, row
    assert ABLATIONS["without_depth"][0].predict == ("flow", "segmentation")
    assert ABLATIONS["without_motion_loss"][0].motion_weight == 0 < STAGE1.motion_weight
    assert {type(stage) for pair in ABLATIONS.values() for stage in pair} == {StageConfig}  # none has an extra
    off = {name: value for name, value in vars(SmallStageConfig()).items() if name not in vars(STAGE1)}
    assert off == {"show_flow": False, "told": False, "draft": False, "mask_start": 0.0}
    with pytest.raises(ValueError, match="parameterization is 'eps'"):
        replace(STAGE1, parameterization="eps")


# -------------------------------------------------------------------------------------------------------------- Eq. 6-8


@pytest.mark.parametrize(("h", "w", "s"), [(16, 24, 8), (20, 12, 4), (6, 10, 2)])
def test_resize_flow_is_the_mean_over_covered_pixels_in_cells_per_frame(h, w, s):
    generator = torch.Generator().manual_seed(0)
    F = torch.randn(2, 2, h, w, generator=generator) * (torch.rand(2, 1, h, w, generator=generator) < 0.3)
    F[0, :, :s, :s] = 0  # a cell that nothing covers
    expected = torch.zeros(2, 2, h // s, w // s)
    for b in range(2):
        for y in range(h // s):
            for x in range(w // s):
                cell = F[b, :, y * s : y * s + s, x * s : x * s + s].flatten(1)
                covered = cell[:, (cell != 0).any(dim=0)]
                expected[b, :, y, x] = covered.mean(dim=1) / s if covered.numel() else 0
    torch.testing.assert_close(md.resize_flow(F, s, (h // s, w // s)), expected)


def test_a_thin_object_keeps_its_speed_at_every_scale():
    F = torch.zeros(1, 2, 320, 512)
    F[:, 0, 100:200, 203:233], F[0, 1, 7, 9] = 12.0, -4.0  # 30 x 100 pixels, and a lone vector
    for s in (8, 16, 32, 64):
        small_flow = md.resize_flow(F, s, (320 // s, 512 // s))
        assert small_flow[:, 0].max().item() * s == pytest.approx(12.0, rel=1e-5)
        assert small_flow[0, 1].min().item() * s == pytest.approx(-4.0, rel=1e-3)


def covered_mean(F, size):
    """[2, H, W] -> [2, *size]: the mean over non-zero pixels of each cell, whose last ones may overlap."""
    (H, W), out = F.shape[1:], torch.zeros(2, *size)
    for y in range(size[0]):
        for x in range(size[1]):
            rows = slice(y * H // size[0], -(-(y + 1) * H // size[0]))
            cell = F[:, rows, x * W // size[1] : -(-(x + 1) * W // size[1])].flatten(1)
            kept = cell[:, (cell != 0).any(dim=0)]
            out[:, y, x] = kept.mean(dim=1) if kept.numel() else 0
    return out


def splat_loop(features, flow, metric):
    """Eq. 7 pixel by pixel: [C, h, w], [2, h, w], [h, w] -> [C, h, w]; 0 where nothing arrives."""
    (C, h, w), top = features.shape, metric.max()
    total, weights = torch.zeros(C, h, w), torch.zeros(h, w)
    for y in range(h):
        for x in range(w):
            to_x, to_y = x + flow[0, y, x].item(), y + flow[1, y, x].item()
            for column in (math.floor(to_x), math.floor(to_x) + 1):
                for row in (math.floor(to_y), math.floor(to_y) + 1):
                    share = (1 - abs(to_x - column)) * (1 - abs(to_y - row))
                    if 0 <= column < w and 0 <= row < h and share > 0:
                        weight = share * (metric[y, x] - top).exp()
                        total[:, row, column] += weight * features[:, y, x]
                        weights[row, column] += weight
    return total / weights.clamp(min=1e-12)


@pytest.mark.parametrize("splat_time", ["linear", "constant"])
def test_flow_control_warps_the_features_of_every_scale(splat_time):
    """Against loops over pixels, with the pyramid written out from its weights; sizes that do not divide evenly."""
    torch.manual_seed(0)
    control = md.FlowControl([8, 8, 16], replace(STAGE1, vae_factor=2, splat_time=splat_time))
    pictures, F = torch.randn(2, 9, 12, 20), torch.randn(2, 2, 12, 20) * 4 * (torch.rand(2, 1, 12, 20) < 0.6)
    assert all((W == 0).all() for W in control(pictures, F, 3))  # a new stage starts as plain SVD
    randomize(control)
    warped, weights = control(pictures, F, 3), control.state_dict()

    def conv(name, x, **settings):
        return nnf.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **settings)

    x = conv("stem.2", nnf.silu(conv("stem.0", pictures, padding=1)), stride=2, padding=1)
    for level, (W, s) in enumerate(zip(warped, (2, 4, 8), strict=True)):
        x = x if level == 0 else conv(f"down.{level - 1}.1", nnf.silu(x), stride=2, padding=1)
        C_s, metric = conv(f"features.{level}", nnf.silu(x)), conv(f"metrics.{level}", nnf.silu(x))[:, 0]
        assert W.shape == (2, 3, (8, 8, 16)[level], *x.shape[-2:])
        for b in range(2):
            F_s = covered_mean(F[b], x.shape[-2:]) / s
            for t in range(3):
                expected = splat_loop(C_s[b], F_s * (t if splat_time == "linear" else 1), metric[b])
                torch.testing.assert_close(W[b, t], expected, rtol=1e-3, atol=1e-4)


def told_of(config, models, F, mask=None):
    """What a stage is told by F alone: a flat picture, no objects."""
    image, nothing = torch.zeros(1, 3, 16, 24), (None, None)
    seen = {}
    stage = tiny_stage(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(md, "sample", lambda stage, cond, **_: seen.update(cond=cond) or cond.known[:, None])
        patch.setattr(md, "decode_motion", lambda *_: Motion(None, None, None))
        md.dream(stage, None, *models, image, *nothing, F, frames=3, mask=mask)
    return stage, seen["cond"]


def test_only_a_stage_with_show_flow_sees_the_flow_that_it_warps_by(models):
    """A constant flow moves nothing that a flat picture shows, and frame 0 is not warped at all."""
    for show in (False, True):
        config, frames = small(replace(STAGE1, **SMALL), show_flow=show), []
        for v in (0.0, 1.0):
            stage, cond = told_of(config, models, torch.full((1, 2, 16, 24), v))
            frames.append(stage.control(cond, 3)[0][0][0, 0, :, 4, 6])
        assert ((frames[0] - frames[1]).abs().max() > 1e-3) == show


def test_only_a_stage_with_told_can_tell_stay_from_nothing(models):
    F, everywhere = torch.zeros(1, 2, 16, 24), torch.ones(1, 1, 16, 24)
    for told in (False, True):
        config = small(replace(STAGE1, **SMALL), told=told)
        (stage, nothing), (_, stay) = told_of(config, models, F), told_of(config, models, F, everywhere)
        difference = (stage.control(nothing, 3)[0][0] - stage.control(stay, 3)[0][0]).abs().max()
        assert (difference > 1e-3) == told


def test_control_reaches_the_output_only_through_instance_flow():
    model, cond = tiny_stage(replace(STAGE1, **SMALL)), random_condition(STAGE1)
    cond.first_pictures = torch.randn(2, 9, 10, 14)
    cond.F = torch.randn(2, 2, 10, 14) * 2
    x, sigma = torch.randn(2, 3, 12, 5, 7), torch.tensor([0.5, 2.0])
    moved = model.denoise(x, sigma, replace(cond, F=cond.F + 3))
    assert (moved - model.denoise(x, sigma, cond)).abs().max() > 1e-3
    free = tiny_stage(replace(STAGE1, **SMALL, control="none"))
    torch.testing.assert_close(free.denoise(x, sigma, replace(cond, F=cond.F + 3)), free.denoise(x, sigma, cond))


# ----------------------------------------------------------------------------------------------------- camera, suppl. 7


def test_camera_starts_silent_and_then_matters():
    config = replace(STAGE1, **SMALL)
    torch.manual_seed(0)
    model, cond = MotionDreamer(config, UNET_CONFIG), random_condition(config)
    randomize(model.unet, scale=0.1)
    x, sigma = torch.randn(2, 3, 12, 5, 7), torch.tensor([0.5, 2.0])
    still = replace(cond, camera=torch.zeros(2, 2))
    assert torch.equal(model.denoise(x, sigma, cond), model.denoise(x, sigma, still))
    randomize(model.camera.mlp, scale=0.3)
    by_values = model.denoise(x, sigma, cond)
    assert (by_values - model.denoise(x, sigma, still)).abs().max() > 1e-4
    for layer in model.camera.queries:  # each acts by itself, at the same c
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        randomize(layer, scale=0.3)
        assert (model.denoise(x, sigma, cond) - by_values).abs().max() > 1e-4
        layer.load_state_dict(before)


# ---------------------------------------------------------------------------------------------------- Eq. 5, 10, 11, 12


@pytest.mark.parametrize("parameterization", ["x0", "v"])
@pytest.mark.parametrize("sigma", SIGMAS.tolist())
def test_oracle_network_denoises_to_x0(parameterization, sigma):
    """v is stated in the variance-preserving form: x = alpha x0 + beta noise, v = alpha noise - beta x0."""
    x0, noise = torch.randn(2, 3, 12, 5, 7, dtype=torch.float64), torch.randn(2, 3, 12, 5, 7, dtype=torch.float64)
    alpha, beta = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
    target = x0 if parameterization == "x0" else alpha * noise - beta * x0
    x_t = x0 + sigma * noise
    s = torch.tensor([sigma], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise, weight = precondition(s, parameterization)
    torch.testing.assert_close(c_in * x_t, alpha * x0 + beta * noise)
    torch.testing.assert_close(c_skip * x_t + c_out * target, x0)
    torch.testing.assert_close(
        weight * c_out**2, torch.ones_like(s)
    )  # the loss is the plain error of what is predicted
    assert c_noise == pytest.approx(math.log(sigma) / 4)


class Oracle(nn.Module):
    """A "UNet" that knows the answer: x0 itself or v."""

    def __init__(self, x0: torch.Tensor, parameterization: str) -> None:
        super().__init__()
        self.x0, self.parameterization, self.offset = x0, parameterization, 0.0

    def forward(self, stacked, c_noise, context, added_ids, residuals=None, temporal_query=None):
        if self.parameterization == "x0":
            return self.x0 + self.offset
        sigma = (4 * c_noise).exp().view(-1, 1, 1, 1, 1)
        scaled = stacked[:, :, : self.x0.shape[2]]  # alpha x0 + beta noise
        return (
            (scaled - self.x0 * (1 + sigma**2).rsqrt()) / sigma - sigma * (1 + sigma**2).rsqrt() * self.x0 + self.offset
        )


def oracle_stage(config: md.StageConfig, x0: torch.Tensor) -> MotionDreamer:
    model = MotionDreamer(config, UNET_CONFIG)
    model.unet = Oracle(x0, config.parameterization)
    return model


@pytest.mark.parametrize("config", [STAGE1, STAGE2], ids=["x0", "v"])
def test_oracle_through_denoise_loss_and_sampler(config):
    config = replace(config, **SMALL)
    cond = random_condition(config)
    x0 = torch.randn(2, 3, config.out_channels, 5, 7)
    model = oracle_stage(config, x0)
    for sigma in SIGMAS[1:-1]:  # in float32, the ends are tested above
        x = x0 + sigma * torch.randn_like(x0)
        torch.testing.assert_close(model.denoise(x, sigma.expand(2), cond), x0, rtol=1e-3, atol=1e-3)
    generator = torch.Generator().manual_seed(0)
    assert model.loss(Batch(x0, cond, torch.zeros(2, 1, 10, 14)), generator)["recon"].max() < 1e-4
    model.unet.offset = 0.5  # the loss is the mean squared error of the network's own target
    losses = model.loss(Batch(x0, cond, torch.zeros(2, 1, 10, 14)), torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses["recon"], torch.full((2,), 0.25), rtol=1e-2, atol=1e-2)
    model.unet.offset = 0.0
    for steps in (1, 4):
        sampled = md.sample(model, cond, frames=3, steps=steps, generator=generator)
        torch.testing.assert_close(sampled, x0, rtol=2e-3, atol=2e-3)


def test_a_draft_is_seen_instead_of_the_first_frame_and_corrected():
    config = replace(STAGE2, **SMALL)
    plain, corrects = tiny_stage(config), tiny_stage(small(config, draft=True))
    cond = random_condition(config)
    x, sigma = torch.randn(2, 3, 4, 5, 7), torch.tensor([0.3, 20.0])
    draft = cond.first_latents  # in every frame alike: plain sees it as I_0
    expected = draft + plain.denoise(x - draft, sigma, cond)
    torch.testing.assert_close(corrects.denoise(x, sigma, cond), expected)
    assert not torch.allclose(corrects.denoise(x, sigma, cond), plain.denoise(x, sigma, cond), atol=1e-2)
    frames = torch.cat([draft, draft, draft + 1], dim=1)
    moved = corrects.denoise(x, sigma, replace(cond, first_latents=frames))
    assert not torch.allclose(moved[:, 2], expected[:, 2] + 1, atol=1e-2)
    free = cond.without_image()
    torch.testing.assert_close(corrects.denoise(x, sigma, free), plain.denoise(x, sigma, free))


@pytest.mark.parametrize("wrong", [STAGE1, ONE_STAGE, ABLATIONS["without_segmentation"][1]])
def test_only_a_stage_that_is_given_the_segmentation_has_a_draft(wrong):
    with pytest.raises(ValueError, match="draft is True"):
        small(wrong, draft=True)


def test_draft_video_against_a_loop():
    image, ids = torch.rand(2, 3, 5, 7), torch.randint(0, 4, (2, 3, 5, 7))
    ids[0, 0][ids[0, 0] == 2] = 1  # the first frame does not show object 2 of clip 0
    ids[0, 1, 2, 3] = 2
    made = draft_video(image, ids)
    for b in range(2):
        for t in range(3):
            for y in range(5):
                for x in range(7):
                    i = ids[b, t, y, x]
                    where = ids[b, 0] == (i if (ids[b, 0] == i).any() else 0)
                    mean = image[b][:, where].mean(dim=1)
                    expected = image[b, :, y, x] if i == ids[b, 0, y, x] else mean
                    torch.testing.assert_close(made[b, t, :, y, x], expected)
    assert torch.equal(made[:, 0], image)


def test_motion_loss_is_the_error_where_the_masked_flow_moves():
    config = replace(STAGE1, **SMALL, motion_weight=3.0, motion_threshold=0.5)
    cond, x0 = random_condition(config), torch.randn(2, 3, 12, 5, 7)
    F = torch.zeros(2, 2, 10, 14)
    F[0, 0, 3, 9] = 0.6  # one pixel of latent cell (1, 4): max-pooling keeps it
    F[1, 1, 0, 0] = 0.4  # below tau
    M = (F.square().sum(dim=1, keepdim=True) > 0.5**2).float()
    model = oracle_stage(config, x0)
    error = torch.randn(2, 3, 12, 5, 7)
    model.unet.offset = error
    losses = model.loss(Batch(x0, cond, M), torch.Generator().manual_seed(0))
    expected = (error[0, :, :, 1, 4] ** 2).sum() / error[0].numel()
    torch.testing.assert_close(losses["motion"], torch.stack([expected, torch.tensor(0.0)]))
    torch.testing.assert_close(losses["recon"], (error**2).mean((1, 2, 3, 4)))
    torch.testing.assert_close(losses["loss"], losses["recon"] + 3 * losses["motion"])
    for i, name in enumerate(config.predict):
        torch.testing.assert_close(losses[name], (error[:, :, 4 * i : 4 * i + 4] ** 2).mean((1, 2, 3, 4)))


@pytest.mark.parametrize("config", [STAGE1, STAGE2, ONE_STAGE], ids=["stage 1", "stage 2", "one stage"])
def test_batch_of_two_is_two_batches_of_one(config):
    config = replace(config, **SMALL)
    model, cond = tiny_stage(config), random_condition(config)
    cond.added_ids = torch.tensor([[6.0, 127, 0.02], [12.0, 30, 0.1]])  # fps, motion and noise of their own
    x, sigma = torch.randn(2, 3, config.out_channels, 5, 7), torch.tensor([0.3, 9.0])
    both = model.denoise(x, sigma, cond)
    for i in range(2):
        alone = model.denoise(x[i : i + 1], sigma[i : i + 1], pick(cond, i))
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- inflation of SVD


@pytest.fixture(scope="module")
def svd_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("svd")
    torch.manual_seed(1)
    randomize(UNet(UNET_CONFIG), scale=0.1).save_pretrained(folder / "unet")
    tiny_vae().save_pretrained(folder / "vae")
    tiny_tower().save_pretrained(folder / "image_encoder")
    return folder


def test_new_stage_two_is_plain_svd(svd_folder):
    config = replace(STAGE2, **SMALL)
    model = MotionDreamer.from_svd(svd_folder, config).eval()
    svd = UNet.from_pretrained(svd_folder, "unet").eval()
    cond, x, sigma = random_condition(config), torch.randn(2, 3, 4, 5, 7), torch.tensor([0.3, 9.0])
    c_skip, c_out, c_in, c_noise, _ = (c.view(-1, 1, 1, 1, 1) for c in precondition(sigma, "v"))
    stacked = torch.cat([c_in * x, cond.first_latents.expand(-1, 3, -1, -1, -1)], dim=2)
    with torch.no_grad():
        expected = c_skip * x + c_out * svd(stacked, c_noise.flatten(), cond.token, cond.added_ids)
        assert torch.equal(model.denoise(x, sigma, cond), expected)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_new_stage_one_copies_slices(svd_folder, tmp_path):
    config = replace(STAGE1, **SMALL)
    model, svd = MotionDreamer.from_svd(svd_folder, config), UNet.from_pretrained(svd_folder, "unet")
    weight, original = model.unet.conv_in.weight, svd.conv_in.weight
    assert weight.shape[1] == 24
    for i in range(3):
        torch.testing.assert_close(weight[:, 4 * i : 4 * i + 4], original[:, :4] / math.sqrt(3))
    assert torch.equal(weight[:, 12:16], original[:, 4:]) and (weight[:, 16:] == 0).all()
    for i in range(3):
        assert torch.equal(model.unet.conv_out.weight[4 * i : 4 * i + 4], -svd.conv_out.weight)
        assert torch.equal(model.unet.conv_out.bias[4 * i : 4 * i + 4], -svd.conv_out.bias)
    UNet(replace(UNET_CONFIG, in_channels=9)).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="conv_in takes 9 channels"):
        MotionDreamer.from_svd(tmp_path, config)


def test_noise_on_every_modality_has_the_size_that_svd_knows(svd_folder):
    """Independent noise of n modalities adds up to the size of one through SVD's own conv_in."""
    model, svd = MotionDreamer.from_svd(svd_folder, replace(STAGE1, **SMALL)), UNet.from_pretrained(svd_folder, "unet")
    noise = torch.randn(64, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = nnf.conv2d(noise, model.unet.conv_in.weight[:, :12], padding=1).std()
    theirs = nnf.conv2d(noise[:, :4], svd.conv_in.weight[:, :4], padding=1).std()
    assert ours.item() == pytest.approx(theirs.item(), rel=0.05)


class PerfectSVD(nn.Module):
    """Knows v of the noisy latents that it sees, and says it times `factor`."""

    def __init__(self, x0: torch.Tensor, factor: float) -> None:
        super().__init__()
        self.x0, self.factor = x0, factor

    def forward(self, stacked, c_noise, *_, **__):
        sigma = (4 * c_noise).exp().view(-1, 1, 1, 1, 1)
        alpha, beta = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        noise = (stacked[:, :, : self.x0.shape[2]] - alpha * self.x0) / beta
        return self.factor * (alpha * noise - beta * self.x0)


@pytest.mark.parametrize(("factor", "expected"), [(-1, 0.50), (1, 3.51), (0, 1.00)])
def test_loss_of_eq_5_at_the_start_with_a_perfect_svd(factor, expected):
    """Closed form: E[(1 -+ beta)^2 + alpha^2] over the noise levels of training; `from_svd` takes the factor of -1."""
    config = replace(STAGE1, **SMALL)
    x0 = torch.randn(512, 1, 12, 5, 7, generator=torch.Generator().manual_seed(1))
    cond = random_condition(config, batch=512, frames=1)
    model = MotionDreamer(config, UNET_CONFIG)
    model.unet, model.control = PerfectSVD(x0, factor), lambda *_: (None, None, None)
    found = model.loss(Batch(x0, cond, torch.zeros(512, 1, 10, 14)), torch.Generator().manual_seed(0))["recon"].mean()
    z = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    sigma, density = (config.sigma_mean + config.sigma_std * z).exp(), torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    alpha, beta = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    exact = torch.trapezoid(((1 + factor * beta) ** 2 + (factor * alpha) ** 2) * density, z).item()
    assert exact == pytest.approx(expected, abs=0.01)
    assert found.item() == pytest.approx(exact, rel=0.06)


def test_save_and_load(tmp_path):
    model = tiny_stage(replace(STAGE1, **SMALL, mask_unit="pixel"))
    model.save_pretrained(tmp_path / "stage1")
    loaded = MotionDreamer.from_pretrained(tmp_path, "stage1")
    assert loaded.config == model.config and loaded.unet.config == model.unet.config
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    half = MotionDreamer.from_pretrained(tmp_path, "stage1", dtype=torch.bfloat16)
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}
    with pytest.raises((ValueError, FileNotFoundError), match="stage2"):
        MotionDreamer.from_pretrained(tmp_path, "stage2")
    path = tmp_path / "stage1" / "config.json"
    path.write_text(path.read_text().replace('"mask_unit"', '"mask_unti"'))
    with pytest.raises(ValueError, match="config.json.*mask_unti"):
        MotionDreamer.from_pretrained(tmp_path, "stage1")


def test_a_setting_of_training_that_is_gone_is_read_over(tmp_path):
    now = small(replace(STAGE1, **SMALL), told=True)
    tiny_stage(now).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["stage"]["still_ratio"] = 0.1
    path.write_text(json.dumps(config))
    assert MotionDreamer.from_pretrained(tmp_path).config == now


def test_weights_of_the_former_layout_load(tmp_path):
    """A flat config with fields that are gone and latents taken two by two, as of demo/ at commit 05d9df5."""
    now = small(replace(STAGE1, **SMALL, latent_channels=16, fps=10.0), show_flow=True, mask_start=1.0)
    now = replace(now, vae_factor=4)
    model = tiny_stage(now)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["stage"] |= {"patch": 2, "latent_channels": 4, "vae_factor": 2, "fps": 7.0}
    config["stage"] |= {"mask_keep_one": True, "predict_change": False, "keep_first_frame": True}
    del config["stage"]["told"]
    path.write_text(json.dumps(config))
    loaded = MotionDreamer.from_pretrained(tmp_path)
    assert loaded.config == now and isinstance(loaded, md.SmallMotionDreamer)
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    config["stage"]["predict_change"] = True
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: predict_change is true"):
        MotionDreamer.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------- conditions


@pytest.fixture(scope="module")
def models():
    return tiny_vae(), tiny_tower()


def test_the_null_branch_sees_nothing_of_the_first_frame():
    """Two pictures, one null branch; S_0 and D_0 stay in C^(s), for they are not the picture."""
    config = replace(STAGE1, **SMALL)
    a, b = random_condition(config), random_condition(config)
    for name in ("given", "added_ids", "F", "camera"):
        setattr(b, name, getattr(a, name))
    b.first_pictures[:, 3:] = a.first_pictures[:, 3:]
    model, x, sigma = tiny_stage(config), torch.randn(2, 3, 12, 5, 7), torch.tensor([0.3, 9.0])
    free = [model.denoise(x, sigma, cond.without_image()) for cond in (a, b)]
    assert torch.equal(*free) and a.without_image().known.isnan().all()
    assert not torch.equal(*(model.denoise(x, sigma, cond) for cond in (a, b)))
    assert torch.equal(a.without_image().first_pictures[:, 3:], a.first_pictures[:, 3:])


# ------------------------------------------------------------------------------------------------------------- sampling


class Gaussian(nn.Module):
    """The ideal denoiser of data ~ N(0, 1): x / (1 + sigma^2); the probability-flow ODE then has a closed form."""

    config = replace(STAGE2, **SMALL)

    def control(self, cond, frames):
        return None

    def denoise(self, x, sigma, cond, control=None):
        return x / (1 + sigma.view(-1, 1, 1, 1, 1) ** 2)


@pytest.mark.parametrize("sigma_max", [80.0, 1.0])
def test_sampler_solves_the_probability_flow_ode(sigma_max):
    stage = Gaussian()
    stage.config = replace(stage.config, sigma_max=sigma_max)
    cond, start = random_condition(STAGE2), torch.randn(2, 3, 4, 5, 7, generator=torch.Generator().manual_seed(4))
    expected = start  # x(sigma) = x(sigma_max) sqrt((1 + sigma^2) / (1 + sigma_max^2)); x(sigma_max) is scaled noise
    errors = []
    for steps in (20, 200):
        sampled = md.sample(stage, cond, frames=3, steps=steps, generator=torch.Generator().manual_seed(4))
        errors.append((sampled - expected).abs().max().item())
    assert errors[1] < 0.05 and errors[1] < errors[0] / 5  # first order


def test_karras_sigmas_closed_form():
    sigmas = karras_sigmas(5, sigma_max=80.0)
    expected = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)] + [0]
    torch.testing.assert_close(sigmas, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_guidance_rises_linearly_over_the_frames():
    class Guided(Gaussian):
        def control(self, cond, frames):
            return cond

        def denoise(self, x, sigma, cond, control=None):
            free = (control.token == 0).all() and (control.first_latents == 0).all()
            assert free == (control.first_pictures[:, :3] == 0).all()
            return torch.full_like(x, 1.0 if free else 3.0)

    cond = random_condition(STAGE2)
    sampled = md.sample(Guided(), cond, frames=3, steps=2, guidance=(1.0, 3.0))
    for t, scale in enumerate((1.0, 2.0, 3.0)):
        torch.testing.assert_close(sampled[:, t], torch.full_like(sampled[:, t], 1 + scale * 2), rtol=1e-4, atol=1e-4)
    plain = md.sample(Guided(), cond, frames=3, steps=2)
    torch.testing.assert_close(plain, torch.full_like(plain, 3.0), rtol=1e-4, atol=1e-4)


def test_known_first_frame_is_put_back():
    cond = random_condition(STAGE2)
    cond.known[:, :2] = 0.25
    sampled = md.sample(Gaussian(), cond, frames=3, steps=5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampled[:, 0, :2], torch.full_like(sampled[:, 0, :2], 0.25))
    free = md.sample(
        Gaussian(), random_condition(STAGE2), frames=3, steps=5, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(sampled[:, 1:], free[:, 1:]) and torch.equal(sampled[:, 0, 2:], free[:, 0, 2:])


def test_not_finite_is_an_error_that_names_the_step():
    class Breaks(Gaussian):
        def denoise(self, x, sigma, cond, control=None):
            return x * (math.nan if sigma[0] < 1 else 0.5)

    late = int((karras_sigmas(6, sigma_max=80.0) >= 1).sum()) + 1
    with pytest.raises(FloatingPointError, match=f"predicting rgb: step {late} of 6"):
        md.sample(Breaks(), random_condition(STAGE2), frames=3, steps=6)


# ----------------------------------------------------------------------------------------------- motion files and dream


def test_motion_file(tmp_path):
    motion = Motion(torch.randn(1, 3, 2, 4, 5), torch.randint(0, 9, (1, 3, 4, 5)), None)
    motion.save(tmp_path / "motion.safetensors")
    loaded = Motion.load(tmp_path / "motion.safetensors")
    assert torch.equal(loaded.flow, motion.flow) and torch.equal(loaded.segmentation, motion.segmentation)
    assert loaded.depth is None and [path.name for path in tmp_path.iterdir()] == ["motion.safetensors"]
    motion.flow[0, 0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="motion.safetensors: flow holds nan"):  # what is written can be read
        motion.save(tmp_path / "motion.safetensors")
    assert torch.equal(Motion.load(tmp_path / "motion.safetensors").flow, loaded.flow)
    save_file({"flow": motion.flow}, tmp_path / "motion.safetensors")
    with pytest.raises(ValueError, match="motion.safetensors: flow holds nan"):
        Motion.load(tmp_path / "motion.safetensors")
    (tmp_path / "motion.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="motion.safetensors"):
        Motion.load(tmp_path / "motion.safetensors")


def test_decode_motion_keeps_the_given_first_frame(models):
    vae, _ = models
    config = replace(STAGE1, **SMALL)
    ids, depth = torch.randint(0, 3, (2, 16, 24)), torch.rand(2, 16, 24) + 2
    motion = md.decode_motion(config, vae, torch.randn(2, 4, 12, 8, 12), {"segmentation": ids, "depth": depth})
    assert motion.flow.shape == (2, 4, 2, 16, 24)
    assert torch.equal(motion.segmentation[:, 0], ids) and torch.equal(motion.depth[:, 0], depth)
    assert set(motion.segmentation.unique().tolist()) <= set(ids.unique().tolist()) | {0}
    assert (motion.depth > 0).all()


def test_without_ids_and_depth_stage_two_sees_the_pictures_that_stage_one_made(models, monkeypatch):
    """The scale of depth and the colours of ids are the same in both: 1 / depth from 0 to 1, the palette's order."""
    (vae, tower), made, sample = models, [], md.sample
    monkeypatch.setattr(
        md, "sample", lambda stage, cond, **told: made.append((cond, sample(stage, cond, **told))) or made[-1][1]
    )
    stage1, stage2 = (tiny_stage(replace(config, **SMALL), scale=0.5) for config in (STAGE1, STAGE2))
    image, F = torch.rand(1, 3, 16, 24) * 2 - 1, torch.zeros(1, 2, 16, 24)
    motion, _ = md.dream(stage1, stage2, vae, tower, image, None, None, F, frames=4, steps=2)
    assert len(motion.segmentation.unique()) > 1
    gray = decode_video(vae, made[0][1][:, :, 8:], 2).mean(dim=2)
    torch.testing.assert_close(motion.depth, 2 / (gray + 1).clamp(min=0.02), rtol=1e-4, atol=1e-4)
    gray = (2 / motion.depth - 1)[:, :, None].expand(-1, -1, 3, -1, -1)
    pictures = flow_to_picture(motion.flow), PALETTE[motion.segmentation].movedim(-1, 2), gray
    expected = torch.cat([encode_video(vae, picture, 2) for picture in pictures], dim=2)
    torch.testing.assert_close(made[1][0].given, expected, rtol=1e-4, atol=1e-4)


def test_dream_is_stage_one_then_stage_two(models):
    vae, tower = models
    clip = moving_squares(1)
    tensors = {name: value[None] for name, value in clip.tensors().items()}
    stage1, stage2 = tiny_stage(replace(STAGE1, **SMALL)), tiny_stage(replace(STAGE2, **SMALL), seed=1)
    F = instance_flow(tensors["flow"], tensors["segmentation"])
    told = (tensors["rgb"][:, 0], tensors["segmentation"][:, 0], tensors["depth"][:, 0], F)
    settings = {"frames": 4, "steps": 2}
    motion, video = md.dream(stage1, stage2, vae, tower, *told, **settings, generator=torch.Generator().manual_seed(0))
    assert video.shape == (1, 4, 3, 16, 24) and video.abs().max() <= 1
    assert torch.equal(video[:, 0], told[0]) and not torch.equal(video[:, 1], told[0])  # I_0 is known
    generator = torch.Generator().manual_seed(0)
    alone, nothing = md.dream(stage1, None, vae, tower, *told, **settings, generator=generator)
    assert nothing is None and torch.equal(alone.flow, motion.flow)
    same, again = md.dream(None, stage2, vae, tower, *told, **settings, generator=generator, motion=alone)
    assert same is alone and torch.equal(again, video)
    edited = Motion(-alone.flow, alone.segmentation, alone.depth)
    _, other = md.dream(
        None, stage2, vae, tower, *told, **settings, generator=torch.Generator().manual_seed(9), motion=edited
    )
    assert not torch.equal(other, video)
    with torch.no_grad():
        for color in (-1, 1):  # what is brighter than a picture can be is as bright as it can be
            glaring = tiny_vae()
            glaring.decoder.time_conv_out.bias.fill_(99 * color)
            _, other = md.dream(None, stage2, glaring, tower, *told, **settings, motion=alone)
            assert (other[:, 1:] == color).all() and torch.equal(other[:, 0], told[0])
