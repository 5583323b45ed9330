"""svd.py against diffusers and transformers where they are installed, against stored outputs of theirs elsewhere."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sources.find import weights_in
from svd import (
    VAE,
    ImageEncoder,
    ImageEncoderConfig,
    UNet,
    UNetConfig,
    VAEConfig,
    decode_video,
    encode_video,
    frames_that_fit,
    image_to_video,
    karras_sigmas,
    without_effect,
)
from tests.make_fixtures import FOLDER, MODELS, fill, inputs, outputs, reference
from tests.tiny import tiny_vae
from weights import load_strict, resolve_source, single_file_table

CLASSES = {"unet": UNet, "vae": VAE, "image_encoder": ImageEncoder}
TINY = UNetConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention=(True, True),
    num_attention_heads=(2, 4),
    cross_attention_dim=6,
    addition_time_embed_dim=4,
    channels_per_group=4,
)
# At 32 channels a group is one channel, and normalisation hides the embedding: widths of 64 see everything.
LEVELS = {  # levels, layers and attention, heads; sizes are odd so that every upsampling is uneven
    "2 levels, 1 layer": ((32, 64), 1, (True, False), (1, 2), 5, 7),
    "2 levels, 2 layers": ((64, 64), 2, (False, True), (2, 4), 4, 3),
    "3 levels, 1 layer": ((32, 64, 96), 1, (False, True, True), (4, 2, 3), 9, 6),
    "3 levels, 2 layers": ((32, 64, 64), 2, (True, True, False), (1, 2, 4), 7, 11),
    "4 levels, 1 layer": ((32, 64, 64, 64), 1, (True, False, True, True), (2, 2, 4, 1), 16, 8),
    "4 levels, 2 layers": ((32, 64, 96, 96), 2, (True, True, True, False), (1, 2, 3, 3), 13, 9),
}


def close(ours, theirs, limit=2e-5):
    assert ours.shape == theirs.shape and torch.isfinite(ours).all()
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < limit, error


@torch.no_grad()
def run(name, model, given):
    """Our outputs under the names that `make_fixtures.outputs` gives to theirs."""
    if name == "unet":
        return {"sample": model(**given)}
    if name == "image_encoder":
        return {"token": model(given["images"])}
    mean, log_variance = model.moments(given["images"])
    assert torch.equal(model.encode(given["images"]), mean)
    return {"mean": mean, "log_variance": log_variance, "images": model.decode(given["latents"])}


def tiny(seed=0, **changes):
    return fill(UNet(replace(TINY, **changes)), seed)


def unet_inputs(h=5, w=6):
    return inputs("unet", TINY, h, w)


# --------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", CLASSES)
def test_equals_stored_outputs_of_the_reference(name):
    tensors = load_file(FOLDER / f"{name}.safetensors")
    given = {key[6:]: value for key, value in tensors.items() if key.startswith("input.")}
    made = run(name, fill(CLASSES[name](MODELS[name])), given)
    assert {f"output.{key}" for key in made} == {key for key in tensors if key.startswith("output.")}
    for key, value in made.items():
        close(value, tensors[f"output.{key}"])


@pytest.mark.parametrize("case", LEVELS)
def test_unet_equals_diffusers(case):
    pytest.importorskip("diffusers")
    widths, layers, attention, heads, h, w = LEVELS[case]
    config = replace(
        MODELS["unet"],
        block_out_channels=widths,
        layers_per_block=layers,
        attention=attention,
        num_attention_heads=heads,
    )
    theirs, ours = fill(reference("unet", config)), UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    given = inputs("unet", config, h, w)
    close(run("unet", ours, given)["sample"], outputs("unet", theirs, given)["sample"])


def test_gradients_equal_those_of_diffusers():
    pytest.importorskip("diffusers")
    config = replace(MODELS["unet"], block_out_channels=(32, 64), attention=(True, True), num_attention_heads=(2, 2))
    theirs, ours = fill(reference("unet", config)).double(), fill(UNet(config)).double()
    given = {key: value.double() for key, value in inputs("unet", config, 5, 6).items()}
    theirs(*given.values()).sample.square().sum().backward()
    ours(**given).square().sum().backward()
    for name, value in theirs.named_parameters():
        gradient = ours.get_parameter(name).grad
        if gradient is None:  # queries and keys of cross-attention, and the norm before them
            assert any(part in name for part in ("attn2.to_q", "attn2.to_k", "norm2")), name
            assert value.grad.abs().max() < 1e-12
        else:
            torch.testing.assert_close(gradient, value.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("layers", "size"), [(1, (20, 28)), (2, (24, 12)), (3, (16, 20))])
def test_vae_equals_diffusers(layers, size):
    pytest.importorskip("diffusers")
    config = replace(MODELS["vae"], block_out_channels=(32, 64, 96), layers_per_block=layers, latent_channels=3)
    theirs, ours = fill(reference("vae", config)), VAE(config).eval()
    ours.load_state_dict(theirs.state_dict())
    given = inputs("vae", config, *size)
    expected = outputs("vae", theirs, given)
    for key, value in run("vae", ours, given).items():
        close(value, expected[key])


def test_vae_decodes_chunks_as_diffusers_does():
    pytest.importorskip("diffusers")
    theirs, ours = fill(reference("vae", MODELS["vae"])), fill(VAE(MODELS["vae"]))
    latents = inputs("vae", MODELS["vae"], 12, 20)["latents"]  # 3 frames
    with torch.no_grad():
        parts = [theirs.decode(z.flatten(0, 1), num_frames=z.shape[1]).sample for z in latents.split(2, dim=1)]
        chunked = ours.decode(latents, chunk=2)
        whole = ours.decode(latents)
    expected = torch.cat([parts[0].unflatten(0, (2, 2)), parts[1].unflatten(0, (2, 1))], dim=1)
    close(chunked, expected)
    assert (chunked - whole).abs().max() > 1e-2  # frames of different chunks do not see each other
    longer = latents[:, [0, 1, 2, 1, 0]]  # more frames than channels
    with torch.no_grad():
        expected = theirs.decode(longer.flatten(0, 1), num_frames=5).sample
        close(ours.decode(longer), expected.unflatten(0, (2, 5)))


def test_log_variance_is_clamped():
    vae = fill(VAE(MODELS["vae"]))
    with torch.no_grad():
        vae.quant_conv.bias[4:6], vae.quant_conv.bias[6:8] = 1e3, -1e3
        _, log_variance = vae.moments(torch.zeros(1, 3, 8, 8))
    assert (log_variance[:, :2] == 20).all() and (log_variance[:, 2:] == -30).all()


@pytest.mark.parametrize(("height", "width"), [(224, 224), (71, 40), (20, 90), (300, 33)])
def test_image_encoder_equals_transformers(height, width):
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    config = MODELS["image_encoder"]
    theirs, ours = fill(reference("image_encoder", config)), ImageEncoder(config).eval()
    ours.load_state_dict(theirs.state_dict())
    given = inputs("image_encoder", config, height, width)
    close(run("image_encoder", ours, given)["token"], outputs("image_encoder", theirs, given)["token"])


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_noise_levels_equal_those_of_diffusers(steps):
    sigmas = karras_sigmas(steps)
    assert sigmas.shape == (steps + 1,) and sigmas[0] == 700 and sigmas[-1] == 0
    assert steps == 1 or sigmas[-2].item() == pytest.approx(0.002)
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=1e-5, atol=0)


SCHEDULER = {  # the published scheduler_config.json
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "interpolation_type": "linear",
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}
TOWER = ImageEncoderConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    patch_size=56,  # the pipeline insists on images of 224
    projection_dim=12,
)


@pytest.mark.parametrize("guidance", [(1.0, 3.0), (1.0, 1.0)])
def test_image_to_video_equals_the_pipeline_of_diffusers(guidance):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    configs = {
        "unet": replace(MODELS["unet"], block_out_channels=(64, 64), layers_per_block=1, attention=(True, False),
                        num_attention_heads=(2, 2), addition_time_embed_dim=32),
        "vae": replace(MODELS["vae"], block_out_channels=(32, 32, 32, 32), layers_per_block=1),
        "image_encoder": TOWER,
    }  # fmt: skip
    theirs = {name: fill(reference(name, config)) for name, config in configs.items()}
    ours = {name: fill(CLASSES[name](config)) for name, config in configs.items()}
    pipeline = diffusers.StableVideoDiffusionPipeline(
        **theirs,
        scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULER),
        feature_extractor=transformers.CLIPImageProcessor(),
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (2, 48, 32, 3), generator=generator, dtype=torch.uint8)
    from PIL import Image

    shared = {"motion_bucket_id": 90, "fps": 9}
    expected = pipeline(
        [Image.fromarray(p.numpy()) for p in pixels], height=48, width=32, num_frames=4, num_inference_steps=5,
        min_guidance_scale=guidance[0], max_guidance_scale=guidance[1], noise_aug_strength=0.1, decode_chunk_size=2,
        generator=torch.Generator().manual_seed(1), output_type="pt", **shared,
    ).frames  # fmt: skip
    video = image_to_video(
        *(ours[name] for name in ("unet", "vae", "image_encoder")), pixels.movedim(-1, 1) / 127.5 - 1, frames=4,
        steps=5, noise_aug=0.1, guidance=guidance, generator=torch.Generator().manual_seed(1), decode_chunk=2, **shared,
    )  # fmt: skip
    assert video.shape == (2, 4, 3, 48, 32) and video.std() > 0.1 and video.abs().max() <= 1
    assert (video - (expected * 2 - 1)).abs().max() < 2e-3


def test_image_to_video_takes_latents_and_names_a_size_that_does_not_fit():
    models = [fill(UNet(replace(TINY, cross_attention_dim=12))), fill(VAE(MODELS["vae"]))]
    models.append(fill(ImageEncoder(MODELS["image_encoder"])))
    image, latents = torch.rand(1, 3, 8, 12) * 2 - 1, torch.randn(1, 2, 4, 2, 3)
    settings = {"frames": 2, "steps": 2, "noise_aug": 0.0}
    a, b = (image_to_video(*models, image, latents=latents, **settings) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, image_to_video(*models, image, latents=-latents, **settings))
    with pytest.raises(ValueError, match="10x8"):
        image_to_video(*models, image[..., :10], **settings)


# --------------------------------------------------------------------------------------------- names, shapes and files


def test_full_size_unet_has_the_published_tensors():
    with torch.device("meta"):
        ours = {name: value.shape for name, value in UNet(UNetConfig()).state_dict().items()}
    assert len(ours) == 1428 and sum(shape.numel() for shape in ours.values()) == 1_524_623_082
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.UNetSpatioTemporalConditionModel()
    assert ours == {name: value.shape for name, value in theirs.state_dict().items()}


def test_weights_without_effect_are_those_of_the_query_to_one_token():
    """3 % of the full UNet. What they are changes nothing; tests/test_train.py: all others get a gradient."""
    with torch.device("meta"):
        assert sum(value.numel() for value in without_effect(UNet(UNetConfig()))) == 50_389_760
        assert without_effect(VAE(VAEConfig())) == []
    model, given = tiny(layers_per_block=2), unet_inputs()
    with torch.no_grad():
        before = model(**given)
        for value in without_effect(model):
            value.fill_(7.0)
        assert torch.equal(model(**given), before)


@pytest.mark.parametrize(("name", "count"), [("vae", 97_742_847), ("image_encoder", 632_076_800)])
def test_full_size_vae_and_image_encoder_have_the_published_tensors(name, count):
    config = CLASSES[name].CONFIG()
    with torch.device("meta"):
        ours = {key: value.shape for key, value in CLASSES[name](config).state_dict().items()}
    assert sum(shape.numel() for shape in ours.values()) == count
    pytest.importorskip("diffusers" if name == "vae" else "transformers")
    with torch.device("meta"):
        theirs = reference(name, config)
    assert ours == {key: value.shape for key, value in theirs.state_dict().items()}


@pytest.mark.parametrize("name", CLASSES)
def test_reference_opens_ours_and_we_open_theirs(name, tmp_path):
    library = pytest.importorskip("transformers" if name == "image_encoder" else "diffusers")
    ours = fill(CLASSES[name](MODELS[name]))
    ours.save_pretrained(tmp_path / "ours")
    theirs = getattr(library, type(reference(name, MODELS[name])).__name__).from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = CLASSES[name].from_pretrained(tmp_path, "theirs")
    assert again.config == ours.config
    for key, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], value) and torch.equal(again.state_dict()[key], value)
    assert all(value.requires_grad for value in again.parameters())


def test_settings_survive_saving(tmp_path):
    unet, vae = tiny(), VAE(VAEConfig(block_out_channels=(8, 16, 16), layers_per_block=1, channels_per_group=4))
    vae.scaling_factor = 0.7
    unet.save_pretrained(tmp_path / "unet")
    vae.save_pretrained(tmp_path / "vae")
    assert UNet.from_pretrained(tmp_path / "unet").config == TINY
    loaded = VAE.from_pretrained(tmp_path, "vae", dtype=torch.bfloat16)
    assert loaded.scaling_factor == 0.7 and loaded.config.channels_per_group == 4 and loaded.factor == 4
    assert {value.dtype for value in loaded.parameters()} == {torch.bfloat16}
    assert loaded.encoder.down_blocks[0].resnets[0].norm1.num_groups == 2
    assert not list(tmp_path.rglob("*.partial"))


PUBLISHED = {  # as in the published unet/config.json (25 frames)
    "_class_name": "UNetSpatioTemporalConditionModel",
    "_diffusers_version": "0.24.0.dev0",
    "addition_time_embed_dim": 256,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlockSpatioTemporal"],
    "in_channels": 8,
    "layers_per_block": 2,
    "num_attention_heads": [5, 10, 20, 20],
    "num_frames": 25,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 768,
    "sample_size": 96,
    "transformer_layers_per_block": 1,
    "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 3,
}


def test_published_settings_are_the_defaults():
    assert UNetConfig.from_dict(PUBLISHED) == UNetConfig()
    assert UNetConfig.from_dict(PUBLISHED | {"transformer_layers_per_block": [1, 1, 1, 1]}) == UNetConfig()
    assert UNetConfig.from_dict(PUBLISHED | {"num_attention_heads": 8}).num_attention_heads == (8,) * 4
    clip = ImageEncoderConfig().to_dict() | {"transformers_version": "4.34.0", "torch_dtype": "float16", "dropout": 0}
    assert ImageEncoderConfig.from_dict(clip) == ImageEncoderConfig()
    assert VAEConfig.from_dict(VAEConfig().to_dict() | {"force_upcast": False}) == VAEConfig()


@pytest.mark.parametrize(
    ("config", "changes", "key"),
    [
        (PUBLISHED, {"transformer_layers_per_block": 2}, "transformer_layers_per_block"),
        (PUBLISHED, {"layers_per_block": [2, 2, 2, 1]}, "layers_per_block"),
        (PUBLISHED, {"projection_class_embeddings_input_dim": 512}, "projection_class_embeddings_input_dim"),
        (PUBLISHED, {"up_block_types": ["UpBlockSpatioTemporal"] * 4}, "up_block_types"),
        (PUBLISHED, {"down_block_types": ["DownBlock3D"] * 4}, "down_block_types"),
        (PUBLISHED, {"num_attention_heads": [5, 10, 20, 24]}, "num_attention_heads"),
        (PUBLISHED, {"num_attention_heads": [5, 10, 20]}, "num_attention_heads"),
        (PUBLISHED, {"class_embed_type": "timestep"}, "class_embed_type"),
        (PUBLISHED, {"in_channels": None}, "in_channels"),
        (PUBLISHED, {"block_out_channels": 320}, "block_out_channels"),
        (VAEConfig().to_dict(), {"out_channels": 4}, "out_channels"),
        (VAEConfig().to_dict(), {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        (ImageEncoderConfig().to_dict(), {"hidden_act": "quick_gelu"}, "hidden_act"),
        (ImageEncoderConfig().to_dict(), {"layer_norm_eps": 1e-6}, "layer_norm_eps"),
    ],
)
def test_settings_that_mean_another_network_are_named(config, changes, key, tmp_path):
    cls = UNet if config is PUBLISHED else VAE if "latent_channels" in config else ImageEncoder
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=rf"config\.json: {key}") as caught:
        cls.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_setting_and_broken_json_are_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in PUBLISHED.items() if key != "out_channels"}))
    with pytest.raises(ValueError, match=r"config\.json: out_channels is missing"):
        UNet.from_pretrained(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        UNet.from_pretrained(tmp_path)


@pytest.fixture
def saved(tmp_path):
    tiny().save_pretrained(tmp_path)
    return tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"


def fails(folder, *parts):
    with pytest.raises(ValueError) as caught:
        UNet.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder / "diffusion_pytorch_model.safetensors") in message
    for part in parts:
        assert part in message, message


def test_loading_lists_what_does_not_fit(saved):
    folder, path = saved
    tensors = load_file(path)
    removed = {key: value for key, value in tensors.items() if not key.startswith("mid_block")}
    count = len(tensors) - len(removed)
    save_file(removed, path)
    fails(folder, f"{count} missing", "mid_block.attentions.0.norm.bias", "...")
    save_file(tensors | {"extra.weight": torch.zeros(1)}, path)
    fails(folder, "1 unexpected (extra.weight)")
    save_file(tensors | {"conv_in.bias": torch.zeros(9)}, path)
    fails(folder, "1 misshapen (conv_in.bias [9], not [8])")
    save_file(removed | {"conv_in.bias": torch.zeros(9), "extra": torch.zeros(1)}, path)
    fails(folder, "missing", "unexpected", "misshapen")


def test_damaged_and_missing_files_are_named(saved):
    folder, path = saved
    path.write_bytes(path.read_bytes()[:-100])
    fails(folder, "truncated")
    path.write_bytes(b"short")
    fails(folder, "damaged")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model.safetensors"):
        UNet.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        UNet.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        UNet.from_pretrained(folder, "nowhere")


def test_half_precision_variant_opens_when_it_is_the_only_one(saved):
    folder, path = saved
    save_file({key: value.half() for key, value in load_file(path).items()}, folder / f"{path.stem}.fp16.safetensors")
    assert UNet.from_pretrained(folder).conv_in.weight.dtype == torch.float32
    path.unlink()
    half = UNet.from_pretrained(folder)
    assert half.conv_in.weight.dtype == torch.float16
    given = unet_inputs()
    full = UNet.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert full(**given).dtype == torch.float32
        output = half(**given)  # takes float32, computes in half precision
        assert output.dtype == torch.float16
        close(output.float(), tiny()(**given), 2e-2)


def test_old_clip_files_may_list_position_ids(tmp_path):
    ours = fill(ImageEncoder(MODELS["image_encoder"]))
    ours.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}, path)
    loaded = ImageEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.visual_projection.weight, ours.visual_projection.weight)


def test_failed_save_keeps_the_old_file(saved, monkeypatch):
    folder, path = saved
    before = path.read_bytes()

    def broken(tensors, filename, metadata):
        filename.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr("weights.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        tiny(seed=1).save_pretrained(folder)
    assert path.read_bytes() == before


def test_model_saves_over_the_file_it_is_mapped_from(saved):
    folder, path = saved
    model = UNet.from_pretrained(folder)
    with torch.no_grad():
        model.conv_in.bias += 1
    model.save_pretrained(folder)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("conv_in.bias"), tiny().conv_in.bias + 1)
    load_strict(model, path)


def test_hub_downloads_only_what_is_needed(monkeypatch, tmp_path):
    asked = []

    def snapshot(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        (tmp_path / "unet").mkdir(exist_ok=True)
        if "unet/diffusion_pytorch_model.safetensors" in allow_patterns:
            (tmp_path / "unet/diffusion_pytorch_model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_source("some/model", "unet") == tmp_path / "unet"
    always = ["unet/config.json", "unet/*.index*.json"]
    assert asked[0] == ("some/model", [*always, "unet/*.fp16*.safetensors"])  # first choice
    assert len(asked) == 2 and asked[1][1][:2] == always  # nothing came: full precision
    (tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors").touch()
    resolve_source("some/model", "unet")
    assert len(asked) == 3
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resolve_source(tmp_path, "vae")
    for path in ("./some/model", "/some/model", "model", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            resolve_source(path)
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("GatedRepoError", "accept the licence"),
        ("RepositoryNotFoundError", "no such public model"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("a kind of it", "cannot be reached"),
        ("of another library", "the line dropped"),
    ],
)
def test_hub_errors_say_what_to_do(kind, advice, monkeypatch):
    import huggingface_hub.errors

    absent = huggingface_hub.errors.LocalEntryNotFoundError
    others = {"a kind of it": type("Incomplete", (absent,), {}), "of another library": type("Read", (Exception,), {})}
    error = others.get(kind) or getattr(huggingface_hub.errors, kind)

    def snapshot(repo, allow_patterns):
        failed = error.__new__(error)
        failed.args = failed.args or ("the line dropped\nand more",)
        raise failed

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(ValueError, match=advice) as caught:
        resolve_source("some/model", "unet")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("some/model: ")


def test_offline_another_variant_may_have_been_fetched(monkeypatch, tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError

    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").touch()

    def snapshot(repo, allow_patterns):
        if any("fp16" in pattern for pattern in allow_patterns):
            raise LocalEntryNotFoundError.__new__(LocalEntryNotFoundError)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_source("some/model", "unet") == tmp_path / "unet"


def test_an_index_whose_shards_were_not_fetched_stands_back(tmp_path):
    """Of a repository with full precision in shards and half precision in one file. With a shard there, it counts."""
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    half = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    half.touch()
    assert weights_in(tmp_path, "diffusion_pytorch_model") == [half]
    (tmp_path / shards[1]).touch()
    assert weights_in(tmp_path, "diffusion_pytorch_model") == [tmp_path / name for name in shards]
    for path in (half, tmp_path / shards[1]):
        path.unlink()
    assert weights_in(tmp_path, "diffusion_pytorch_model") == [tmp_path / name for name in shards]  # which are told


# --------------------------------------------------------------------------------------- what Motion Dreamer builds on


def test_batch_of_two_equals_two_batches_of_one():
    model, given = tiny(), unet_inputs()
    with torch.no_grad():
        both = model(**given)
        for i in range(2):
            close(model(**{key: value[i : i + 1] for key, value in given.items()}), both[i : i + 1])


def zeros_for(model, given):
    """Residuals and queries that do nothing, of the right shapes."""
    batch, frames, _, h, w = given["sample"].shape
    residuals = []
    for channels in model.residual_channels:
        residuals.append(torch.zeros(batch, frames, channels, h, w))
        h, w = (h + 1) // 2, (w + 1) // 2
    return residuals, [torch.zeros(batch, channels) for channels in model.temporal_query_channels]


def test_zero_residuals_and_queries_change_nothing_and_others_do():
    model, given = tiny(attention=(True, False), layers_per_block=2), unet_inputs(7, 5)
    residuals, queries = zeros_for(model, given)
    assert model.residual_channels == [8, 8] and model.temporal_query_channels == [8, 8, 16, 8, 8, 8]
    with torch.no_grad():
        plain = model(**given)
        assert torch.equal(model(**given, residuals=residuals, temporal_query=queries), plain)
        for i in range(len(residuals)):
            changed = [r + (i == j) for j, r in enumerate(residuals)]
            assert (model(**given, residuals=changed) - plain).abs().max() > 1e-3
        for i in range(len(queries)):
            changed = [q + 3.0 * (i == j) * torch.arange(q.shape[1]) for j, q in enumerate(queries)]
            assert (model(**given, temporal_query=changed) - plain).abs().max() > 1e-5


def test_residuals_enter_before_the_skip_connection():
    """Level 0: equal to another bias of conv_in. Level 1: to another bias of the downsampler. Both reach the skips."""
    model, given = tiny(), unet_inputs()
    residuals, _ = zeros_for(model, given)
    for level, conv in enumerate((model.conv_in, model.down_blocks[0].downsamplers[0].conv)):
        offset = torch.randn(conv.bias.shape)
        changed = [r + (i == level) * offset[: r.shape[2], None, None] for i, r in enumerate(residuals)]
        with torch.no_grad():
            output = model(**given, residuals=changed)
            conv.bias += offset
            expected = model(**given)
            conv.bias -= offset
        close(output, expected)


def test_constant_in_temporal_keys_cancels_and_in_queries_acts():
    """Why the camera goes to the queries: softmax over keys ignores what all keys share."""
    model, given = tiny(), unet_inputs()
    levels = [*model.down_blocks, model.mid_block, *model.up_blocks]
    blocks = [a.temporal_transformer_blocks[0].attn1 for level in levels for a in level.attentions]
    assert len(blocks) == len(model.temporal_query_channels) == 7
    offsets = [torch.randn(2, channels) for channels in model.temporal_query_channels]
    with torch.no_grad():
        plain = model(**given)
        hooks = [
            block.to_k.register_forward_hook(lambda _, __, y, offset=offset: y + offset[:, None, None, None])
            for block, offset in zip(blocks, offsets, strict=True)
        ]
        close(model(**given), plain)
        for hook in hooks:
            hook.remove()
        queried = model(**given, temporal_query=offsets)
        assert (queried - plain).abs().max() > 1e-3
        hooks = [
            block.to_q.register_forward_hook(lambda _, __, y, offset=offset: y + offset[:, None, None, None])
            for block, offset in zip(blocks, offsets, strict=True)
        ]
        close(model(**given), queried)  # the order of `temporal_query` is the order of the blocks


def test_only_one_context_token_is_accepted():
    given = unet_inputs()
    with pytest.raises(ValueError, match=r"\[2, 2, 6\].*single token"):
        tiny()(**given | {"context": torch.zeros(2, 2, 6)})


def test_gradient_checkpointing_gives_equal_gradients():
    given = unet_inputs()
    gradients = []
    for checkpointing in (False, True):
        model = tiny()
        model.gradient_checkpointing = checkpointing
        residuals, queries = ([x.requires_grad_() for x in xs] for xs in zeros_for(model, given))
        model(**given, residuals=residuals, temporal_query=queries).square().sum().backward()
        values = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        values |= {f"input.{i}": value.grad for i, value in enumerate([*residuals, *queries])}
        gradients.append(values)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 100
    for name, value in gradients[0].items():
        assert value.abs().max() > 0, name
        close(gradients[1][name], value, 1e-5)


def test_inference_equals_training_and_autocast_is_close():
    model, given = tiny(), inputs("unet", TINY, 33, 40)  # large enough for feed-forward in parts
    plain = model(**given).detach()
    with torch.no_grad():
        close(model(**given), plain)
        with torch.autocast("cpu", torch.bfloat16):
            close(model(**given).float(), plain, 0.1)


# -------------------------------------------------------------------------------------------- single-file checkpoints

KNOWN_NAMES = {  # of svd.safetensors
    "unet": {
        "add_embedding.linear_2.bias": "label_emb.0.2.bias",
        "time_embedding.linear_1.weight": "time_embed.0.weight",
        "conv_norm_out.weight": "out.0.weight",
        "down_blocks.0.resnets.0.time_mixer.mix_factor": "input_blocks.1.0.time_mixer.mix_factor",
        "down_blocks.0.resnets.0.temporal_res_block.conv2.bias": "input_blocks.1.0.time_stack.out_layers.3.bias",
        "down_blocks.0.resnets.0.spatial_res_block.time_emb_proj.bias": "input_blocks.1.0.emb_layers.1.bias",
        "down_blocks.0.attentions.0.time_pos_embed.linear_2.bias": "input_blocks.1.1.time_pos_embed.2.bias",
        "down_blocks.0.attentions.0.time_mixer.mix_factor": "input_blocks.1.1.time_mixer.mix_factor",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
        "up_blocks.0.upsamplers.0.conv.bias": "output_blocks.2.1.conv.bias",
        "up_blocks.1.upsamplers.0.conv.bias": "output_blocks.5.2.conv.bias",
    },
    "vae": {
        "encoder.mid_block.attentions.0.to_q.bias": "conditioner.embedders.3.encoder.encoder.mid.attn_1.q.bias",
        "quant_conv.weight": "conditioner.embedders.3.encoder.quant_conv.weight",
        "decoder.mid_block.resnets.1.time_mixer.mix_factor": "first_stage_model.decoder.mid.block_2.mix_factor",
        "decoder.time_conv_out.weight": "first_stage_model.decoder.conv_out.time_mix_conv.weight",
        "decoder.up_blocks.2.upsamplers.0.conv.bias": "first_stage_model.decoder.up.1.upsample.conv.bias",
        "decoder.mid_block.resnets.0.temporal_res_block.norm1.bias": "first_stage_model.decoder.mid.block_1.time_stack."
        "in_layers.0.bias",
    },
    "image_encoder": {
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
        "vision_model.encoder.layers.31.self_attn.k_proj.bias": "visual.transformer.resblocks.31.attn.in_proj_bias",
        "vision_model.encoder.layers.0.self_attn.out_proj.bias": "visual.transformer.resblocks.0.attn.out_proj.bias",
        "visual_projection.weight": "visual.proj",
    },
}


def full_table(name):
    with torch.device("meta"):
        return single_file_table(CLASSES[name](CLASSES[name].CONFIG()))


@pytest.mark.parametrize("name", CLASSES)
def test_full_size_models_find_the_names_of_the_single_file(name):
    table = full_table(name)
    beginning = {"unet": "model.diffusion_model.", "image_encoder": "conditioner.embedders.0.open_clip.model."}
    for ours, theirs in KNOWN_NAMES[name].items():
        assert table[ours] == beginning.get(name, "") + theirs
    assert len(set(table.values())) == {"unet": 1428, "vae": 374, "image_encoder": 520 - 32 * 4}[name]


def test_block_numbers_are_those_of_diffusers():
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    table = full_table("unet")
    values = {theirs: ours for ours, theirs in table.items() if "label_emb" not in theirs}
    found = utils.convert_ldm_unet_checkpoint(values, {"layers_per_block": 2})
    temporal = {"temporal_res_block": "time_stack", "temporal_transformer_blocks": "time_stack"}
    temporal |= {"time_pos_embed.linear_1": "time_pos_embed.0", "time_pos_embed.linear_2": "time_pos_embed.2"}
    assert len(found) == len(values)
    for theirs, ours in found.items():
        for word, other in {**temporal, "spatial_res_block.": ""}.items():
            ours = ours.replace(word, other)
        assert ours == theirs


def test_vae_names_are_those_of_diffusers():
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    spatial = {theirs: ours for ours, theirs in full_table("vae").items() if "time_" not in theirs}
    numbers = {theirs: torch.full((1,), i) for i, theirs in enumerate(spatial)}
    joined = {k.replace("conditioner.embedders.3.encoder", "first_stage_model"): v for k, v in numbers.items()}
    levels = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    found = utils.convert_ldm_vae_checkpoint(joined, levels)
    assert len(found) == len(spatial)
    for name, number in found.items():
        ours = spatial[list(spatial)[int(number)]]
        assert ours.replace("spatial_res_block.", "").replace("time_mixer.", "") == name


SMALL = {
    "unet": TINY,
    "vae": replace(MODELS["vae"], block_out_channels=(32, 64)),
    "image_encoder": MODELS["image_encoder"],
}


def single_file(path, half=False, **changes):
    """Three random models in one file of the original layout, with what no part of ours needs."""
    models, tensors = {name: fill(CLASSES[name](config), 3) for name, config in SMALL.items()}, {}
    for model in models.values():
        weights, table = model.state_dict(), single_file_table(model)
        for name, key in table.items():
            value = weights[name]
            if ".in_proj_" in key:
                value = torch.cat([weights[other] for other, its in table.items() if its == key])
            elif key.endswith("visual.proj"):
                value = value.T
            elif ".attn_1." in key and value.ndim == 2:
                value = value[..., None, None]
            tensors[key] = value.contiguous()
    for name in ("embedders.0.open_clip.model.token_embedding.weight", "embedders.0.open_clip.model.logit_scale"):
        tensors[f"conditioner.{name}"] = torch.zeros(3)
    for name in ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"):
        tensors[f"first_stage_model.{name}"] = torch.zeros(3)
    for name in ("decoder.conv_in.weight", "post_quant_conv.weight"):
        tensors[f"conditioner.embedders.3.encoder.{name}"] = torch.zeros(3)
    tensors |= changes
    save_file({k: v.half() if half else v for k, v in tensors.items() if v is not None}, path)
    return models


@pytest.mark.parametrize("half", [False, True])
def test_single_file_and_folder_load_the_same_bits(half, tmp_path):
    models = single_file(tmp_path / "svd.safetensors", half)
    for name, model in models.items():
        (model.half() if half else model).save_pretrained(tmp_path / "folder" / name)
        one = CLASSES[name].from_pretrained(tmp_path / "svd.safetensors", name, config=SMALL[name])
        other = CLASSES[name].from_pretrained(tmp_path / "folder", name)
        assert one.config == other.config
        assert all(not value.is_meta for value in one.buffers())
        for key, value in other.state_dict().items():
            assert torch.equal(one.state_dict()[key], value) and one.state_dict()[key].dtype == value.dtype, key
        one.save_pretrained(tmp_path / "again")  # q, k and v share memory here
        assert load_file(tmp_path / "again" / f"{one.STEM}.safetensors").keys() == other.state_dict().keys()


def test_single_file_must_hold_every_tensor_and_no_unknown_one(tmp_path):
    path, attention = (
        tmp_path / "svd.safetensors",
        "conditioner.embedders.0.open_clip.model.visual.transformer.resblocks.0",
    )
    wrong = {
        "unet": {"model.diffusion_model.out.2.bias": None, "model.diffusion_model.extra": torch.zeros(1)},
        "vae": {"first_stage_model.decoder.conv_out.bias": torch.zeros(7), "first_stage_model.post": torch.zeros(1)},
        "image_encoder": {f"{attention}.attn.in_proj_bias": torch.zeros(2), "model_emb.decay": torch.zeros(1)},
    }
    told = {
        "unet": ["1 missing (model.diffusion_model.out.2.bias)", "1 unexpected (model.diffusion_model.extra)"],
        "vae": ["first_stage_model.decoder.conv_out.bias [7], not [3]", "1 unexpected (first_stage_model.post)"],
        "image_encoder": ["attn.in_proj_bias [1], not", "1 unexpected (model_emb.decay)"],
    }
    for name, changes in wrong.items():
        single_file(path, **changes)
        with pytest.raises(ValueError) as caught:
            CLASSES[name].from_pretrained(path, config=SMALL[name])
        assert str(caught.value).startswith(f"{path}: does not fit the model: ") and "\n" not in str(caught.value)
        assert all(words in str(caught.value) for words in told[name]), caught.value
    left = ["model_ema.decay", "model_ema.diffusion_modeltime_embed0weight", "denoiser.sigmas", "loss_fn.sigmas"]
    single_file(path, **{name: torch.zeros(1) for name in [*left, "first_stage_model.loss.logvar"]})  # of a training
    assert all(CLASSES[name].from_pretrained(path, config=SMALL[name]) for name in CLASSES)
    single_file(path)
    with pytest.raises(ValueError, match="misshapen"):  # without a config: not of SVD's size
        ImageEncoder.from_pretrained(path)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="damaged or truncated"):
        UNet.from_pretrained(path, config=TINY)


def test_a_stage_exports_its_unet_to_diffusers(tmp_path):
    """More channels go in and come out than in SVD's; camera and flow control stay behind."""
    diffusers = pytest.importorskip("diffusers")
    from motion_dreamer import STAGE1, MotionDreamer

    config = replace(MODELS["unet"], block_out_channels=(32, 64), attention=(True, True), num_attention_heads=(2, 2))
    stage = MotionDreamer(replace(STAGE1, vae_factor=2), config)
    fill(stage.unet).save_pretrained(tmp_path / "unet")
    theirs = diffusers.UNetSpatioTemporalConditionModel.from_pretrained(tmp_path, subfolder="unet")
    given = inputs("unet", stage.unet.config, 5, 6)
    assert given["sample"].shape[2] == 24
    close(run("unet", stage.unet, given)["sample"], outputs("unet", theirs, given)["sample"])


# ----------------------------------------------------------------------------------------------------- latents of video


@pytest.mark.parametrize("stack", [1, 2])
def test_video_latents_are_scaled_and_stacked_cell_by_cell(stack):
    """factor = stack times the VAE's: latents of stack x stack neighbours follow each other, channel by channel."""
    vae, pictures = tiny_vae(), torch.rand(2, 3, 3, 12, 20) * 2 - 1
    vae.scaling_factor = 0.7
    latents = encode_video(vae, pictures, vae.factor * stack, chunk=4)  # of 6 pictures
    single = torch.stack([torch.stack([vae.encode(frame[None])[0] for frame in video]) for video in pictures])
    h, w, C = 12 // vae.factor // stack, 20 // vae.factor // stack, single.shape[2]
    assert latents.shape == (2, 3, C * stack**2, h, w)
    for c in range(C):
        for dy in range(stack):
            for dx in range(stack):
                found = latents[:, :, c * stack**2 + dy * stack + dx]
                torch.testing.assert_close(found, 0.7 * single[:, :, c, dy::stack, dx::stack], rtol=1e-4, atol=1e-5)
    decoded = decode_video(vae, latents, vae.factor * stack)
    torch.testing.assert_close(decoded, vae.decode(single), rtol=1e-4, atol=1e-4)


def test_a_gpu_decodes_as_many_frames_as_fit_in_equal_parts(monkeypatch):
    vae, gpu, memory = tiny_vae(), torch.device("cuda"), {"free": 0, "reserved": 0, "allocated": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory["free"], 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: memory["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory["allocated"])
    frame = 4 * 16 * 100 * 4  # 16 channels, 100 pixels, float32

    def fit(frames, free, reserved=0, allocated=0, here=True):
        monkeypatch.setattr(torch.nn.Parameter, "is_cuda", here)
        memory.update(free=free, reserved=reserved, allocated=allocated)
        return frames_that_fit(vae, vae.decoder, frames, 100, gpu)

    assert fit(14, 14 * frame) == 14 and fit(14, 99 * frame) == 14
    assert fit(14, 14 * frame - 1) == 7  # not 13 and 1
    assert fit(5, 2 * frame) == 2 and fit(5, 4 * frame) == 3  # 2, 2, 1 and 3, 2
    assert fit(5, frame) == fit(5, 0) == 1
    assert fit(5, 2 * frame, reserved=8 * frame, allocated=5 * frame) == 5
    assert fit(14, 2 * frame, reserved=12 * frame, allocated=9 * frame) == 5  # 5, 5, 4
    assert fit(14, 2 * frame, reserved=12 * frame, allocated=9 * frame, here=False) == 14  # --offload: that will go
    vae.decoder.half()
    assert fit(14, 7 * frame) == 14
    assert frames_that_fit(vae, vae.decoder, 14, 1 << 40, torch.device("cpu")) == 14


def test_video_goes_through_the_vae_in_parts_that_fit(monkeypatch):
    vae, pictures, asked = tiny_vae(), torch.rand(2, 5, 3, 8, 12) * 2 - 1, []
    monkeypatch.setattr("svd.frames_that_fit", lambda *told: asked.append(told[1:]) or 2)
    latents = encode_video(vae, pictures, 2 * vae.factor)
    decoded = decode_video(vae, latents, 2 * vae.factor)
    assert asked == [(vae.encoder, 10, 96, latents.device), (vae.decoder, 5, 2 * 96, latents.device)]
    monkeypatch.undo()
    torch.testing.assert_close(latents, encode_video(vae, pictures, 2 * vae.factor), rtol=1e-4, atol=1e-5)
    assert torch.equal(decoded, decode_video(vae, latents, 2 * vae.factor, chunk=2))  # the last frame by itself
    assert (decoded - decode_video(vae, latents, 2 * vae.factor)).abs().max() > 1e-4


def test_a_decoder_in_half_precision_gives_float32_and_never_nan():
    vae, latents = tiny_vae(), torch.randn(1, 2, 4, 3, 5)
    full = decode_video(vae, latents, vae.factor)
    vae.decoder.half()
    half = decode_video(vae, latents, vae.factor)
    assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.02 * full.abs().max()
    assert vae.encode(torch.zeros(1, 3, 4, 4)).dtype == torch.float32
    vae.decoder.conv_in.weight.mul_(1e30)  # beyond 65,504
    with pytest.raises(FloatingPointError, match="decoder .* then try fp32"):
        decode_video(vae, latents, vae.factor)
