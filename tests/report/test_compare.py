"""Generators side by side: speed-ups with known answers, and what is refused or warned of."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from hieratok.errors import CheckpointError, ConfigError, DataError, ProtocolError  # noqa: E402
from hieratok.report.compare import Reach, compare, first_reach, names_of, speed_up  # noqa: E402

STEPS = range(100, 1001, 100)


def exponential(rate: float) -> dict[int, float]:
    """gFID that falls from 300."""
    return {step: 300 * math.exp(-rate * step) for step in STEPS}


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_speed_up_of_two_exponentials_is_the_ratio_of_their_rates(make_generator_run, tmp_path):
    fast, slow = make_generator_run("fast", exponential(0.00345)), make_generator_run("slow", exponential(0.0025))
    for runs in ([fast, slow], [slow, fast]):
        (found,) = compare(runs, tmp_path / "compare.html").speed_ups
        assert (found.fast, found.slow) == ("fast", "slow")
        assert found.target == pytest.approx(300 * math.exp(-2.5))
        assert found.ratio == pytest.approx(1.38)
        assert found.reached[0].step == pytest.approx(1000 / 1.38)
        assert "fast is there at step 725, slow at step 1,000: 1.38 times as fast." in found.sentence


def test_a_level_is_first_reached_where_the_curve_crosses_it_in_its_logarithm():
    steps = np.array([100.0, 200.0, 300.0, 400.0])
    values = np.array([80.0, 20.0, 30.0, 10.0])
    assert first_reach(steps, values, 40) == Reach(150)
    assert first_reach(steps, values, 20) == Reach(200)  # though the curve rises again behind it
    assert first_reach(steps, values, 5) is None
    assert first_reach(steps, values, 90) == Reach(100, at_first=True)
    assert first_reach(steps, -values, -40, rising=True) == Reach(pytest.approx(100 + 100 * 40 / 60))  # no logarithm
    assert first_reach(steps, 1 / values, 1 / 40, rising=True) == Reach(pytest.approx(150))
    assert first_reach(np.array([]), np.array([]), 1) is None


def test_what_cannot_be_told_is_said(tmp_path):
    def curve(*values):
        return np.arange(1, len(values) + 1) * 100.0, np.array(values, dtype=float)

    early = speed_up("gfid_mini", "a", "b", {"a": curve(30, 10), "b": curve(40, 35)})
    assert early.ratio == pytest.approx(2) and "at least 2.00 times as fast" in early.sentence
    both = speed_up("gfid_mini", "a", "b", {"a": curve(10), "b": curve(20)})
    assert both.ratio is None and "eval.every" in both.sentence
    never = speed_up("gfid_mini", "a", "b", {"a": curve(30, 10), "b": curve()})
    assert never.ratio is None and "reached by a at step 200, not reached by b" in never.sentence
    neither = speed_up("gfid_mini", "a", "b", {"a": curve(), "b": curve()})
    assert neither.ratio is None and "not reached by either" in neither.sentence


def test_a_score_that_is_better_when_higher_is_compared_where_it_rises(make_generator_run, tmp_path):
    fast, slow = make_generator_run("fast", exponential(0.004)), make_generator_run("slow", exponential(0.002))
    found = compare([slow, fast], tmp_path / "compare.html", metric="inception_score_mini")
    assert found.speed_ups[0].fast == "fast"
    assert found.speed_ups[0].ratio == pytest.approx(2)
    assert "Higher is better" in found.page.read_text()


def test_figures_and_protocols_stand_side_by_side(make_generator_run, tmp_path):
    a = make_generator_run("a", exponential(0.003), pictures=[500, 1000])
    b = make_generator_run("b", exponential(0.002), pictures=[500, 1000], tokenizer="single")
    found = compare([a, b], tmp_path / "out" / "two.html")
    rows = {row[0]: row[1:] for row in found.metrics}
    assert rows[""] == ["a", "b"]
    assert rows["gFID (mini)"] == ["14.9", "40.6"]
    assert rows["parameters"] == ["5.12M", "5.12M"]
    assert rows["time"] == ["8.3 minutes", "8.3 minutes"]
    text = re.sub(r"<[^>]+>", " ", found.page.read_text())
    assert "Drawn by ddpm in 250 steps without guidance; labels: balanced; seed 0." in text
    assert "CC BY-SA 4.0" in text
    assert found.page.read_text().count("<img") == 2 * 3 * 2  # classes and columns of both
    table = found.table()
    for said in ("gFID (mini)", "40.6", found.speed_ups[0].sentence):
        assert said in table


def test_the_page_is_one_file_and_its_plot_stands_beside_it(make_generator_run, tmp_path):
    runs = [make_generator_run(name, exponential(rate)) for name, rate in (("a", 0.003), ("b", 0.002))]
    found = compare(runs, tmp_path / "page.html")
    with Image.open(found.plot) as plot:
        plot.verify()
    assert found.plot == tmp_path / "page.png"
    assert (tmp_path / "page.svg").read_text().lstrip().startswith("<?xml")
    markup = found.page.read_text()
    assert not re.search(r"<(script|link|iframe)\b|@import|<\?xml|https?://(?!www\.w3\.org)", markup)
    assert "1.50×" in markup
    before = markup, found.plot.read_bytes()
    again = compare(runs, tmp_path / "page.html")
    assert (again.page.read_text(), again.plot.read_bytes()) == before


def test_runs_that_differ_in_their_tokenizer_alone_are_not_warned_of(make_generator_run, tmp_path):
    a = make_generator_run("a", exponential(0.003), config={"latents": "latents/a"})
    b = make_generator_run("b", exponential(0.002), tokenizer="single", config={"latents": "latents/b"})
    found = compare([a, b], tmp_path / "compare.html")
    assert found.differences == [["field", "a", "b"]]
    assert found.warnings == ["few samples"]
    assert "the runs agree in every field" in found.page.read_text()


def test_every_other_difference_is_listed(make_generator_run, tmp_path):
    a = make_generator_run("a", exponential(0.003))
    b = make_generator_run(
        "b", {**exponential(0.002), 1100: 30.0}, tokenizer="single", config={"seed": 7, "eval": {"num_images": 50}},
        sampling={"guidance_scale": 4.0},
    )  # fmt: skip
    found = compare([a, b], tmp_path / "compare.html")
    rows = {row[0]: row[1:] for row in found.differences}
    assert rows.pop("seed") == ["0", "7"]
    assert rows.pop("eval.num_images") == ["–", "50"]
    assert rows.pop("protocol.sampling.guidance_scale") == ["1.0", "4.0"]
    assert set(rows) == {"field", "train.steps", "trained.steps", "trained.latents"}
    assert found.warnings[0].startswith("Besides the tokenizer these runs differ in seed, train.steps, ")
    assert "with guidance 4" in found.page.read_text()


def test_runs_of_one_tokenizer_are_called_so(make_generator_run, tmp_path):
    a = make_generator_run("a", exponential(0.003))
    b = make_generator_run("b", exponential(0.002), config={"seed": 7})
    found = compare([a, b], tmp_path / "compare.html")
    assert found.warnings[0] == "These runs have the same tokenizer; they differ in seed."


def test_a_run_that_is_not_finished_is_compared_by_its_last_evaluation(make_generator_run, tmp_path):
    a = make_generator_run("a", exponential(0.003))
    b = make_generator_run("b", {100: 90.0, 200: 50.0}, finished=False)
    found = compare([a, b], tmp_path / "compare.html")
    assert {row[0]: row[2] for row in found.metrics}["gFID (mini)"] == "50.0"
    assert any("b is not finished" in warning for warning in found.warnings)


def test_a_run_that_was_evaluated_at_its_end_only_is_a_point(make_generator_run, tmp_path):
    a, b = make_generator_run("a", exponential(0.003)), make_generator_run("b", {1000: 40.0})
    found = compare([a, b], tmp_path / "compare.html")
    assert found.curves["b"][0].tolist() == [1000]
    assert any("b was evaluated once" in warning for warning in found.warnings)


def test_three_runs_are_compared_with_the_first(make_generator_run, tmp_path):
    runs = [make_generator_run(n, exponential(r)) for n, r in (("a", 0.002), ("b", 0.003), ("c", 0.004))]
    found = compare(runs, tmp_path / "compare.html")
    assert [speed_up.ratio for speed_up in found.speed_ups] == [pytest.approx(1.5), pytest.approx(2)]


def test_figures_of_different_networks_are_not_compared(make_generator_run, tmp_path):
    runs = [make_generator_run("a"), make_generator_run("b", key="gfid")]
    with pytest.raises(ProtocolError, match=r"a: gfid_mini.*\n  b: gfid,.*\n.*same\nfeatures|same features"):
        compare(runs, tmp_path / "compare.html")
    with pytest.raises(ProtocolError, match="not measured alike"):
        compare(runs, tmp_path / "compare.html", metric="gfid")
    assert not (tmp_path / "compare.html").exists()


def test_what_cannot_be_compared_is_refused_by_name(make_generator_run, tmp_path):
    a, b = make_generator_run("a"), make_generator_run("b")
    with pytest.raises(ConfigError, match="two different runs"):
        compare([a])
    with pytest.raises(ConfigError, match="two different runs"):
        compare([a, a / ".." / "a"])
    with pytest.raises(ConfigError, match=r"did you mean.*gfid_mini|gfid_mini"):
        compare([a, b], tmp_path / "compare.html", metric="gfid_mimi")
    edit(b / "run.json", kind="tokenizer")
    with pytest.raises(CheckpointError, match="the run of a tokenizer; give that of a generator"):
        compare([a, b])
    fresh = make_generator_run("fresh", finished=False)
    (fresh / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match="fresh has not been evaluated; set eval.every"):
        compare([a, fresh])


def test_runs_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    assert names_of([tmp_path / "a" / "generator", tmp_path / "b" / "generator"]) == ["a/generator", "b/generator"]
    assert names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_runs_whose_figures_are_not_finite_still_have_a_page(make_generator_run, tmp_path):
    nothing = {100: math.nan, 200: math.nan}
    runs = [make_generator_run("a", nothing), make_generator_run("b", nothing)]
    found = compare(runs, tmp_path / "compare.html")
    assert "not reached by either" in found.page.read_text()


def test_models_are_compared_by_their_fields_and_not_by_the_names_of_presets(make_generator_run, tmp_path):
    a = make_generator_run("a", exponential(0.003))
    b = make_generator_run("b", exponential(0.002), config={"model": {"hidden_size": 256}})
    assert compare([a, b], tmp_path / "compare.html").differences == [["field", "a", "b"]]
    run = json.loads((b / "run.json").read_text())
    edit(b / "run.json", dit={**run["dit"], "num_layers": 12})
    assert compare([a, b], tmp_path / "compare.html").differences[1:] == [["model.num_layers", "6", "12"]]


def test_names_of_runs_stay_text(make_generator_run, tmp_path):
    runs = [make_generator_run("<b>$x$&", exponential(0.003)), make_generator_run("b", exponential(0.002))]
    markup = compare(runs, tmp_path / "compare.html").page.read_text()
    assert "<b>$" not in markup and "&lt;b&gt;$x$&amp;" in markup
