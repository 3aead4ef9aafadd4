"""The pages that show what a generator makes: its own, and its tokenizer's."""

from __future__ import annotations

import html
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
import yaml

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from hieratok.engine.settings import SamplingConfig  # noqa: E402
from hieratok.errors import CheckpointError, DataError  # noqa: E402
from hieratok.generation.loading import make_pipeline  # noqa: E402
from hieratok.models.autoencoder import Autoencoder  # noqa: E402
from hieratok.models.dit import DiT  # noqa: E402
from hieratok.report.generator_page import COMMANDS, describe, write_generator_report  # noqa: E402
from hieratok.report.metrics import protocol_sentences, set_rows, tiles  # noqa: E402
from hieratok.report.page import write_report  # noqa: E402
from hieratok.report.record import read_run  # noqa: E402
from hieratok.report.run_report import report  # noqa: E402
from hieratok.report.samples import Samples, build_samples, draw_samples, spread_classes  # noqa: E402

SIDES = (1, 2, 4)
QUICK = SamplingConfig(num_inference_steps=2, guidance_scale=2.0, precision="fp32")


class Balance(HTMLParser):
    """Raises where a tag is closed that is not the last one open."""

    VOID = {"meta", "img", "br", "link", "hr", "input"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


def check_markup(markup: str) -> None:
    """One well-formed file that loads nothing."""
    balance = Balance()
    balance.feed(markup)
    assert balance.open == []
    targets = re.findall(r"(?:src|href|srcset|poster|data)\s*=\s*[\"']([^\"']*)", markup)
    assert all(target.startswith(("data:image/png;base64,", "#")) for target in targets)
    assert not re.search(r"<(script|link|iframe)\b|@import|<\?xml|<!DOCTYPE svg|url\((?!#)", markup)
    assert markup.count("<style") == 1


def text_of(markup: str) -> str:
    body = re.sub(r"<style.*?</style>", "", markup, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


@pytest.fixture
def samples(images) -> Samples:
    scales = [images[:, :, : 8 * side, : 8 * side] for side in SIDES]
    return build_samples(scales, SIDES, ["animals", "flags"], "Drawn in 50 steps.")


@pytest.fixture
def generator(tiny_model) -> DiT:
    torch.manual_seed(0)
    channels = tiny_model.config.latent_channels
    statistics = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    return DiT(sample_size=4, in_channels=channels, out_channels=channels, hidden_size=32, num_layers=1, num_heads=2,
               num_classes=3, **statistics)  # fmt: skip


@pytest.fixture
def save_pipeline(tiny_model, generator):
    def save(folder):
        names = ["animals", "flags", "food"]
        make_pipeline(generator, Autoencoder(tiny_model), "flow", names).save_pretrained(folder / "pipeline")

    return save


def test_a_full_run_fills_every_section(make_generator_run, samples):
    folder = make_generator_run(pictures=[100, 200, 300])
    markup = write_generator_report(folder, samples=samples).read_text()
    check_markup(markup)
    assert re.findall(r'<section id="(\w+)"', markup) == ["samples", "progress", "curves", "metrics", "next"]
    text = text_of(markup)
    for said in (
        "dit-tiny is a diffusion transformer of 5.12 million parameters (6 layers of width 256), trained on 2,400 "
        "latents in 2.5 minutes on one CPU with 2 threads, to predict the noise of a diffusion (DDPM).",
        "From noise and one of 3 classes it makes a latent, which the tokenizer’s decoder paints at 3 scales",
        "real halves (mini) 5.90 · N = 2,000 and 3,886",
        "2,000 samples at 32 px, against 3,886 images of openmoji (centre crop).",
        "Drawn by ddpm in 250 steps without guidance; labels: balanced; seed 0.",
        "CC BY-SA 4.0; this holds for all that is made from them, generated pictures included",
        "runs/multi (multi000)",
        "few samples",
    ):
        assert said in text
    assert re.findall(r"<b>(step \d+)</b>", markup) == ["step 100", "step 200", "step 300"]
    titles = re.findall(r"<figcaption><h3>(.*?)</h3>", markup)
    assert titles == ["Loss", "Terms of the loss", "gFID (mini)", "IS (mini)", "precision (mini) and recall (mini)"]


def test_a_sample_is_shown_at_every_scale_with_the_name_of_its_class(make_generator_run, samples):
    markup = write_generator_report(make_generator_run(), samples=samples).read_text()
    for name, sample in zip(("animals", "flags"), samples.rows, strict=True):
        places = [markup.index(f'src="{uri}" alt="Sample of {name} from {side} × {side} tokens"')
                  for uri, side in zip(sample.scales, SIDES, strict=True)]  # fmt: skip
        assert places == sorted(places)


def test_samples_of_one_scale_stand_closer_and_speak_of_no_scales(make_generator_run, images):
    samples = build_samples([images], [4], ["animals", "flags"])
    markup = write_generator_report(make_generator_run(), samples=samples).read_text()
    check_markup(markup)
    section = markup[markup.index('<section id="samples"') : markup.index('<section id="curves"')]
    assert "--across: 6" in section and "scale" not in text_of(section)


def test_missing_parts_leave_no_empty_section(make_generator_run):
    folder = make_generator_run(finished=False)
    (folder / "metrics.jsonl").unlink()
    markup = write_generator_report(folder).read_text()
    check_markup(markup)
    assert re.findall(r'<section id="(\w+)"', markup) == ["next"]
    assert '<dl class="tiles"' not in markup and "None" not in text_of(markup)


def test_text_of_the_run_stays_text(make_generator_run, samples, images):
    evil = "<script>alert(1)</script>"
    folder = make_generator_run(key=f"gfid_{evil}")
    run = json.loads((folder / "run.json").read_text())
    run |= {"data": {"name": evil, "licence": evil}, "tokenizer": {"path": evil}}
    (folder / "run.json").write_text(json.dumps(run))
    named = build_samples([images], [4], [evil, evil], evil)
    markup = write_generator_report(folder, samples=named).read_text()
    check_markup(markup)
    assert markup.count("&lt;script&gt;") > 10


def test_the_same_run_gives_the_same_bytes(make_generator_run, samples, tmp_path):
    folder = make_generator_run(pictures=[100, 200])
    a, b = (write_generator_report(folder, samples=samples, output=tmp_path / n) for n in ("a.html", "b.html"))
    assert a.read_bytes() == b.read_bytes()


def test_the_tokenizers_page_gains_a_section_about_the_generator(make_generator_run, samples, tmp_path, tiny_fields):
    record = read_run(make_generator_run(pictures=[100, 300]), "generator")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"config": {"model": tiny_fields}, "data": {"name": "openmoji"}}))
    without = write_report(folder).read_text()
    markup = write_report(folder, generation=describe(record, samples)).read_text()
    check_markup(markup)
    assert 'id="generation"' not in without
    section = markup[markup.index('<section id="generation"') : markup.index('<section id="architecture"')]
    text = text_of(section)
    for said in ("What a generator makes of its latents", "dit-tiny is a diffusion transformer of 5.12 million",
                 "gFID (mini)", "recall (mini)", "step 100", "step 300", "few samples"):  # fmt: skip
        assert said in text
    assert section.count('alt="Sample of') == 2 * len(SIDES)
    rest = markup.replace(section, "")
    assert re.sub(r"\s+", "", rest) == re.sub(r"\s+", "", without)


def test_a_page_is_of_the_kind_of_its_run(make_generator_run, tmp_path, tiny_fields):
    generator = make_generator_run()
    with pytest.raises(CheckpointError, match="the run of a generator; give that of a tokenizer"):
        write_report(generator)
    (generator / "run.json").write_text(json.dumps({"config": {"model": tiny_fields}}))
    with pytest.raises(CheckpointError, match="the run of a tokenizer; give that of a generator"):
        write_generator_report(generator)


def test_the_folder_of_a_generator_is_enough_for_its_page(make_generator_run, save_pipeline):
    folder = make_generator_run()
    assert 'id="samples"' not in report(folder).read_text()  # it has saved no model yet
    save_pipeline(folder)
    markup = report(folder).read_text()
    check_markup(markup)
    assert markup.count('alt="Sample of') == 8 * len(SIDES)
    assert "Drawn by euler in 2 steps, with guidance 4.2." in text_of(markup)


def test_the_folder_of_a_tokenizer_brings_the_generator_inside_it(
    make_generator_run, save_pipeline, tiny_model, tiny_fields, image_folder, tmp_path
):
    folder = make_generator_run("tok/generator").parent
    save_pipeline(folder / "generator")
    config = {"model": tiny_fields, "data": {"source": str(image_folder)}}
    (folder / "run.json").write_text(json.dumps({"config": config, "data": {"name": "images"}}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    tiny_model.save_pretrained(folder / "model")
    markup = report(folder, tmp_path / "page.html").read_text()
    check_markup(markup)
    assert re.findall(r'<section id="(\w+)"', markup)[:2] == ["reconstructions", "generation"]


def test_a_damaged_pipeline_is_an_error_and_not_a_page_without_samples(make_generator_run, save_pipeline):
    folder = make_generator_run()
    save_pipeline(folder)
    (folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        report(folder)


def test_samples_are_the_same_each_time_and_of_classes_spread_over_all(make_generator_run, save_pipeline):
    folder = make_generator_run()
    save_pipeline(folder)
    first = draw_samples(folder, QUICK)
    assert draw_samples(folder, QUICK) == first
    assert [row.name for row in first.rows] == ["animals"] * 3 + ["flags"] * 3 + ["food"] * 2
    assert (first.sides, first.pixels) == (SIDES, (8, 16, 32))
    assert first.how == "Drawn by euler in 2 steps, with guidance 2."
    unguided = draw_samples(folder, replace(QUICK, guidance_scale=1.0))
    assert unguided.how == "Drawn by euler in 2 steps, without guidance."


def test_classes_are_shown_equally_often_or_evenly_chosen():
    assert spread_classes(1000, 4) == [0, 333, 666, 999]
    assert spread_classes(2, 5) == [0, 0, 0, 1, 1]
    assert spread_classes(1, 3) == [0, 0, 0]


def test_samples_that_do_not_fit_together_are_refused(images):
    with pytest.raises(DataError, match="2 sides and 2 names"):
        build_samples([images], [2, 4], ["a", "b"])
    with pytest.raises(DataError, match="1 sides and 1 names"):
        build_samples([images], [4], ["a"])


def test_figures_of_generation_stand_in_tiles_and_rows_with_their_direction():
    evaluation = {
        "metrics": {"gfid": 13.3, "inception_score_std": 0.4, "inception_score": 68.5, "real_halves": 2.5},
        "counts": {"gfid": [50000, 50000]},
    }
    shown = tiles(evaluation)
    assert [(t.label, t.value, t.direction) for t in shown] == [
        ("gFID", "13.3", "lower is better"), ("IS", "68.5", "higher is better")
    ]  # fmt: skip
    assert shown[0].note == "real halves 2.50 · N\xa0=\xa050,000"
    assert set_rows(evaluation)[1:3] == [["IS deviation", "0.400", "", ""], ["IS", "68.5", "higher is better", ""]]


def test_the_protocol_says_how_samples_were_guided():
    sampling = {"scheduler": "flow", "num_inference_steps": 50, "guidance_scale": 4.2, "guidance_interval": [0.1, 0.8],
                "labels": "random", "seed": 3}  # fmt: skip
    protocol = {"num_samples": 100, "image_size": 64, "reference": "adm.npz", "reference_images": None,
                "reference_resize": "none", "sampling": sampling}  # fmt: skip
    assert protocol_sentences(protocol)[:2] == [
        "100 samples at 64 px, against statistics of adm.npz (none).",
        "Drawn by flow in 50 steps with guidance 4.2 between the times 0.1 and 0.8 (1 is noise); labels: random; "
        "seed 3.",
    ]
    assert not any("originals" in sentence for sentence in protocol_sentences(protocol))


def test_every_command_is_one_that_the_command_line_takes(make_generator_run, monkeypatch):
    from hieratok.cli import make_parser

    folder = make_generator_run("my generator")
    monkeypatch.chdir(folder.parent.parent)
    shown = re.findall(r"<pre>(.*?)</pre>", write_generator_report(folder).read_text())
    assert len(shown) == len(COMMANDS)
    for command in map(html.unescape, shown):
        name, *arguments = shlex.split(command)
        assert name == "hieratok"
        make_parser().parse_args(arguments)
        assert any(word.endswith("runs/my generator") for word in arguments)
        assert str(folder.parent) not in command
