"""The evaluation of generated images: its keys, its protocol, and that only the images change a figure."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hieratok.data.arrays import ArraySource, write_npz
from hieratok.data.frame import Frame
from hieratok.data.opening import open_source
from hieratok.data.source import Subset
from hieratok.errors import ConfigError, DataError, ProtocolError
from hieratok.evaluation.features import load_features
from hieratok.evaluation.frechet import GaussianSums, frechet_distance
from hieratok.evaluation.generation import evaluate_generation
from hieratok.evaluation.inception_score import inception_score
from hieratok.evaluation.precision_recall import precision_recall
from hieratok.evaluation.reference import reference_statistics
from hieratok.evaluation.tables import label


def noise(n, seed, side=16):
    """Images of 4 x 4 flat squares."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(side // 4, axis=1).repeat(side // 4, axis=2)


SAMPLES, REAL = ArraySource(noise(37, 0), name="fakes"), ArraySource(noise(50, 1), name="reals")


def evaluate(samples=SAMPLES, reference=REAL, image_size=16, **settings):
    return evaluate_generation(samples, reference, image_size=image_size, progress=False, **settings)


def everything(source):
    return load_features("mini").everything(torch.from_numpy(source.images).permute(0, 3, 1, 2).contiguous())


def sums_of(features):
    sums = GaussianSums(features.shape[1])
    sums.update(features)
    return sums


def test_every_figure_is_that_of_its_features_and_carries_the_name_of_the_network():
    result = evaluate(batch_size=8, seed=3)
    fake, real = everything(SAMPLES), everything(REAL)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(3))
    precision, recall = precision_recall(real.pooled, fake.pooled)
    expected = {
        "gfid_mini": frechet_distance(sums_of(fake.pooled), sums_of(real.pooled)),
        "sfid_mini": frechet_distance(sums_of(fake.spatial), sums_of(real.spatial)),
        "inception_score_mini": inception_score(fake.logits[order]).mean,
        "precision_mini": precision,
        "recall_mini": recall,
        "real_halves_mini": frechet_distance(sums_of(real.pooled[0::2]), sums_of(real.pooled[1::2])),
    }
    assert list(result.metrics) == list(expected)
    assert result.metrics == pytest.approx(expected, rel=1e-3)
    assert 0 < precision < 1 and result.metrics["gfid_mini"] > 0
    assert result.counts == {
        "gfid_mini": (37, 50), "sfid_mini": (37, 50), "inception_score_mini": (37,), "precision_mini": (37, 50),
        "recall_mini": (37, 50), "real_halves_mini": (25, 25),
    }  # fmt: skip
    assert [label(key) for key in result.metrics] == [
        "gFID (mini)", "sFID (mini)", "IS (mini)", "precision (mini)", "recall (mini)", "real halves (mini)",
    ]  # fmt: skip
    assert label("inception_score_std_mini") == "IS deviation (mini)" and label("gfid") == "gFID"


def test_real_images_against_themselves_are_perfect():
    metrics = evaluate(REAL, REAL).metrics
    assert metrics["gfid_mini"] == pytest.approx(0, abs=1e-6) == metrics["sfid_mini"]
    assert metrics["precision_mini"] == metrics["recall_mini"] == 1


def test_figures_tell_a_set_like_the_reference_from_one_that_is_not():
    grey = ArraySource((noise(37, 2) // 8 + 100).astype(np.uint8))
    good, bad = evaluate().metrics, evaluate(grey).metrics
    assert bad["gfid_mini"] > 2 * good["gfid_mini"] and bad["sfid_mini"] > good["sfid_mini"]
    assert bad["precision_mini"] < good["precision_mini"]
    assert bad["inception_score_mini"] < good["inception_score_mini"]


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 50}, {"num_workers": 1}])
def test_figures_do_not_depend_on_batches_and_workers(settings):
    assert evaluate(**settings).metrics == pytest.approx(evaluate(batch_size=8).metrics, rel=1e-4)


def test_the_order_of_samples_is_shuffled_by_the_seed_before_the_score_is_split():
    images = np.concatenate([noise(10, 0), noise(10, 5) // 2, noise(10, 6) // 4]).astype(np.uint8)
    results = [evaluate(ArraySource(images), split_size=10, seed=seed).metrics for seed in (0, 0, 1)]
    assert results[0] == results[1] and results[0]["inception_score_mini"] != results[2]["inception_score_mini"]
    in_order = inception_score(everything(ArraySource(images)).logits, 10).mean
    assert results[0]["inception_score_mini"] > in_order
    assert results[0]["inception_score_std_mini"] > 0
    assert {**results[0], "inception_score_mini": 0, "inception_score_std_mini": 0} == {
        **results[2], "inception_score_mini": 0, "inception_score_std_mini": 0
    }  # fmt: skip


def test_precomputed_statistics_give_the_figures_of_their_images_and_each_set_is_seen_once():
    mini = load_features("mini")
    reference = reference_statistics(REAL, mini, 16, progress=False)
    assert evaluate(reference=reference).to_dict() == evaluate().to_dict()
    seen = []

    def tones(images):
        seen.append(len(images))
        return images.double().mean(dim=(2, 3))

    tones.dim = 3
    statistics = reference_statistics(REAL, load_features(tones), 16, progress=False)
    seen.clear()
    evaluate(reference=statistics, features=tones)
    assert sorted(seen) == [1, 37]  # a black image tells the length of the features


def test_a_callable_has_no_figures_that_need_classes_or_places():
    def tones(images):
        return images.double().mean(dim=(2, 3))

    assert list(evaluate(features=tones).metrics) == [
        "gfid_tones", "precision_tones", "recall_tones", "real_halves_tones",
    ]  # fmt: skip


def test_a_file_of_statistics_of_unknown_images_has_their_name_and_hash_and_no_halves(tmp_path):
    mini = load_features("mini")
    reference = replace(
        reference_statistics(REAL, mini, 16, progress=False),
        neighbours=None, count=None, real_halves=None, source="adm.npz", source_digest="f" * 64,
    )  # fmt: skip
    result = evaluate(reference=reference)
    assert list(result.metrics) == ["gfid_mini", "sfid_mini", "inception_score_mini"]
    assert result.counts["gfid_mini"] == (37,)
    assert any("adm.npz holds no single images, which precision and recall need" in w for w in result.warnings)
    assert "reference: statistics of adm.npz (ffffffff)" in result.table()
    write_npz(tmp_path / "reals.npz", REAL.images)
    assert evaluate(reference=tmp_path / "reals.npz").metrics == evaluate().metrics


def test_the_protocol_names_everything_that_the_figures_depend_on():
    sampling = {"scheduler": "ddpm", "steps": 250, "guidance_scale": 1.5, "labels": "balanced"}
    result = evaluate(max_pr_images=20, seed=4, split_size=30, neighbours=2, sampling=sampling)
    protocol = result.protocol
    assert (protocol.samples, protocol.samples_digest, protocol.num_samples) == ("fakes", SAMPLES.digest, 37)
    assert (protocol.reference, protocol.reference_digest) == ("reals", REAL.digest)
    assert (protocol.reference_images, protocol.neighbour_images, protocol.neighbours) == (50, 20, 2)
    assert (protocol.seed, protocol.split_size, protocol.image_size) == (4, 30, 16)
    assert protocol.features_sha256 == load_features("mini").sha256
    assert protocol.sampling == sampling
    text = protocol.describe()
    parts = ["37 samples of fakes", "50 images of reals", "16 px", "splits of 30", "seed 4", "centre crop", "mini"]
    for part in (*parts, "2 neighbours among 20", "scheduler ddpm, steps 250, guidance_scale 1.5, labels balanced"):
        assert part in text
    assert "sampling: not stated" in evaluate().table()
    squash = evaluate(frame=Frame(16, crop="squash")).protocol
    assert squash.resize.startswith("both sides") and squash.reference_resize.startswith("both sides")


def test_the_sampler_speaks_for_itself_where_the_samples_know_it():
    class Samples(ArraySource):
        protocol = {"scheduler": "ddim"}

    assert evaluate(Samples(SAMPLES.images)).protocol.sampling == {"scheduler": "ddim"}
    assert evaluate(Samples(SAMPLES.images), sampling={"steps": 9}).protocol.sampling == {"steps": 9}


def test_few_images_are_warned_of_in_the_result_and_in_print():
    result = evaluate()
    expected = [
        "Frechet distances of 37 images are biased",
        "do not fill the 192 dimensions of mini:",
        "a single split of 37 samples, lower than one of 5,000",
        "37 samples and 50 reference images are few",
    ]
    assert len(result.warnings) == len(expected)
    for warning, part in zip(result.warnings, expected, strict=True):
        assert part in warning and f"warning: {warning}" in result.table()
    split = evaluate(split_size=10).warnings
    assert "7 samples fill no split and are left out of the Inception Score" in split
    assert not any("single split" in warning for warning in split)
    assert "37 images do not fill the 112 dimensions of mini's spatial features" in str(
        evaluate(ArraySource(noise(37, 0, 32)), ArraySource(noise(50, 1, 32)), 32).warnings
    )


def test_samples_of_another_size_are_said_to_be_resized():
    assert "the samples are of 16 px and were resized to 32" in evaluate(image_size=32).warnings
    assert not any("resized" in warning for warning in evaluate().warnings)


def test_the_table_shows_each_n_and_a_saved_result_is_json(tmp_path):
    result = evaluate()
    lines = [line.split() for line in result.table().splitlines()]
    assert lines[0][:2] == ["gFID", "(mini)"] and lines[0][3:] == ["N", "=", "37", "and", "50"]
    assert lines[2][:2] == ["IS", "(mini)"] and lines[2][3:] == ["N", "=", "37"]
    result.save(tmp_path / "new" / "eval.json")
    saved = json.loads((tmp_path / "new" / "eval.json").read_text())
    assert saved == result.to_dict() and saved["metrics"] == result.metrics
    assert saved["protocol"]["samples"] == "fakes"


def test_sets_too_small_for_a_figure_do_without_it():
    one = evaluate(ArraySource(SAMPLES.images[:1]))
    assert list(one.metrics) == ["inception_score_mini", "real_halves_mini"]
    assert one.metrics["inception_score_mini"] == pytest.approx(1)
    assert "1 samples are too few for Frechet distances" in one.table()
    three = evaluate(ArraySource(SAMPLES.images[:3]))
    assert "gfid_mini" in three.metrics and "recall_mini" not in three.metrics
    assert "3 samples and 50 reference images are too few for precision and recall" in three.table()


def test_conditions_under_which_a_figure_means_nothing_are_refused():
    with pytest.raises(ProtocolError, match="8 px are too small for features=mini"):
        evaluate(image_size=8)
    with pytest.raises(ProtocolError, match="of images of 16 px, and the samples have 32"):
        evaluate(reference=reference_statistics(REAL, load_features("mini"), 16, progress=False), image_size=32)
    for name in ("split_size", "neighbours", "max_pr_images", "batch_size"):
        with pytest.raises(ConfigError, match=f"{name} is 0; it must be above 0"):
            evaluate(**{name: 0})
    with pytest.raises(ConfigError, match="frame.image_size is 32, and image_size 16"):
        evaluate(frame=Frame(32))
    with pytest.raises(ConfigError, match="frame.image_size is 32, and image_size 16"):
        evaluate(reference=reference_statistics(REAL, load_features("mini"), 16, progress=False), frame=Frame(32))


def test_bad_images_are_left_out_and_too_many_stop_the_evaluation(image_folder):
    source = open_source(image_folder)
    for index in (0, 5):
        (image_folder / source.key(index)).write_bytes(b"not an image")
    with pytest.raises(DataError, match="2 of 24 images are bad"):
        evaluate(source, max_bad_fraction=0.05)
    result = evaluate(source, source, max_bad_fraction=0.1)
    assert result.protocol.num_samples == 22 and result.counts["real_halves_mini"] == (11, 11)
    with pytest.raises(DataError, match="no image that could be evaluated"):
        evaluate(Subset(source, [0, 5], "bad"), max_bad_fraction=1.0)


SCRIPT = """
import json, sys, torch
from accelerate import Accelerator
from hieratok.data.opening import open_source
from hieratok.data.source import Subset
from hieratok.evaluation import evaluate_generation

samples, reference, output = sys.argv[1:]
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
settings = {"image_size": 16, "progress": False, "accelerator": accelerator, "batch_size": 5}
result = evaluate_generation(open_source(samples), open_source(reference), split_size=9, max_pr_images=21, **settings)

def breaks_on_the_second(images):
    if accelerator.process_index == 1 and len(images) > 1:
        raise RuntimeError("out of memory")
    return images.double().mean(dim=(2, 3))

try:
    evaluate_generation(open_source(samples), open_source(reference), features=breaks_on_the_second, **settings)
except Exception as error:
    raised = f"{type(error).__name__}: {error}"
# The second process gets none of one image.
single = evaluate_generation(Subset(open_source(samples), [4], "one"), open_source(reference), **settings)
with open(f"{output}/rank{accelerator.process_index}.json", "w") as file:
    json.dump({"result": result.to_dict(), "raised": raised, "single": single.to_dict()}, file)
torch.distributed.destroy_process_group()
"""


def test_two_processes_come_to_the_figures_of_one_and_fail_together(tmp_path, run_two_processes):
    for name, source in (("samples", SAMPLES), ("reference", REAL)):
        write_npz(tmp_path / f"{name}.npz", source.images)
    paths = [tmp_path / "samples.npz", tmp_path / "reference.npz"]
    first, second = run_two_processes(SCRIPT, *paths)
    assert first["result"] == second["result"] and first["single"] == second["single"]
    assert first["raised"].startswith("HieratokError: the evaluation failed in another process")
    assert second["raised"] == "RuntimeError: out of memory"
    samples, reference = (open_source(path) for path in paths)
    alone = evaluate(samples, reference, split_size=9, max_pr_images=21).to_dict()
    assert first["result"]["counts"] == alone["counts"] and alone["counts"]["gfid_mini"] == [37, 50]
    assert first["result"]["protocol"] == alone["protocol"]
    assert first["result"]["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
    assert first["single"]["protocol"]["num_samples"] == 1
