"""The commands, as a newcomer meets them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from hieratok.cli import main, make_parser, parse
from hieratok.models.presets import PRESETS

TINY = [
    "model.image_size=32", "model.patch_size=8", "model.latent_channels=4", "model.scales=[1,2,4]",
    "model.encoder_num_layers=1", "model.encoder_hidden_size=32", "model.encoder_num_heads=2",
    "model.decoder_num_layers=2", "model.decoder_hidden_size=32", "model.decoder_num_heads=2",
    "train.epochs=null", "train.steps=4", "train.batch_size=4", "train.log_every=2", "train.checkpoint_every=4",
    "train.picture_every=4", "train.tensorboard=false", "data.num_workers=0", "data.val_fraction=0.3",
    "eval.batch_size=8",
]  # fmt: skip

COMMANDS = [
    [], ["quickstart"], ["train"], ["train", "tokenizer"], ["reconstruct"], ["encode"], ["evaluate"],
    ["evaluate", "reconstruction"], ["evaluate", "generation"], ["train", "generator"], ["sample"], ["compare"],
    ["report"], ["cost"], ["presets"],
]  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text("model: {}\nloss:\n  lpips_network: mini\n")
    return str(path)


@pytest.fixture
def trained(tmp_path, image_folder, recipe):
    """The folder of a finished tiny run."""
    output = tmp_path / "run"
    assert (
        main(["train", "tokenizer", "--config", recipe, *TINY, f"data.source={image_folder}", f"output={output}"]) == 0
    )
    return output


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c) or "hieratok")
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: hieratok" in text and len(text) > 150


def test_help_does_not_wait_for_the_libraries():
    code = "import sys; from hieratok.cli import make_parser; make_parser(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_a_trained_run_holds_what_the_next_commands_need(trained, image_folder, tmp_path, capsys):
    for name in ("run.json", "config.yaml", "metrics.jsonl", "eval.json", "model/config.json", "checkpoints"):
        assert (trained / name).exists(), name
    assert list((trained / "pictures").glob("*.png"))

    photo = str(next(image_folder.rglob("*.jpg")))
    picture = tmp_path / "out.png"
    separate = tmp_path / "each"
    assert (
        main(["reconstruct", photo, "--model", str(trained), "--output", str(picture), "--separate", str(separate)])
        == 0
    )
    assert "dB" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert image.width > 4 * image.height / 2
    assert [p.suffix for p in separate.iterdir()] == [".png"]

    assert main(["encode", str(image_folder), "--model", str(trained), "--out", str(tmp_path / "latents")]) == 0
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert manifest["num_images"] == 24

    result = tmp_path / "result.json"
    arguments = ["evaluate", "reconstruction", str(image_folder), "--model", str(trained), "--output", str(result)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "rFID (mini)" in printed and "LPIPS (mini)" in printed
    assert json.loads(result.read_text())["protocol"]["num_images"] == 24

    assert main(["evaluate", "reconstruction", "--model", str(trained)]) == 0  # the run knows what it held out
    held_out = json.loads((trained / "run.json").read_text())["data"]["num_val"]
    assert f"{held_out} images" in capsys.readouterr().out

    assert main(["report", str(trained)]) == 0
    assert (trained / "report.html").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.learning_rat=1", "learning_rate"),
        ("model.latent_chanels=4", "latent_channels"),
        ("dat.source=x", "data"),
        ("train.precision=bf61", "bf16"),
        ("train.batch_size=many", "train.batch_size"),
        ("data.crop=centre", "center"),
        ("model.patch_size=7", "patch_size"),
        ("model.layer_norm_eps=tiny", "model.layer_norm_eps"),
        ("model.scales=4", "model.scales"),
        ("eval.features=inceptoin", "inception"),
        ("eval.batch_size=0", "eval.batch_size"),
        ("seed=-1", "seed"),
        ("data.source=/nowhere/at/all", "/nowhere/at/all"),
    ],
)
def test_a_mistake_is_named_with_its_remedy_and_writes_nothing(override, named, recipe, tmp_path, capsys, image_folder):
    output = tmp_path / "run"
    values = [*TINY, f"data.source={image_folder}", f"output={output}", override]
    assert main(["train", "tokenizer", "--config", recipe, *values]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and "Traceback" not in error
    assert not output.exists()


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    from hieratok.models.presets import model_fields

    assert model_fields({"preset": "small-32", "layer_norm_eps": "1e-5"})["layer_norm_eps"] == 1e-5


def test_overrides_may_stand_on_both_sides_of_an_option():
    parsed = parse(["train", "tokenizer", "--config", "x", "a=1", "--resume", "b=2"])
    assert parsed.overrides == ["a=1", "b=2"]
    with pytest.raises(SystemExit):
        parse(["train", "tokenizer", "--config", "x", "--resmue", "b=2"])


def test_a_device_that_is_not_there_is_named(trained, image_folder, capsys):
    arguments = ["evaluate", "reconstruction", str(image_folder), "--model", str(trained), "--device", "nonsense"]
    assert main(arguments) == 2
    assert "--device nonsense" in capsys.readouterr().err


def test_an_unknown_recipe_names_the_nearest(capsys):
    assert main(["train", "tokenizer", "--config", "small-46"]) == 2
    assert "small-64" in capsys.readouterr().err


def test_the_dry_run_writes_nothing_and_says_how_long(recipe, tmp_path, capsys, image_folder):
    output = tmp_path / "run"
    values = [*TINY, f"data.source={image_folder}", f"output={output}"]
    assert main(["train", "tokenizer", "--config", recipe, "--dry-run", *values]) == 0
    text = capsys.readouterr().out
    assert "learning_rate" in text and "images/s" in text and "about 4 steps" in text
    assert not output.exists()


def test_cost_prints_the_papers_figures_beside_ours(capsys):
    assert main(["cost", "f16d16", "f16d16-single"]) == 0
    text = capsys.readouterr().out
    assert "401.11M" in text and "346.46M" in text and "401.18M" in text and "341" in text


def test_presets_lists_every_recipe_and_model(capsys):
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in PRESETS) and "quickstart-64" in text


def test_the_quickstart_on_ones_own_images_ends_in_one_page(image_folder, tmp_path, capsys):
    output = tmp_path / "quick"
    # 24 images hold out too few by the default fraction, which the message must say.
    short = ["quickstart", "--data", str(image_folder), "--output", str(output), "--minutes"]
    assert main([*short, "0.05", "--generator-minutes", "0"]) in (0, 2)
    for i, path in enumerate(sorted(image_folder.rglob("*.png")) * 12):
        (path.parent / f"copy-{i}.png").write_bytes(path.read_bytes())
    arguments = [*short, "0.1", "--generator-minutes", "0.05"]
    assert main([*arguments, "--overwrite"]) == 0
    page = (output / "report.html").read_text()
    assert "PSNR" in page and "gFID (mini)" in page and "data:image/png;base64," in page
    assert main(arguments) == 2  # a run is never overwritten unasked
    assert "--overwrite" in capsys.readouterr().err
    assert main(["quickstart", "--output", str(output), "--resume"]) == 0  # with its own data and length
    for folder, minutes in {output: 0.1, output / "generator": 0.05}.items():
        assert json.loads((folder / "run.json").read_text())["config"]["train"]["max_minutes"] == minutes


def test_the_quickstart_never_removes_a_folder_that_is_no_run(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("two years of work")
    assert main(["quickstart", "--output", str(tmp_path), "--overwrite"]) == 2
    assert (tmp_path / "thesis.txt").exists()


def test_the_version_is_the_packages():
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--version"])
