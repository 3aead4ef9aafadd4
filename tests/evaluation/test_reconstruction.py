"""The evaluation of a tokenizer: its keys, its protocol, and that only the model and the data change a figure."""

from __future__ import annotations

import json

import pytest
import torch

from hieratok.data.decode import to_uint8
from hieratok.data.frame import Frame
from hieratok.data.loader import eval_loader
from hieratok.data.opening import open_source
from hieratok.data.source import Subset, spread
from hieratok.errors import ConfigError, DataError, NonFiniteError, ProtocolError
from hieratok.evaluation.frechet import GaussianSums, frechet_distance
from hieratok.evaluation.reconstruction import evaluate_reconstruction, label, reconstruct
from hieratok.models.tokenizer import HieraTok


@pytest.fixture
def source(image_folder):
    return open_source(image_folder)


def evaluate(model, source, **settings):
    return evaluate_reconstruction(model, source, progress=False, **settings)


def flattened(result):
    return {
        **result.metrics,
        **{f"{key}/{side}": value for side, metrics in result.scales.items() for key, value in metrics.items()},
    }


def test_figures_of_the_finest_scale_carry_the_name_of_the_stand_in_network(tiny_model, source):
    metrics = evaluate(tiny_model, source).metrics
    assert list(metrics) == ["rfid_mini", "real_halves_mini", "psnr", "ssim", "lpips_mini", "l1"]
    assert [label(key) for key in metrics] == [
        "rFID (mini)", "real halves (mini)", "PSNR", "SSIM", "LPIPS (mini)", "L1",
    ]  # fmt: skip
    assert label("rfid") == "rFID" and label("lpips_vgg16") == "LPIPS (vgg16)"


def test_coarser_scales_have_the_metrics_that_their_size_permits(tiny_model, source):
    scales = evaluate(tiny_model, source).scales
    assert list(scales) == [1, 2]
    assert set(scales[1]) == {"psnr", "l1"}  # 8 px: below SSIM's window and the network's smallest side
    assert set(scales[2]) == {"psnr", "ssim", "lpips_mini", "l1"}  # 16 px


def test_a_coarse_scale_is_compared_with_the_original_averaged_down_and_rounded(tiny_model, source):
    (batch,) = eval_loader(source, 32, 24)
    coarse = reconstruct(tiny_model, batch.images, batch)[1]
    target = batch.images.double().unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean(dim=(3, 5)).round()
    expected = (coarse.double() - target).abs().mean() / 127.5
    assert evaluate(tiny_model, source).scales[2]["l1"] == pytest.approx(expected.item(), rel=1e-6)


def test_a_perfect_model_has_no_error_at_the_finest_scale(source):
    class Perfect(HieraTok):
        def forward(self, images, sample_posterior=True, generator=None):
            output = super().forward(images, sample_posterior, generator)
            output.scales = (*output.scales[:-1], images + 0.003)  # less than half a grey level
            return output

    model = Perfect(image_size=32, patch_size=16, latent_channels=4, scales=[1, 2], encoder_num_layers=1,
                    encoder_hidden_size=32, encoder_num_heads=2, decoder_num_layers=1, decoder_hidden_size=32,
                    decoder_num_heads=2)  # fmt: skip
    metrics = evaluate(model, source).metrics
    assert metrics["rfid_mini"] == pytest.approx(0, abs=1e-6)
    assert metrics["psnr"] == 100 and metrics["l1"] == 0
    assert metrics["ssim"] == pytest.approx(1) and metrics["lpips_mini"] == pytest.approx(0, abs=1e-6)


def tones(images):
    return images.double().mean(dim=(2, 3))


def test_the_floor_is_the_distance_between_real_images_at_even_and_odd_positions(tiny_model, source):
    result = evaluate(tiny_model, source, features=tones, batch_size=5)
    (batch,) = eval_loader(source, 32, 24)
    halves = [GaussianSums(3), GaussianSums(3)]
    for parity, half in enumerate(halves):
        half.update(tones(batch.images[parity::2]).float())
    assert result.metrics["real_halves_tones"] == pytest.approx(frechet_distance(*halves), rel=1e-6)
    assert result.counts == {"rfid_tones": (24, 24), "real_halves_tones": (12, 12)}
    assert result.protocol.features_sha256 == "unversioned"


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_figures_do_not_depend_on_the_batch_size(tiny_model, source, posterior):
    spread_posterior(tiny_model)
    one, many = (flattened(evaluate(tiny_model, source, batch_size=b, posterior=posterior, seed=3)) for b in (1, 24))
    assert one == pytest.approx(many, rel=1e-4, abs=1e-6)


def test_a_sample_depends_on_the_seed_and_the_mode_does_not(tiny_model, source):
    spread_posterior(tiny_model)
    sample = [evaluate(tiny_model, source, posterior="sample", seed=seed).metrics["psnr"] for seed in (0, 0, 1)]
    mode = [evaluate(tiny_model, source, seed=seed).metrics["psnr"] for seed in (0, 1)]
    assert sample[0] == sample[1] != sample[2]
    assert mode[0] == mode[1] != sample[0]


def spread_posterior(model):
    """An untrained decoder answers to the latent with less than a grey level; this one is loud."""
    with torch.no_grad():
        model.decoder.project.weight *= 50
        for head in model.decoder.to_pixels:
            head.weight *= 20


def test_reconstructions_are_rounded_to_what_a_file_would_hold(tiny_model, source):
    (batch,) = eval_loader(source, 32, 24)
    images = reconstruct(tiny_model, batch.images, batch)
    assert [image.dtype for image in images] == [torch.uint8] * 3
    with torch.no_grad():
        expected = tiny_model(batch.images.float() / 127.5 - 1, sample_posterior=False).sample
    assert (images[-1].int() - to_uint8(expected).int()).abs().max() <= 1


def test_a_model_in_training_comes_back_in_training_even_after_an_error(tiny_model, source):
    tiny_model.train()
    evaluate(tiny_model, source, num_images=4)
    assert tiny_model.training
    torch.nn.init.constant_(tiny_model.decoder.to_pixels[0].bias, float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinite pixels at 8 px"):
        evaluate(tiny_model, source, num_images=4)
    assert tiny_model.training


def test_the_protocol_names_everything_that_the_figures_depend_on(tiny_model, source):
    result = evaluate(tiny_model, source, num_images=9, posterior="sample", seed=7, precision="bf16")
    protocol = result.protocol
    assert (protocol.num_images, protocol.posterior, protocol.seed, protocol.precision) == (9, "sample", 7, "bf16")
    assert (protocol.dataset, protocol.dataset_digest) == (source.name, spread(source, 9).digest)
    assert (protocol.features, protocol.lpips, protocol.image_size) == ("mini", "mini", 32)
    assert len(protocol.features_sha256) == len(protocol.lpips_sha256) == 64
    text = protocol.describe()
    assert len(text.splitlines()) == 2
    for part in ("9 images", "32 px", "centre crop", "the same images", "sample, seed 7", "bf16", "uint8", "mini"):
        assert part in text
    squash = evaluate(tiny_model, source, num_images=9, frame=Frame(32, crop="squash")).protocol
    assert squash.resize.startswith("both sides")


def test_few_images_are_warned_of_in_the_result_and_in_print(tiny_model, source):
    result = evaluate(tiny_model, source, num_images=5000)
    assert len(result.warnings) == 3
    assert "5,000 images were asked for and 24 could be evaluated" in result.warnings[0]
    assert "biased upwards" in result.warnings[1] and "2,048" in result.warnings[1]
    assert "192 dimensions of mini: the covariances are singular" in result.warnings[2]
    assert all(f"warning: {warning}" in result.table() for warning in result.warnings)


def test_the_table_shows_each_scale_each_n_and_the_protocol(tiny_model, source):
    result = evaluate(tiny_model, source)
    text = result.table()
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][:2] == ["rFID", "(mini)"] and lines[0][3:] == ["N", "=", "24", "and", "24"]
    assert lines[1][:3] == ["real", "halves", "(mini)"] and lines[1][4:] == ["N", "=", "12", "and", "12"]
    assert lines[3] == ["scale", "PSNR", "SSIM", "LPIPS", "(mini)", "L1"]
    assert [line[:3] for line in lines[4:7]] == [["1", "(8", "px)"], ["2", "(16", "px)"], ["4", "(32", "px)"]]
    assert lines[4][4:6] == ["-", "-"]
    assert result.protocol.describe() in text


def test_a_saved_result_is_json_with_figures_and_protocol(tiny_model, source, tmp_path):
    result = evaluate(tiny_model, source, num_images=8)
    path = tmp_path / "new" / "eval.json"
    result.save(path)
    assert json.loads(path.read_text()) == result.to_dict()
    assert result.to_dict()["scales"]["2"] == result.scales[2]
    assert [p.name for p in path.parent.iterdir()] == ["eval.json"]


def test_conditions_under_which_a_figure_means_nothing_are_refused(tiny_model, source, tiny_fields):
    result = evaluate(tiny_model, source, num_images=3)
    assert not any("rfid" in key or "halves" in key for key in result.metrics)
    assert result.metrics["psnr"] > 0 and "3 images are too few for Frechet distances" in result.table()
    with pytest.raises(ConfigError, match="num_images is 0"):
        evaluate(tiny_model, source, num_images=0)
    with pytest.raises(ConfigError, match="posterior 'mod'; did you mean 'mode'"):
        evaluate(tiny_model, source, posterior="mod")
    with pytest.raises(ConfigError, match="precision 'fp16'"):
        evaluate(tiny_model, source, precision="fp16")
    with pytest.raises(ConfigError, match="frame.image_size is 64, the model's 32"):
        evaluate(tiny_model, source, frame=Frame(64))
    small = HieraTok(**{**tiny_fields, "image_size": 8, "patch_size": 2})
    with pytest.raises(ProtocolError, match="8 px are too small for features=mini, which needs 16"):
        evaluate(small, source)


def test_too_many_bad_images_stop_the_evaluation(tiny_model, image_folder):
    for path in sorted((image_folder / "a").iterdir())[:2]:
        path.write_bytes(b"not an image")
    with pytest.raises(DataError, match="are bad"):
        evaluate(tiny_model, open_source(image_folder))
    result = evaluate(tiny_model, open_source(image_folder), max_bad_fraction=0.1)
    assert result.protocol.num_images == 22 and "24 images were asked for and 22" in result.warnings[0]


def test_convolutions_are_exact_while_metrics_are_taken_and_as_before_afterwards(tiny_model, source, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    seen = []

    def watching(images):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic))
        return tones(images)

    watching.dim = 3
    evaluate(tiny_model, source, features=watching)
    assert set(seen) == {(False, True)} and torch.backends.cudnn.allow_tf32


def test_halves_too_small_for_a_distance_are_said_to_be_so(tiny_model, image_folder):
    source = open_source(image_folder)
    for index in (1, 3, 5):
        (image_folder / source.key(index)).write_bytes(b"not an image")
    result = evaluate(tiny_model, Subset(source, range(7), "few"), max_bad_fraction=0.5)
    assert result.protocol.num_images == 4 and not result.counts
    assert result.warnings[-1].startswith("4 images are too few for Frechet distances")
    with pytest.raises(DataError, match="no image that could be evaluated"):
        evaluate(tiny_model, Subset(source, [1, 3], "bad"), max_bad_fraction=1.0)


SCRIPT = """
import sys, torch
from accelerate import Accelerator
from hieratok.data.opening import open_source
from hieratok.evaluation import evaluate_reconstruction
from hieratok.models.tokenizer import HieraTok

def tones(images):
    return images.double().mean(dim=(2, 3))

model, folder, output = sys.argv[1:]
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
result = evaluate_reconstruction(HieraTok.from_pretrained(model), open_source(folder), num_images=23, batch_size=5,
                                 features=tones, posterior="sample", progress=False, accelerator=accelerator)
result.save(f"{output}/rank{accelerator.process_index}.json")
accelerator.end_training()
torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None
"""


FAILING = """
import json, sys, torch
from accelerate import Accelerator
from hieratok.data.opening import open_source
from hieratok.evaluation import evaluate_reconstruction
from hieratok.models.tokenizer import HieraTok

model, folder, output = sys.argv[1:]
accelerator = Accelerator(cpu=True)
raised = []

def tones(images):
    return images.double().mean(dim=(2, 3))

def breaks_on_the_second(images):
    if accelerator.process_index == 1:
        raise RuntimeError("out of memory")
    return tones(images)

breaks_on_the_second.dim = 3
for features, allowed in ((tones, 0.05), (breaks_on_the_second, 0.1), (tones, 0.1)):
    try:
        evaluate_reconstruction(HieraTok.from_pretrained(model), open_source(folder), features=features,
                                max_bad_fraction=allowed, progress=False, accelerator=accelerator)
    except Exception as error:
        raised.append(f"{type(error).__name__}: {error}")
with open(f"{output}/rank{accelerator.process_index}.json", "w") as file:
    json.dump(raised, file)
torch.distributed.destroy_process_group()
"""


def test_processes_judge_bad_images_together_and_fail_together(tiny_model, image_folder, tmp_path, run_two_processes):
    tiny_model.save_pretrained(tmp_path / "model")
    source = open_source(image_folder)
    for index in (4, 11):  # one for each process; one of the 24 may be bad
        (image_folder / source.key(index)).write_bytes(b"not an image")
    first, second = run_two_processes(FAILING, tmp_path / "model", image_folder)
    assert len(first) == len(second) == 2
    assert first[0] == second[0] and first[0].startswith("DataError: 2 of 24 images are bad, more than data.max_bad")
    assert first[1].startswith("HieratokError: the evaluation failed in another process")
    assert second[1] == "RuntimeError: out of memory"


def test_two_processes_come_to_the_figures_of_one(tiny_model, image_folder, tmp_path, run_two_processes):
    tiny_model.save_pretrained(tmp_path / "model")
    first, second = run_two_processes(SCRIPT, tmp_path / "model", image_folder)
    assert first == second
    source = open_source(image_folder)
    settings = {"num_images": 23, "features": tones, "posterior": "sample"}
    alone = evaluate(tiny_model, source, batch_size=5, **settings).to_dict()
    assert first["counts"] == alone["counts"] == {"rfid_tones": [23, 23], "real_halves_tones": [12, 11]}
    assert first["protocol"] == alone["protocol"]
    for key in first["counts"]:  # these features are exact, so only the order of the float64 sums differs
        assert first["metrics"][key] == pytest.approx(alone["metrics"][key], rel=1e-8)
    assert first["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
    for side, metrics in alone["scales"].items():
        assert first["scales"][side] == pytest.approx(metrics, rel=1e-6)
