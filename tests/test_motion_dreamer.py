"""motion_dreamer.py: every equation against an independent statement of it, and the conventions between its parts."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn

import motion_dreamer as md
from instance_flow import instance_flow
from motion_dreamer import ABLATIONS, ONE_STAGE, STAGE1, STAGE2, Batch, Condition, Motion, MotionDreamer, precondition
from splat import softsplat
from svd import UNet, karras_sigmas
from tests.tiny import UNET_CONFIG, moving_squares, randomize, tiny_stage, tiny_tower, tiny_vae

SMALL = {"vae_factor": 2, "frames": 4, "width": 24, "height": 16, "sigma_max": 80.0}
SIGMAS = torch.tensor([0.002, 0.05, 0.7, 1.0, 3.3, 80.0, 700.0])


def random_condition(config: md.StageConfig, batch: int = 2, frames: int = 3, h: int = 5, w: int = 7) -> Condition:
    c, f = config.latent_channels, config.vae_factor
    return Condition(
        first_pictures=torch.randn(batch, 9, h * f, w * f),
        first_latents=torch.randn(batch, c * len(config.first_frame), h, w),
        known=torch.full((batch, c * len(config.predict), h, w), math.nan),
        given=torch.randn(batch, frames, c * len(config.given), h, w),
        draft=torch.randn(batch, frames, c * config.draft, h, w),
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
    with pytest.raises(ValueError, match="parameterization is 'eps'"):
        replace(STAGE1, parameterization="eps")


# -------------------------------------------------------------------------------------------------------------- Eq. 6-8


@pytest.mark.parametrize(("h", "w", "s"), [(16, 24, 8), (20, 12, 4), (6, 10, 2)])
def test_resize_flow_is_the_area_average_in_cells_per_frame(h, w, s):
    F = torch.randn(2, 2, h, w)
    expected = torch.zeros(2, 2, h // s, w // s)
    for y in range(h // s):
        for x in range(w // s):
            expected[:, :, y, x] = F[:, :, y * s : y * s + s, x * s : x * s + s].mean((2, 3)) / s
    torch.testing.assert_close(md.resize_flow(F, s, (h // s, w // s)), expected)


def test_resize_of_a_sparse_flow_keeps_the_length_of_lone_vectors():
    F = torch.zeros(1, 2, 8, 8)
    F[0, :, 1, 2], F[0, :, 5, 5], F[0, :, 6, 7] = (torch.tensor(v) for v in ([4.0, -8.0], [2.0, 2.0], [6.0, 0.0]))
    small = md.resize_flow(F, 4, (2, 2), sparse=True)
    torch.testing.assert_close(small[0, :, 0, 0], torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(small[0, :, 1, 1], torch.tensor([1.0, 0.25]))  # the mean of two
    assert (small[0, :, 0, 1] == 0).all()


@pytest.mark.parametrize("splat_time", ["linear", "constant"])
def test_flow_control_warps_the_features_of_every_scale(splat_time):
    torch.manual_seed(0)
    control = md.FlowControl([8, 8, 16], replace(STAGE1, vae_factor=2, splat_time=splat_time))
    pictures, F = torch.randn(2, 9, 12, 20), torch.randn(2, 2, 12, 20) * 4
    assert all((W == 0).all() for W in control(pictures, F, 3))  # a new stage starts as plain SVD
    randomize(control)
    warped = control(pictures, F, 3)
    x = control.stem(pictures)
    for level, (W, s) in enumerate(zip(warped, (2, 4, 8), strict=True)):
        x = x if level == 0 else control.down[level - 1](x)
        features, metric = control.features[level](nnf.silu(x)), control.metrics[level](nnf.silu(x))
        F_s = md.resize_flow(F, s, x.shape[-2:])
        assert W.shape == (2, 3, (8, 8, 16)[level], *x.shape[-2:])
        for t in range(3):
            expected = softsplat(features, F_s * (t if splat_time == "linear" else 1), metric, backend="torch")
            torch.testing.assert_close(W[:, t], expected, rtol=1e-4, atol=1e-5)
    if splat_time == "linear":  # frame 0 is not moved
        torch.testing.assert_close(warped[0][:, 0], control.features[0](nnf.silu(control.stem(pictures))))


def test_flow_control_can_see_the_flow_that_it_warps_by():
    """A constant flow moves nothing that a flat picture shows: without `show_flow`, only the edges tell its size."""
    pictures, F = torch.ones(1, 9, 32, 32), torch.zeros(1, 2, 32, 32)
    for show, differs in ((False, False), (True, True)):
        control = randomize(md.FlowControl([8, 8], replace(STAGE1, vae_factor=2, show_flow=show)))
        frames = [control(pictures, F + v, 2)[0][0, 0, :, 8, 8] for v in (0.0, 1.0)]  # frame 0 is not moved
        assert ((frames[0] - frames[1]).abs().max() > 1e-3) == differs


@pytest.mark.parametrize("config", [STAGE1, STAGE2], ids=["x0", "v"])
def test_patches_of_latents_are_cells_of_the_unet(config):
    config = replace(config, **SMALL, patch=2)
    assert (config.cell, config.out_channels) == (4, 4 * 4 * len(config.predict))
    model, cond = tiny_stage(config), random_condition(config, h=6, w=10)
    x, sigma, seen = torch.randn(2, 3, 4 * len(config.predict), 6, 10), torch.tensor([0.3, 9.0]), {}
    c_skip, c_out, c_in, *_ = (c.view(-1, 1, 1, 1, 1) for c in precondition(sigma, config.parameterization))

    def unet(cells, *args, **kwargs):
        seen["cells"], seen["out"] = cells, torch.randn(2, 3, config.out_channels, 3, 5)
        return seen["out"]

    control = model.control(cond, 3)
    assert [tuple(W.shape[-2:]) for W in control[0]] == [(3, 5), (2, 3)]
    model.unet.forward = unet
    made = model.denoise(x, sigma, cond, control)
    first = cond.first_latents[:, None].expand(-1, 3, -1, -1, -1)
    stacked = torch.cat([c_in * x, first, cond.given], dim=2)
    assert seen["cells"].shape == (2, 3, config.in_channels, 3, 5)
    for dy in range(2):
        for dx in range(2):
            offset = 2 * dy + dx  # of the four latents of a cell, which follow each other channel by channel
            assert torch.equal(seen["cells"][:, :, offset::4], stacked[..., dy::2, dx::2])
            expected = c_skip * x[..., dy::2, dx::2] + c_out * seen["out"][:, :, offset::4]
            torch.testing.assert_close(made[..., dy::2, dx::2], expected)
    with pytest.raises(ValueError, match="patch is 2"):
        md.inflate_conv_in(torch.zeros(8, 8, 3, 3), config)


def test_sampling_and_loss_with_patches():
    config = replace(STAGE1, **SMALL, patch=2)
    model, cond = tiny_stage(config), random_condition(config, h=6, w=10)
    assert md.sample(model, cond, frames=3, steps=2).shape == (2, 3, 12, 6, 10)
    assert model.loss(Batch(torch.randn(2, 3, 12, 6, 10), cond))["flow"].shape == (2,)


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
    for part in (model.camera.mlp, model.camera.queries):  # through the token's values; through the queries
        before = {name: value.clone() for name, value in part.state_dict().items()}
        randomize(model.camera.mlp, scale=0.3)
        randomize(part, scale=0.3)
        assert (model.denoise(x, sigma, cond) - model.denoise(x, sigma, still)).abs().max() > 1e-4
        part.load_state_dict(before)


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
    assert model.loss(Batch(x0, cond), generator)["recon"].max() < 1e-4
    model.unet.offset = 0.5  # the loss is the mean squared error of the network's own target
    losses = model.loss(Batch(x0, cond), torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses["recon"], torch.full((2,), 0.25), rtol=1e-2, atol=1e-2)
    model.unet.offset = 0.0
    for steps in (1, 4):
        sampled = md.sample(model, cond, frames=3, steps=steps, generator=generator)
        torch.testing.assert_close(sampled, x0, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("config", [STAGE1, STAGE2], ids=["x0", "v"])
def test_predicting_the_change_is_denoising_without_what_frame_0_shows(config):
    config = replace(config, **SMALL)
    plain, change = tiny_stage(config), tiny_stage(replace(config, predict_change=True))
    cond = random_condition(config)
    cond.known[:, -4:] = torch.randn(2, 4, 5, 7)  # of the other modalities, frame 0 is not known
    start = torch.cat([torch.zeros(2, config.out_channels - 4, 5, 7), cond.known[:, -4:]], dim=1)[:, None]
    x, sigma = torch.randn(2, 3, config.out_channels, 5, 7), torch.tensor([0.3, 20.0])
    expected = start + plain.denoise(x - start, sigma, cond)
    torch.testing.assert_close(change.denoise(x, sigma, cond), expected)
    assert not torch.allclose(plain.denoise(x, sigma, cond), expected, atol=1e-2)
    free = cond.without_image()  # guidance: the unconditional half does not know frame 0
    torch.testing.assert_close(change.denoise(x, sigma, free), plain.denoise(x, sigma, free))


def test_a_draft_is_seen_instead_of_the_first_frame_and_corrected():
    config = replace(STAGE2, **SMALL)
    plain, corrects = tiny_stage(config), tiny_stage(replace(config, draft=True))
    cond = random_condition(replace(config, draft=True))
    x, sigma = torch.randn(2, 3, 4, 5, 7), torch.tensor([0.3, 20.0])
    cond.draft = cond.draft[:, :1].expand(-1, 3, -1, -1, -1)  # in every frame alike: plain can be told it as I_0
    as_first = replace(cond, first_latents=cond.draft[:, 0])
    expected = cond.draft + plain.denoise(x - cond.draft, sigma, as_first)
    torch.testing.assert_close(corrects.denoise(x, sigma, cond), expected)
    assert not torch.allclose(corrects.denoise(x, sigma, cond), plain.denoise(x, sigma, as_first), atol=1e-2)
    moving = replace(cond, draft=torch.cat([cond.draft[:, :2], cond.draft[:, :1] + 1], dim=1))
    assert not torch.allclose(corrects.denoise(x, sigma, moving)[:, 2], expected[:, 2] + 1, atol=1e-2)
    free = plain.denoise(x, sigma, replace(cond.without_image(), draft=cond.draft[:, :, :0]))
    torch.testing.assert_close(corrects.denoise(x, sigma, cond.without_image()), free)


@pytest.mark.parametrize("wrong", [STAGE1, ONE_STAGE, ABLATIONS["without_segmentation"][1]])
def test_only_a_stage_that_is_given_the_segmentation_has_a_draft(wrong):
    with pytest.raises(ValueError, match="draft is True"):
        replace(wrong, draft=True)


def test_draft_video_against_a_loop():
    image, ids = torch.rand(2, 3, 5, 7), torch.randint(0, 4, (2, 3, 5, 7))
    ids[0, 0][ids[0, 0] == 2] = 1  # the first frame does not show object 2 of clip 0
    ids[0, 1, 2, 3] = 2
    made = md.draft_video(image, ids)
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
    cond.F = torch.zeros(2, 2, 10, 14)
    cond.F[0, 0, 3, 9] = 0.6  # one pixel of latent cell (1, 4): max-pooling keeps it
    cond.F[1, 1, 0, 0] = 0.4  # below tau
    model = oracle_stage(config, x0)
    error = torch.randn(2, 3, 12, 5, 7)
    model.unet.offset = error
    losses = model.loss(Batch(x0, cond), torch.Generator().manual_seed(0))
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
    stacked = torch.cat([c_in * x, cond.first_latents[:, None].expand(-1, 3, -1, -1, -1)], dim=2)
    with torch.no_grad():
        expected = c_skip * x + c_out * svd(stacked, c_noise.flatten(), cond.token, cond.added_ids)
        assert torch.equal(model.denoise(x, sigma, cond), expected)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_new_stage_one_copies_slices(svd_folder):
    config = replace(STAGE1, **SMALL)
    model, svd = MotionDreamer.from_svd(svd_folder, config), UNet.from_pretrained(svd_folder, "unet")
    weight, original = model.unet.conv_in.weight, svd.conv_in.weight
    torch.testing.assert_close(weight[:, 0:4] + weight[:, 4:8] + weight[:, 8:12], original[:, :4])
    assert torch.equal(weight[:, 12:16], original[:, 4:]) and (weight[:, 16:] == 0).all()
    assert weight.shape[1] == 24
    for i in range(3):
        assert torch.equal(model.unet.conv_out.weight[4 * i : 4 * i + 4], svd.conv_out.weight)
        assert torch.equal(model.unet.conv_out.bias[4 * i : 4 * i + 4], svd.conv_out.bias)
    with pytest.raises(ValueError, match="conv_in takes 9 channels"):
        md.inflate_conv_in(torch.zeros(8, 9, 3, 3), config)


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


# ----------------------------------------------------------------------------------------------- batches and conditions


@pytest.fixture(scope="module")
def models():
    return tiny_vae(), tiny_tower()


def stacked_clips(*seeds: int) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate([moving_squares(seed).tensors() for seed in seeds])


def test_encode_clips(models):
    vae, tower = models
    clips = stacked_clips(0, 1)
    encoded = md.encode_clips(clips, vae, tower)
    flow = md.encode(vae, md.render("flow", clips["flow"]))
    assert flow.shape == (2, 4, 4, 8, 12)
    torch.testing.assert_close(encoded["latents.flow"], flow)
    expected = vae.encode(md.render("depth", clips["depth"], clips["depth"][:, 0])[1]) * vae.scaling_factor
    torch.testing.assert_close(encoded["latents.depth"][1], expected, rtol=1e-4, atol=1e-5)
    draft = md.draft_video(clips["rgb"][:, 0], clips["segmentation"])
    torch.testing.assert_close(encoded["latents.draft"], md.encode(vae, draft))
    torch.testing.assert_close(encoded["F.instance"], instance_flow(clips["flow"], clips["segmentation"]))
    start = instance_flow(clips["flow"][:, 0][:, None], clips["segmentation"][:, 0])
    torch.testing.assert_close(encoded["F.start"], start)
    torch.testing.assert_close(encoded["token"], tower(clips["rgb"][:, 0]))
    assert encoded["first_pictures"].shape == (2, 9, 16, 24)


def test_training_and_sampling_see_the_same_condition(models, monkeypatch):
    """With nothing dropped, masked or noisy, what training shows is what the sampler builds from a user's input."""
    vae, tower = models
    clips = stacked_clips(3, 4)
    for config in (STAGE1, STAGE2, replace(STAGE2, draft=True), ONE_STAGE):
        config = replace(config, **SMALL, mask_ratio=0.0)
        encoded = md.encode_clips(clips, vae, tower)
        generator = torch.Generator().manual_seed(0)
        monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.zeros(size[0] if len(size) == 1 else size))
        batch = md.training_batch(config, encoded, vae, generator, drop=0.0)
        firsts = [clips[name][:, 0] for name in ("rgb", "segmentation", "depth")]
        motion = Motion(*(clips[name] for name in ("flow", "segmentation", "depth")))
        told = (vae, tower, *firsts, encoded["F.instance"], clips["camera"], motion)
        cond = md.sampling_condition(config, *told, frames=clips["flow"].shape[1], noise_aug=math.exp(-3))
        monkeypatch.undo()
        for name in ("first_pictures", "first_latents", "given", "draft", "token", "added_ids", "F", "camera"):
            a, b = getattr(batch.condition, name), getattr(cond, name)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(batch.condition.known, cond.known, rtol=1e-4, atol=1e-4, equal_nan=True)
        unknown = cond.known.isnan().all(dim=3).all(dim=2).all(dim=0)  # of frame 0, only the flow
        assert unknown.sum() == config.latent_channels * ("flow" in config.predict)


def test_what_moves_at_once_is_what_is_half_as_fast_as_the_fastest():
    start = torch.zeros(3, 2, 1, 5)
    start[0, 0, 0] = torch.tensor([0.0, 4.0, -1.9, -2.1, 0.1])
    start[1, 1, 0] = torch.tensor([0.2, 0.0, 0.0, 0.0, 0.0])
    expected = [[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0] * 5]  # the last: nothing moves
    assert md.moves_at_once(start)[:, 0, 0].int().tolist() == expected


@pytest.mark.parametrize("control, name", [("instance_flow", "F.instance"), ("sparse_flow", "F.sparse")])
def test_some_clips_show_the_arrows_of_what_was_pushed(models, control, name):
    encoded = md.encode_clips(stacked_clips(*range(8)), *models)
    encoded[name] = torch.rand_like(encoded[name]) + 0.5
    encoded["F.start"] = (encoded["segmentation"] == 2)[:, None].float().expand(-1, 2, -1, -1)
    told = (encoded, models[0])
    for share in (0.0, 0.5, 1.0):
        config, count = replace(STAGE1, **SMALL, control=control, mask_ratio=0.0, mask_start=share), 0
        for seed in range(20):
            F = md.training_batch(config, *told, torch.Generator().manual_seed(seed), drop=0.0).condition.F
            pushed = encoded[name] * encoded["F.start"]
            shown = [torch.equal(F[i], pushed[i]) for i in range(8)]
            others = [torch.equal(F[i], encoded[name][i]) for i in range(8)]
            assert all(a != b for a, b in zip(shown, others, strict=True))  # one or the other
            count += sum(shown)
        assert count == 160 * share or (share == 0.5 and 55 < count < 105)  # 80 +- 4 standard deviations


@pytest.mark.parametrize("config", [STAGE1, STAGE2, replace(STAGE2, draft=True)], ids=["stage 1", "stage 2", "draft"])
def test_some_clips_are_shown_at_rest(models, config):
    """As encoding a clip in which nothing moves would have given."""
    clips = stacked_clips(*range(8))
    encoded, rest = md.encode_clips(clips, *models), {name: value.clone() for name, value in clips.items()}
    for name in ("rgb", "segmentation", "depth"):
        rest[name] = rest[name][:, :1].expand_as(rest[name])
    rest["flow"] = torch.zeros_like(rest["flow"])
    expected = md.encode_clips(rest, *models)
    config, counted = replace(config, **SMALL, mask_ratio=0.0, still_ratio=0.5), 0
    batch = md.training_batch(config, encoded, models[0], torch.Generator().manual_seed(1), drop=0.0)
    for i in range(8):
        still = batch.condition.F[i].abs().max() == 0
        source = expected if still else encoded
        told, drafts = batch.condition, ("draft",) * config.draft
        for part, names in ((batch.x0, config.predict), (told.given, config.given), (told.draft, drafts)):
            for k, name in enumerate(names):
                found = part[i, :, 4 * k : 4 * k + 4]
                torch.testing.assert_close(found, source[f"latents.{name}"][i], rtol=1e-4, atol=1e-4)
        counted += still
    assert 0 < counted < 8


def test_training_batch_drops_each_part_by_itself(models):
    vae, tower = models
    one = md.encode_clips(stacked_clips(5), vae, tower)
    encoded = {name: value.repeat(400, *[1] * (value.ndim - 1)) for name, value in one.items()}
    config = replace(STAGE1, **SMALL, mask_ratio=0.5)
    batch = md.training_batch(config, encoded, vae, torch.Generator().manual_seed(0), drop=0.25)
    cond = batch.condition
    no_image = (cond.token == 0).all((1, 2))
    no_ids = (cond.first_pictures[:, 3:6] == 0).all((1, 2, 3))
    no_depth = (cond.first_pictures[:, 6:] == 0).all((1, 2, 3))
    for dropped in (no_image, no_ids, no_depth):
        assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert (no_image & no_ids).float().mean().item() == pytest.approx(0.0625, abs=0.04)  # independent
    latents = cond.first_latents.view(400, 3, 4, 8, 12)
    assert torch.equal((latents[:, 0] == 0).all((1, 2, 3)), no_image)
    assert torch.equal((latents[:, 1] == 0).all((1, 2, 3)), no_ids | no_image)
    unknown = cond.known.view(400, 3, -1).isnan().all(dim=2)  # flow, segmentation, depth
    assert torch.equal(unknown, torch.stack([no_ids | True, no_ids | no_image, no_depth | no_image], dim=1))
    noise = cond.added_ids[:, 2]
    assert noise.min() > 0 and noise.log().std().item() == pytest.approx(0.5, abs=0.06)
    again = md.training_batch(config, encoded, vae, torch.Generator().manual_seed(0), drop=0.25)
    assert torch.equal(again.condition.first_latents, cond.first_latents) and torch.equal(again.condition.F, cond.F)
    config = replace(STAGE2, **SMALL, draft=True)
    cond = md.training_batch(config, encoded, vae, torch.Generator().manual_seed(0), drop=0.25).condition
    no_image = (cond.token == 0).all((1, 2))
    assert torch.equal((cond.draft == 0).all(4).all(3).all(2).all(1), no_image) and 0 < no_image.sum() < 400


# ------------------------------------------------------------------------------------------------------------- sampling


class Gaussian(nn.Module):
    """The ideal denoiser of data ~ N(0, 1): x / (1 + sigma^2); the probability-flow ODE then has a closed form."""

    config = replace(STAGE2, **SMALL)

    def control(self, cond, frames):
        return None

    def denoise(self, x, sigma, cond, control=None):
        return x / (1 + sigma.view(-1, 1, 1, 1, 1) ** 2)


def test_sampler_solves_the_probability_flow_ode():
    cond, start = random_condition(STAGE2), torch.randn(2, 3, 4, 5, 7, generator=torch.Generator().manual_seed(4))
    expected = start  # x(sigma) = x(sigma_max) sqrt((1 + sigma^2) / (1 + sigma_max^2)); x(sigma_max) is scaled noise
    errors = []
    for steps in (20, 200):
        sampled = md.sample(Gaussian(), cond, frames=3, steps=steps, generator=torch.Generator().manual_seed(4))
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
    motion.save(tmp_path / "motion.safetensors")
    with pytest.raises(ValueError, match="motion.safetensors: flow holds a value that is not finite"):
        Motion.load(tmp_path / "motion.safetensors")
    (tmp_path / "motion.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="motion.safetensors"):
        Motion.load(tmp_path / "motion.safetensors")


def test_decode_motion_keeps_the_given_first_frame(models):
    vae, _ = models
    config = replace(STAGE1, **SMALL)
    ids, depth = torch.randint(0, 3, (2, 16, 24)), torch.rand(2, 16, 24) + 2
    motion = md.decode_motion(config, vae, torch.randn(2, 4, 12, 8, 12), ids, depth)
    assert motion.flow.shape == (2, 4, 2, 16, 24)
    assert torch.equal(motion.segmentation[:, 0], ids) and torch.equal(motion.depth[:, 0], depth)
    assert set(motion.segmentation.unique().tolist()) <= set(ids.unique().tolist()) | {0}
    assert (motion.depth > 0).all()


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
