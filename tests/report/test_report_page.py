"""The report of a run: one file, complete, honest about what is missing, and safe to open."""

from __future__ import annotations

import html
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from hieratok.engine.pictures import reconstruction_grid, save_picture  # noqa: E402
from hieratok.errors import CheckpointError, DataError, MissingDependencyError  # noqa: E402
from hieratok.report import page  # noqa: E402
from hieratok.report.gallery import build_gallery  # noqa: E402
from hieratok.report.metrics import figure, metric_tables  # noqa: E402
from hieratok.report.page import write_report  # noqa: E402
from hieratok.report.plots import loss_plots, smooth, spread  # noqa: E402
from hieratok.report.record import RunRecord, evenly, longer  # noqa: E402

SIDES = [1, 2, 4]
EVALUATION = {
    "metrics": {"rfid_mini": 14.8312, "real_halves_mini": 5.9921, "psnr": 21.8361, "ssim": 0.7412, "new_figure": 3.25},
    "scales": {"1": {"psnr": 26.123}, "2": {"psnr": 24.456, "ssim": 0.8123}},
    "counts": {"rfid_mini": [205, 205], "real_halves_mini": [103, 102]},
    "protocol": {
        "features": "mini", "features_sha256": "c0ffee42", "lpips": "mini", "image_size": 32, "patch_size": 8,
        "num_images": 205, "dataset": "openmoji", "posterior": "mode",
    },
    "warnings": ["few images"],
}  # fmt: skip


@pytest.fixture
def run_folder(tmp_path: Path, tiny_fields: dict) -> Path:
    """A run that wrote only what every run writes."""
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    config = {"model": tiny_fields, "data": {"source": "openmoji"}}
    data = {
        "name": "openmoji",
        "digest": "ab",
        "num_train": 3886,
        "num_val": 205,
        "licence": "by OpenMoji, CC BY-SA 4.0",
    }
    run = {"config": config, "command": "hieratok quickstart", "started": "2025-11-24T22:48:11+00:00", "seed": 0,
           "versions": {"hieratok": "0.1.0"}, "world_size": 1,
           "device": "CPU with 2 threads", "data": data}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def fill(folder: Path, images: torch.Tensor) -> None:
    """All that a run may write beside."""
    records = [
        {"kind": "train", "step": s, "samples_seen": 8 * s, "elapsed": 0.5 * s, "loss": 9 / s, "l1": 5 / s,
         "mse": 1 / s, "lpips": 3 / s, "kl": 10.0 * s, **{f"l1/{side}": 1 / (s + side) for side in SIDES}}
        for s in range(1, 121)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "eval.json").write_text(json.dumps(EVALUATION))
    for step in range(10, 90, 10):
        scales = [images[:, :, : 8 * side, : 8 * side] for side in SIDES]
        save_picture(reconstruction_grid(images, scales, SIDES), folder / "pictures" / f"step-{step:08}.png")


def text_of(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", markup))


def test_the_page_is_one_file_that_loads_nothing(run_folder, tiny_model, images):
    fill(run_folder, images)
    markup = write_report(run_folder, model=tiny_model, images=images).read_text()
    targets = re.findall(r"(?:src|href|srcset|poster|data)\s*=\s*[\"']([^\"']*)", markup) + re.findall(
        r"url\(([^)]*)", markup
    )
    assert targets and all(target.startswith(("data:image/png;base64,", "#")) for target in targets)
    assert not re.search(r"<(script|link|iframe)\b|@import|<\?xml|<!DOCTYPE svg", markup)
    assert markup.count("<style") == 1  # a style sheet inside an SVG would apply to the whole page


def test_a_full_run_fills_every_section(run_folder, tiny_model, images):
    fill(run_folder, images)
    markup = write_report(run_folder, model=tiny_model, images=images).read_text()
    names = ["reconstructions", "architecture", "curves", "metrics", "cost", "progress", "next"]
    assert re.findall(r'<section id="(\w+)"', markup) == names
    text = text_of(markup)
    for said in (
        "trained on 960 images in 60 seconds on one CPU with 2 threads.",
        "CC BY-SA 4.0",
        "24 November 2025, 22:48 UTC",
        "401.18M",
        "few images",
    ):
        assert said in text
    assert [f"step {step}" for step in (10, 30, 50, 60, 80)] == re.findall(r"<b>(step \d+)</b>", markup)
    assert markup.count('alt="Picture 1 from') == len(SIDES)


def test_every_figure_of_the_evaluation_stands_under_its_name(run_folder, images):
    fill(run_folder, images)
    text = text_of(write_report(run_folder).read_text())
    for name in ("rFID (mini)", "real halves (mini)", "PSNR", "SSIM", "new_figure", "c0ffee42", "N = 103 and 102"):
        assert name in text
    for value in (14.8312, 5.9921, 21.8361, 0.7412, 3.25, 26.123, 24.456, 0.8123):
        assert figure(value) in text
    rows = metric_tables(EVALUATION).scales
    assert rows[0] == ["scale", "PSNR, dB", "SSIM", "new_figure"]
    assert rows[1] == ["1 × 1 tokens, 8 px", "26.1", "–", "–"]
    assert rows[-1] == ["4 × 4 tokens, 32 px", "21.8", "0.741", "3.25"]


def test_missing_parts_leave_no_empty_section(run_folder):
    markup = write_report(run_folder).read_text()
    assert re.findall(r'<section id="(\w+)"', markup) == ["architecture", "cost", "next"]
    assert '<dl class="tiles"' not in markup
    assert "None" not in text_of(markup)


def test_text_of_the_run_stays_text(run_folder, images):
    fill(run_folder, images)
    evil = "<script>alert(1)</script>"
    run = json.loads((run_folder / "run.json").read_text())
    run["data"]["name"] = run["command"] = run["data"]["licence"] = evil
    (run_folder / "run.json").write_text(json.dumps(run))
    evaluation = {**EVALUATION, "warnings": [evil], "metrics": {evil: 1.0}, "protocol": {evil: evil, "dataset": evil}}
    (run_folder / "eval.json").write_text(json.dumps(evaluation))
    markup = write_report(run_folder).read_text()
    assert "<script" not in markup
    assert markup.count("&lt;script&gt;") >= 6


def test_the_same_run_gives_the_same_bytes(run_folder, tiny_model, images, tmp_path):
    fill(run_folder, images)
    pages = [
        write_report(run_folder, model=tiny_model, images=images, output=tmp_path / n) for n in ("a.html", "b.html")
    ]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_failed_report_leaves_the_old_page(run_folder, monkeypatch):
    path = write_report(run_folder)
    before = path.read_bytes()
    monkeypatch.setattr(page, "cost_rows", lambda models: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(run_folder)
    assert path.read_bytes() == before
    assert sorted(p.name for p in run_folder.iterdir()) == ["config.yaml", "report.html", "run.json"]


def test_what_is_no_run_folder_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="run.json"):
        write_report(tmp_path)


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_with_its_command(run_folder, images, monkeypatch, library):
    fill(run_folder, images)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=rf"{library}: pip install 'hieratok\[report\]'"):
        write_report(run_folder)


def test_every_command_is_one_that_the_command_line_takes(run_folder, monkeypatch):
    from hieratok.cli import make_parser

    spaced = run_folder.with_name("my run")
    run_folder.rename(spaced)
    monkeypatch.chdir(spaced.parent.parent)
    shown = re.findall(r"<pre>(.*?)</pre>", write_report(spaced).read_text())
    assert len(shown) == len(page.COMMANDS)
    for command in map(html.unescape, shown):
        name, *arguments = shlex.split(command)
        assert name == "hieratok"
        make_parser().parse_args(arguments)
        assert "FOLDER --output" in command or "runs/my run" in " ".join(arguments)
        assert str(spaced.parent) not in command


@pytest.mark.parametrize(
    ("train", "seconds", "override"),
    [
        ({"max_minutes": 4, "steps": 100000}, 240, "train.max_minutes=30"),
        ({"max_minutes": 60, "epochs": None}, 3600, "train.max_minutes=120"),
        ({"epochs": 10}, 3600, "train.epochs=20"),
        ({"steps": 500, "max_minutes": None}, 60, "train.steps=1000"),
    ],
)
def test_the_command_to_train_on_moves_the_end_that_the_run_came_to(train, seconds, override):
    record = RunRecord(Path(), {}, {"train": train}, [{"kind": "train", "step": 1, "elapsed": seconds}], None, [])
    assert longer(record) == override


def test_the_gallery_shows_each_scale_at_its_own_size_and_leaves_the_model_as_it_was(tiny_model, images):
    tiny_model.train()
    gallery = build_gallery(tiny_model, images)
    assert tiny_model.training
    assert gallery.pixels == (8, 16, 32)
    assert [len(row.scales) for row in gallery.rows] == [3, 3]
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    assert build_gallery(tiny_model, arrays) == gallery


def test_the_gallery_refuses_images_of_another_size(tiny_model):
    with pytest.raises(DataError, match="3 x 32 x 32"):
        build_gallery(tiny_model, torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_pictures_of_another_layout_are_passed_over(run_folder):
    save_picture(Image.new("RGB", (101, 57)), run_folder / "pictures" / "step-00000010.png")
    assert 'id="progress"' not in write_report(run_folder).read_text()


def test_curves_pass_over_what_is_not_finite_and_absent_terms_have_no_plot():
    records = [
        {"samples_seen": i, "loss": float("nan") if i == 3 else 1.0 / i, "kl": float("inf")} for i in range(1, 9)
    ]
    plots = loss_plots(records)
    assert [plot.title for plot in plots] == ["Total loss"]
    assert "nan" not in plots[0].svg.lower()


def test_smoothing_keeps_a_line_and_its_ends():
    line = np.linspace(3, 1, 200)
    np.testing.assert_allclose(smooth(line), line, atol=1e-12)


def test_labels_are_moved_apart_inside_the_plot():
    placed = spread([0.0, 0.01, 0.97, 0.98, 0.99], 0.1)
    assert all(b - a >= 0.1 - 1e-12 for a, b in zip(placed, placed[1:], strict=False))
    assert placed[-1] <= 1


def test_evenly_keeps_the_first_and_the_last():
    items = [Path(str(i)) for i in range(13)]
    assert [int(p.name) for p in evenly(items, 5)] == [0, 3, 6, 9, 12]
    assert evenly(items[:3], 5) == items[:3]


@pytest.mark.parametrize(
    ("value", "text"),
    [(21.8361, "21.8"), (0.2, "0.200"), (123.4, "123"), (1234.5, "1,234"), (3886, "3,886"), ("mode", "mode")],
)
def test_figures_have_three_significant_digits(value, text):
    assert figure(value) == text


def test_a_run_of_stage_2_shows_the_game_and_the_tokenizer_that_it_began_from(run_folder, images):
    fill(run_folder, images)
    game = {"logits_real": 0.5, "logits_fake": -0.5, "accuracy": 0.75, "adversarial_weight": 0.1, "grad_norm": 1.0,
            "discriminator": 0.9, "grad_norm_discriminator": 2.0}  # fmt: skip
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps({**line, **game}) + "\n" for line in lines))
    record = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps({**record, "init_from": {"path": "runs/first", "sha256": "0"}}))
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config |= {"loss": {"adversarial": {"weight": 0.6}, "alignment": {"weight": 0.1}}, "train": {"freeze": None},
               "discriminator": {"kind": "dino"}}  # fmt: skip
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    for path in (run_folder / "pictures").iterdir():
        scales = [images[:, :, : 8 * side, : 8 * side] for side in SIDES]
        save_picture(reconstruction_grid(images, scales, SIDES, images // 2), path)
    markup = write_report(run_folder).read_text()
    text = text_of(markup)
    for said in (
        "It began with the averaged weights of runs/first .",
        "it learned from a dino discriminator (mini) and the features of mini (VF loss).",
        "Logits of the discriminator", "Accuracy of the discriminator", "Weights of stage 2", "Gradient norms",
    ):  # fmt: skip
        assert said in text, said
    assert [head for head in ("original", "before", "step 10") if f"<b>{head}</b>" in markup] == [
        "original", "before", "step 10",
    ]  # fmt: skip
