"""The pipeline: what it draws, how it guides, what it gives back, and that its folder holds all of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, DiTPipeline
from safetensors.torch import load_file, save_file

from hieratok import HieraTokPipeline
from hieratok.engine.optimizers import make_optimizers
from hieratok.engine.settings import TrainConfig
from hieratok.errors import CheckpointError, ConfigError, NonFiniteError
from hieratok.generation.loading import load_pipeline
from hieratok.generation.schedulers import DEFAULT_STEPS, SCHEDULERS, make_scheduler
from hieratok.losses.diffusion import DiffusionLossConfig, make_diffusion_loss
from hieratok.models.dit import DiT
from hieratok.models.tokenizer import HieraTok


@pytest.fixture
def diffusers_tokenizer() -> AutoencoderKL:
    """A tokenizer of diffusers for 32 px, with latents of 4 x 16 x 16."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=32,
        scaling_factor=0.5,
    ).eval()  # fmt: skip


def guided(pipeline: HieraTokPipeline, latents, time, labels, scale) -> torch.Tensor:
    """Guidance written out: two questions to the transformer, one by one."""
    times = torch.full((len(labels),), float(time))
    by_class = pipeline.transformer(latents, times, labels).sample
    by_none = pipeline.transformer(latents, times, torch.full_like(labels, pipeline.num_classes)).sample
    mean = by_none[:, :4] + scale * (by_class[:, :4] - by_none[:, :4])
    return torch.cat([mean, by_class[:, 4:]], dim=1)


def questions(seed: int = 0, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    latents = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    return latents, torch.tensor(400), torch.tensor([0, 2, 4])[:count]


# Learned by heart


@pytest.mark.slow
@pytest.mark.parametrize("objective", SCHEDULERS)
def test_latents_that_were_learned_by_heart_are_drawn_by_every_scheduler(objective, tiny_model, generators):
    target = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    model = DiT(
        sample_size=4, in_channels=4, out_channels=4 if objective == "flow" else None, hidden_size=64, num_layers=2,
        num_heads=4, num_classes=8, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    criterion = make_diffusion_loss(DiffusionLossConfig(objective=objective), 8)
    optimizers = make_optimizers(model, TrainConfig(optimizer="muon", weight_decay=0.0))
    steps, labels, random = 400, torch.arange(32) % 8, generators(*range(32))
    for step in range(steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = 1e-2 * min(1, (step + 1) / 20) * (1 - step / steps)
        criterion(lambda *asked: model(*asked).sample, target[labels], labels, random).total.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name in SCHEDULERS[objective]:
        scheduler = make_scheduler(name, objective, model.learns_variance)
        pipeline = HieraTokPipeline(model.eval(), tiny_model, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        found = pipeline(list(range(8)), 1.0, DEFAULT_STEPS[name], generators(*range(8)), output_type="latent").images
        error = (found - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)
        # Of two latents that have nothing to do with each other it is 1.4; the means measured here are 0.05 to 0.17.
        assert error.mean() < 0.3, name
        assert torch.cdist(found.flatten(1), target.flatten(1)).argmin(dim=1).tolist() == list(range(8)), name


# Guidance


@pytest.mark.parametrize("objective", SCHEDULERS)
def test_guidance_is_the_formula_on_all_latent_channels_and_leaves_the_variance_alone(make_pipe, objective):
    pipeline, (latents, time, labels) = make_pipe(objective), questions()
    with torch.no_grad():
        for scale in (0.0, 0.5, 1.0, 4.2):
            found = pipeline.predict(latents, time, labels, scale)
            expected = guided(pipeline, latents, time, labels, scale)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        plain, strong = (pipeline.predict(latents, time, labels, scale) for scale in (1.0, 4.0))
    changed = (plain - strong).abs().amax(dim=(0, 2, 3)) > 1e-3
    assert changed.tolist() == [True] * 4 + [False] * (plain.shape[1] - 4)


def test_a_scale_of_1_asks_the_network_once_and_another_twice(make_pipe):
    pipeline, sizes = make_pipe(), []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    pipeline([0, 1], 1.0, 2)
    pipeline([0, 1], 2.0, 2)
    assert sizes == [2, 2, 4, 4]


@pytest.mark.parametrize("objective", SCHEDULERS)
def test_without_a_class_guidance_of_any_scale_changes_nothing(make_pipe, generators, objective):
    pipeline = make_pipe(objective)
    none = torch.full((2,), pipeline.num_classes)
    with torch.no_grad():
        plain, strong = (pipeline.sample(none, scale, 4, generators(0, 1)) for scale in (1.0, 7.0))
    torch.testing.assert_close(strong, plain, atol=1e-4, rtol=1e-4)


def test_a_scale_of_0_draws_without_the_class(make_pipe, generators):
    pipeline = make_pipe()
    none, labels = torch.full((2,), pipeline.num_classes), torch.tensor([0, 3])
    with torch.no_grad():
        by_none = pipeline.sample(none, 1.0, 4, generators(0, 1))
        found = pipeline.sample(labels, 0.0, 4, generators(0, 1))
    torch.testing.assert_close(found, by_none, atol=1e-4, rtol=1e-4)


def test_outside_its_interval_guidance_does_nothing(make_pipe, generators):
    pipeline = make_pipe()

    def run(scale, interval):
        return pipeline([0, 3], scale, 10, generators(0, 1), guidance_interval=interval, output_type="latent").images

    plain, everywhere = run(1.0, (0.0, 1.0)), run(4.0, (0.0, 1.0))
    assert torch.equal(run(4.0, (0.0, 0.0)), plain)  # the ten times are 0.999, 0.899, ..., 0.099
    assert not torch.allclose(run(4.0, (0.3, 0.6)), plain) and not torch.allclose(run(4.0, (0.3, 0.6)), everywhere)
    assert torch.equal(run(4.0, (0.05, 0.9995)), everywhere)

    sizes: list[int] = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    run(4.0, (0.3, 0.6))
    assert sizes == [2, 2, 2, 2, 4, 4, 4, 2, 2, 2]


# Noise


@pytest.mark.parametrize(("objective", "name"), [(o, name) for o, known in SCHEDULERS.items() for name in known])
def test_with_a_generator_each_an_image_does_not_depend_on_those_beside_it(make_pipe, generators, objective, name):
    pipeline = make_pipe(objective)
    pipeline.scheduler = make_scheduler(name, objective, pipeline.transformer.learns_variance)
    together = pipeline([0, 1, 2], 2.0, 5, generators(7, 8, 9), output_type="latent").images
    alone = pipeline([1], 2.0, 5, generators(8), output_type="latent").images
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    other = pipeline([1], 2.0, 5, generators(9), output_type="latent").images
    assert not torch.allclose(alone, other, atol=0.1)


def test_one_generator_makes_a_whole_call_repeatable(make_pipe):
    pipeline = make_pipe()
    pipeline.scheduler = make_scheduler("ddpm", "ddpm", True)
    first, again, other = (
        pipeline([0, 1], 1.0, 5, torch.Generator().manual_seed(seed), output_type="latent").images
        for seed in (3, 3, 4)
    )  # fmt: skip
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=0.1)


def test_latents_leave_as_the_tokenizer_has_them(make_pipe, generators):
    pipeline = make_pipe()
    latents = pipeline([0, 1], 1.0, 3, generators(0, 1), output_type="latent").images
    with torch.no_grad():
        normal = pipeline.sample(torch.tensor([0, 1]), 1.0, 3, generators(0, 1))
        images = pipeline.vae.decode(latents).sample
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in ([0.1, -0.2, 0.3, 0.0], [1.0, 0.5, 2.0, 1.5]))
    torch.testing.assert_close(latents, normal * std + mean)
    drawn = pipeline([0, 1], 1.0, 3, generators(0, 1), output_type="pt").images
    torch.testing.assert_close(drawn, (images / 2 + 0.5).clamp(0, 1))


# What it gives


def test_output_types_show_the_same_images(make_pipe, generators):
    pipeline = make_pipe()
    found = {kind: pipeline([0, 1], 1.0, 3, generators(0, 1), output_type=kind).images
             for kind in ("pil", "uint8", "pt", "np")}  # fmt: skip
    pixels = found["uint8"]
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 3, 32, 32)
    assert found["pt"].shape == (2, 3, 32, 32) and found["pt"].min() >= 0 and found["pt"].max() <= 1
    np.testing.assert_array_equal(found["np"], found["pt"].permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.stack([np.asarray(i) for i in found["pil"]]), pixels.permute(0, 2, 3, 1).numpy())
    assert (found["pt"] * 255 - pixels.float()).abs().max() <= 0.5 + 1e-4
    as_tuple = pipeline([0, 1], 1.0, 3, generators(0, 1), output_type="uint8", return_dict=False)
    assert torch.equal(as_tuple[0], pixels) and as_tuple[1] is None


@pytest.mark.parametrize("kind", ["pil", "uint8", "pt", "np"])
def test_every_scale_is_given_and_the_last_one_is_the_image(make_pipe, generators, kind):
    pipeline = make_pipe()
    output = pipeline([0, 1], 1.0, 3, generators(0, 1), output_scales=True, output_type=kind)
    sides = [scale[0].size[0] if kind == "pil" else scale.shape[2] for scale in output.scales]
    assert sides == [8, 16, 32] and pipeline.sides == (1, 2, 4)
    assert output.scales[-1] is output.images
    assert pipeline([0], 1.0, 2, output_type=kind).scales is None


def test_classes_are_called_by_number_or_name(make_pipe, generators):
    pipeline = make_pipe()
    assert pipeline.class_names == ["ant", "bee", "cat", "dog", "eel"]
    assert pipeline.class_ids(["cat", 0, "4", "ant"]) == [2, 0, 4, 0]
    by_name, by_number = (pipeline(label, 1.0, 2, generators(0), output_type="pt").images for label in ("dog", 3))
    assert torch.equal(by_name, by_number) and by_name.shape[0] == 1


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (["ape"], {}, "no class 'ape'"),
        (["beee"], {}, "did you mean 'bee'"),
        ([5], {}, "no class 5; this model has the classes 0 to 4"),
        ([-1], {}, "no class -1"),
        (["5"], {}, "no class 5"),
        ([0], {"output_type": "uint"}, "output_type 'uint'; did you mean 'uint8'"),
        ([0, 1], {"generator": [torch.Generator()]}, "1 generators for 2 class_labels"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make_pipe, labels, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_pipe()(labels, num_inference_steps=2, **settings)


def test_latents_that_are_not_finite_are_an_error(make_pipe):
    pipeline = make_pipe()
    pipeline.transformer.to_latents.bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        pipeline([0], num_inference_steps=2)


def test_in_bf16_it_draws_too(make_pipe):
    pipeline = make_pipe().to(torch.bfloat16)
    assert pipeline([0, 1], 2.0, 3, output_type="uint8").images.shape == (2, 3, 32, 32)


# On disk


def test_a_saved_pipeline_comes_back_whole_and_draws_the_same(make_pipe, generators, tmp_path):
    pipeline = make_pipe()
    pipeline.save_pretrained(tmp_path / "saved")
    files = {str(path.relative_to(tmp_path / "saved")) for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert files == {
        "model_index.json", "scheduler/scheduler_config.json",
        *(f"{part}/{file}" for part in ("transformer", "vae")
          for file in ("config.json", "diffusion_pytorch_model.safetensors")),
    }  # fmt: skip
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["transformer"] == ["hieratok", "DiT"] and index["vae"] == ["hieratok", "HieraTok"]
    expected = pipeline([0, 3], 3.0, 4, generators(0, 1), output_scales=True, output_type="uint8")
    for loaded in (HieraTokPipeline.from_pretrained(tmp_path / "saved"), load_pipeline(tmp_path / "saved")):
        assert type(loaded.transformer) is DiT and type(loaded.vae) is HieraTok
        assert loaded.class_names == pipeline.class_names and dict(loaded.config.id2label)["3"] == "dog"
        assert torch.equal(loaded.transformer.position, pipeline.transformer.position)
        found = loaded([0, 3], 3.0, 4, generators(0, 1), output_scales=True, output_type="uint8")
        assert all(torch.equal(a, b) for a, b in zip(found.scales, expected.scales, strict=True))
    part = AutoModel.from_pretrained(str(tmp_path / "saved"), subfolder="transformer")
    assert type(part) is DiT and torch.equal(part.position, pipeline.transformer.position)


@pytest.mark.parametrize("variance", [True, False])
@pytest.mark.parametrize("whose", ["hieratok", "diffusers"])
def test_with_a_scalar_normalisation_diffusers_own_pipeline_draws_the_same(
    make_pipe, tiny_fields, diffusers_tokenizer, tmp_path, variance, whose
):
    torch.manual_seed(0)
    tokenizer = HieraTok(**tiny_fields, scaling_factor=0.5).eval() if whose == "hieratok" else diffusers_tokenizer
    pipeline = make_pipe(
        tokenizer=tokenizer, sample_size=4 if whose == "hieratok" else 16, out_channels=8 if variance else 4,
        latents_mean=[0.0] * 4, latents_std=[2.0] * 4,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path)
    theirs = DiTPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    assert theirs.get_label_ids(["eel"]) == [4]
    settings = {"guidance_scale": 1.0, "num_inference_steps": 6, "output_type": "np"}
    ours = pipeline([0, 4], generator=torch.Generator().manual_seed(1), **settings).images
    found = theirs([0, 4], generator=torch.Generator().manual_seed(1), **settings).images
    assert ours.std() > 0.01
    np.testing.assert_allclose(found, ours, atol=1e-5)


def test_a_tokenizer_of_diffusers_serves_as_well(make_pipe, diffusers_tokenizer, generators, tmp_path):
    pipeline = make_pipe(tokenizer=diffusers_tokenizer, sample_size=16)
    output = pipeline(["ant", 2], 2.0, 3, generators(0, 1), output_scales=True, output_type="uint8")
    assert pipeline.sides == (16,) and [tuple(scale.shape) for scale in output.scales] == [(2, 3, 32, 32)]
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert type(loaded.vae) is AutoencoderKL
    again = loaded(["ant", 2], 2.0, 3, generators(0, 1), output_type="uint8").images
    assert torch.equal(again, output.images)


def spoil(folder: Path, part: str) -> None:
    path = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_pipeline_with_weights_missing_is_refused(make_pipe, tmp_path, part):
    make_pipe().save_pretrained(tmp_path)
    spoil(tmp_path, part)
    with pytest.raises(CheckpointError, match="missing keys"):
        load_pipeline(tmp_path)


def test_what_holds_no_pipeline_is_refused_by_name(make_pipe, tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match=r"no generator at .*nowhere"):
        load_pipeline(tmp_path / "nowhere")
    tiny_model.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match=r"no generator at .*tokenizer"):
        load_pipeline(tmp_path / "tokenizer")
    make_pipe().save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "transformer" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the pipeline in .*damaged is damaged"):
        load_pipeline(tmp_path / "damaged")
    (tmp_path / "damaged" / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the pipeline in .*damaged is damaged"):
        load_pipeline(tmp_path / "damaged")
