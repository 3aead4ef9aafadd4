"""The generator's commands, one after another, as a newcomer would run them on images of their own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from hieratok import HieraTokPipeline
from hieratok.cli import main
from hieratok.engine.log import METRICS, read_metrics

SMALL = [
    "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "train.epochs=null", "train.steps=4",
    "train.batch_size=8", "train.log_every=2", "train.checkpoint_every=2", "train.picture_every=2",
    "train.tensorboard=false", "sampling.num_inference_steps=3", "eval.num_images=20", "eval.every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with images, a saved tokenizer, its latents, a recipe, and two generators' runs, `ddpm` and `flow`."""
    import torch

    from hieratok.models.tokenizer import HieraTok
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("generator")
    rng = np.random.default_rng(0)
    for i in range(24):
        path = folder / "images" / ["cat", "dog", "owl"][i % 3] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    HieraTok(**TINY).save_pretrained(folder / "tokenizer")
    (folder / "recipe.yaml").write_text("model: {}\ntokenizer: null\n")
    images, tokenizer, latents = (str(folder / name) for name in ("images", "tokenizer", "latents"))
    assert main(["encode", images, "--model", tokenizer, "--out", latents, "--num-workers", "0"]) == 0
    for objective in ("ddpm", "flow"):
        assert (
            main(
                ["train", "generator", "--config", str(folder / "recipe.yaml"), *SMALL, f"tokenizer={tokenizer}"]
                + [f"latents={latents}", f"data.source={images}", f"loss.objective={objective}"]
                + [f"output={folder / objective}"]
            )
            == 0
        )
    return folder


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_a_generators_run_holds_what_the_next_commands_need(made, objective):
    run = made / objective
    assert json.loads((run / "run.json").read_text())["classes"] == ["cat", "dog", "owl"]
    assert {path.name for path in (run / "pictures").iterdir()} == {"step-00000002.png", "step-00000004.png"}
    metrics = json.loads((run / "eval.json").read_text())["metrics"]
    assert metrics["gfid_mini"] > 0 and 1 <= metrics["inception_score_mini"] < 200
    evaluated = [line for line in read_metrics(run / METRICS) if line["kind"] == "eval"]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert evaluated[-1]["gfid_mini"] == metrics["gfid_mini"]
    assert not (run / "samples").exists()  # what was drawn for the figures is not left behind
    assert HieraTokPipeline.from_pretrained(run / "pipeline").class_names == ["cat", "dog", "owl"]


def test_samples_are_drawn_with_a_record_from_which_they_come_again(made, tmp_path):
    arguments = ["sample", str(made / "flow"), "--classes", "owl", "0", "--per-class", "2", "--guidance", "2"]
    for name in ("one", "two"):
        assert main([*arguments, "--output", str(tmp_path / f"{name}.png"), "--separate", str(tmp_path / name)]) == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    record = json.loads((tmp_path / "one.json").read_text())
    assert [image["name"] for image in record["images"]] == ["owl", "owl", "cat", "cat"]
    assert len({image["seed"] for image in record["images"]}) == 4
    assert record["sampling"]["guidance_scale"] == 2 and record["sampling"]["num_inference_steps"] == 3
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == 4 and Image.open(files[0]).size == (32, 32)


def test_every_scale_and_the_strip_across_training_are_drawn(made, tmp_path):
    assert main(["sample", str(made / "ddpm"), "--scales", "--per-class", "1", "--scheduler", "ddim", "--steps", "2",
                 "--output", str(tmp_path / "scales.png")]) == 0  # fmt: skip
    assert main(["sample", str(made / "ddpm"), "--strip", "--output", str(tmp_path / "strip.png")]) == 0
    for name in ("scales.png", "strip.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 100


def test_a_set_of_samples_is_written_and_measured_by_either_path(made, tmp_path, capsys):
    folder, npz = tmp_path / "set", tmp_path / "set.npz"
    assert main(["sample", str(made / "ddpm"), "--num-images", "20", "--output", str(folder), "--npz", str(npz),
                 "--seed", "3"]) == 0  # fmt: skip
    with np.load(npz, allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (20, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    results = []
    images = str(made / "images")
    for arguments in (
        ["--model", str(made / "ddpm"), "--samples", str(folder), "--num-images", "20", "--seed", "3"],
        ["--samples", str(folder), "--reference", images, "--seed", "3"],
        ["--samples", str(npz), "--reference", images, "--seed", "3", "--image-size", "32"],
    ):
        output = tmp_path / f"{len(results)}.json"
        command = ["evaluate", "generation", *arguments, "--output", str(output), "--num-workers", "0"]
        assert main(command) == 0, capsys.readouterr().err
        results.append(json.loads(output.read_text()))
    assert "gFID (mini)" in capsys.readouterr().out
    for other in results[1:]:
        assert other["metrics"] == pytest.approx(results[0]["metrics"], rel=1e-6)
    assert results[0]["protocol"]["sampling"]["scheduler"] == "ddpm"


def test_two_generators_are_compared(made, tmp_path, capsys):
    page = tmp_path / "compare.html"
    assert main(["compare", str(made / "ddpm"), str(made / "flow"), "--output", str(page)]) == 0
    text = capsys.readouterr().out
    assert "gFID (mini)" in text and "objective" in text  # in which the two runs differ
    assert page.read_text().startswith("<!doctype html>")


def test_a_generators_run_has_a_page(made, tmp_path):
    assert main(["report", str(made / "flow"), "--output", str(tmp_path / "report.html")]) == 0
    assert "gFID (mini)" in (tmp_path / "report.html").read_text()


def test_the_dry_run_counts_and_times_and_writes_nothing(made, tmp_path, capsys):
    output = tmp_path / "run"
    given = [f"tokenizer={made / 'tokenizer'}", f"data.source={made / 'images'}", f"output={output}"]
    assert main(["train", "generator", "--config", str(made / "recipe.yaml"), *SMALL, "--dry-run", *given]) == 0
    text = capsys.readouterr().out
    assert not output.exists()
    assert yaml.safe_load(text.split("\n\n")[0])["model"]["hidden_size"] == 32
    for words in ("24 training images", "s per step of 8 images", "about 4 steps", "GFLOPs per step"):
        assert words in text, words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "generator", "--config", "{made}/recipe.yaml"], "give the tokenizer"),
        (["train", "generator", "--config", "small-64", "tokenizer=x"], "use it with hieratok train tokenizer"),
        (["train", "tokenizer", "--config", "dit-b"], "use it with hieratok train generator"),
        (["train", "generator", "--config", "{made}/recipe.yaml", "tokenizer={made}/nothing"], "no autoencoder could"),
        (["train", "generator", "--config", "{made}/recipe.yaml", "tokenizer={made}/tokenizer",
          "latents={made}/latents", "data.source={made}/images/cat"], "another set of images"),
        (["train", "generator", "--config", "{made}/recipe.yaml", "tokenizer={made}/tokenizer",
          "data.source={made}/images", "sampling.scheduler=euler", "output={made}/wrong"], "not go with a ddpm model"),
        (["sample", "{made}/flow", "--classes", "horse"], "no class 'horse'"),
        (["sample", "{made}/images"], "no generator at"),
        (["evaluate", "generation", "--samples", "{made}/images"], "give --model GENERATOR, or --samples"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_an_error_with_a_remedy(made, capsys, arguments, message):
    assert main([word.format(made=made) for word in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (made / "wrong").exists()
