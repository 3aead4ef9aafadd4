"""Reference statistics: of images, of ADM's files and of our own, and those that do not fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hieratok.data.arrays import ArraySource, write_npz
from hieratok.data.frame import Frame
from hieratok.errors import ConfigError, DataError, ProtocolError
from hieratok.evaluation.features import Features, load_features
from hieratok.evaluation.frechet import GaussianSums, frechet_distance
from hieratok.evaluation.reference import reference_statistics, write_reference_npz


def noise(n, side=16, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(side // 4, axis=1).repeat(side // 4, axis=2)


IMAGES = noise(30)


@pytest.fixture(scope="module")
def mini():
    return load_features("mini")


class Standin:
    """A small network under Inception's name, whose own needs a download."""

    name, sha256, dim, min_side = "inception", "12345678", 3, 1

    def __call__(self, images):
        return images.float().mean(dim=(2, 3))

    def everything(self, images):
        return Features(self(images), None, images[:, 0, ::8, ::8].flatten(1).float())


def statistics(source, network, **settings):
    return reference_statistics(source, network, 16, progress=False, **settings)


def features_of(network, images):
    return network.everything(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())


def adm_file(path, network, images, **arrays):
    """What ADM publishes: `arr_0`, and the moments by numpy."""
    seen = features_of(network, images)
    pooled, spatial = seen.pooled.double().numpy(), seen.spatial.double().numpy()
    moments = {"mu": pooled.mean(0), "sigma": np.cov(pooled, rowvar=False),
               "mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)}  # fmt: skip
    np.savez(path, **{**moments, **arrays})
    return path


def test_the_statistics_of_images_are_numpys_moments_of_their_features(mini):
    found = statistics(ArraySource(IMAGES), mini, batch_size=7)
    seen = features_of(mini, IMAGES)
    for gaussian, features in ((found.pooled, seen.pooled), (found.spatial, seen.spatial)):
        features = features.double().numpy()
        np.testing.assert_allclose(gaussian.mean, features.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gaussian.covariance, np.cov(features, rowvar=False), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.neighbours, seen.pooled, rtol=1e-4, atol=1e-4)
    halves = GaussianSums(192), GaussianSums(192)
    for parity, half in enumerate(halves):
        half.update(seen.pooled[parity::2])
    assert found.real_halves == pytest.approx(frechet_distance(*halves), rel=1e-4)
    assert (found.count, found.even_count, found.image_size) == (30, 15, 16)
    assert (found.features, found.features_sha256) == ("mini", mini.sha256)
    assert (found.source, found.source_digest) == ("an array", ArraySource(IMAGES).digest)
    assert "centre crop" in found.resize


def test_single_features_are_kept_of_images_spread_over_the_set(mini):
    found = statistics(ArraySource(IMAGES), mini, max_pr_images=4, batch_size=7)
    expected = features_of(mini, IMAGES[[0, 10, 19, 29]]).pooled
    torch.testing.assert_close(found.neighbours, expected, rtol=1e-4, atol=1e-4)
    assert found.count == 30


def test_written_statistics_are_read_back_as_they_were_and_adms_arrays_are_in_the_file(mini, tmp_path):
    made = statistics(ArraySource(IMAGES, name="thirty"), mini)
    path = tmp_path / "new" / "reference.npz"
    write_reference_npz(path, made)
    read = statistics(str(path), mini)
    for gaussian, other in ((read.pooled, made.pooled), (read.spatial, made.spatial)):
        assert torch.equal(gaussian.mean, other.mean) and torch.equal(gaussian.covariance, other.covariance)
    assert torch.equal(read.neighbours, made.neighbours)
    emptied = {"pooled": None, "spatial": None, "neighbours": None}
    assert replace(read, **emptied) == replace(made, **emptied)
    with np.load(path, allow_pickle=False) as file:
        assert file["mu"].shape == (192,) and file["sigma"].shape == (192, 192)
        assert file["mu_s"].shape == (28,) and file["sigma"].dtype == np.float64


def test_what_is_not_known_is_not_written(tmp_path):
    def tones(images):
        return images.double().mean(dim=(2, 3))

    network = load_features(tones)
    made = replace(statistics(ArraySource(IMAGES), network), neighbours=None, real_halves=None)
    write_reference_npz(tmp_path / "r.npz", made)
    read = statistics(tmp_path / "r.npz", network)
    assert read.spatial is read.neighbours is read.real_halves is None
    assert read.features == "tones" and read.features_sha256 == "unversioned"


def test_a_file_of_adm_gives_its_moments_and_the_features_of_its_images(tmp_path):
    network = Standin()
    path = adm_file(tmp_path / "VIRTUAL.npz", network, IMAGES, arr_0=IMAGES[:10])
    found = statistics(path, network)
    pooled = features_of(network, IMAGES).pooled.double().numpy()
    np.testing.assert_allclose(found.pooled.mean, pooled.mean(0))  # of all 30, not of the 10 images in it
    np.testing.assert_allclose(found.pooled.covariance, np.cov(pooled, rowvar=False))
    assert found.spatial.dim == 4
    torch.testing.assert_close(found.neighbours, features_of(network, IMAGES[:10]).pooled)
    assert (found.source, found.count, found.image_size) == (str(path), None, 16)
    assert (found.features, found.features_sha256, len(found.source_digest)) == ("inception", "unversioned", 64)
    assert len(statistics(path, network, max_pr_images=5).neighbours) == 5


def test_a_file_of_moments_alone_has_nothing_for_precision_and_recall(tmp_path):
    foreign = {"count": np.arange(7), "source": np.zeros(2)}  # names that we use, and others may use too
    found = statistics(adm_file(tmp_path / "moments.npz", Standin(), IMAGES, **foreign), Standin())
    assert found.count is None and found.neighbours is None and found.image_size is None


def test_a_file_of_images_without_moments_is_a_set_of_images(mini, tmp_path):
    write_npz(tmp_path / "images.npz", IMAGES)
    found = statistics(tmp_path / "images.npz", mini)
    assert found.count == 30 and found.source_digest == ArraySource(IMAGES).digest


def test_statistics_of_another_network_are_refused_by_both_names(mini, tmp_path):
    path = adm_file(tmp_path / "adm.npz", Standin(), IMAGES)
    with pytest.raises(ProtocolError, match=r"are of features=inception \(unversio\), and the samples' of mini"):
        statistics(path, mini)
    write_reference_npz(tmp_path / "mini.npz", statistics(ArraySource(IMAGES), mini))
    with pytest.raises(ProtocolError, match=r"are of features=mini .*, and the samples' of inception \(12345678\)"):
        statistics(tmp_path / "mini.npz", Standin())


def test_statistics_of_other_weights_of_the_network_are_refused(mini):
    made = replace(statistics(ArraySource(IMAGES), mini), features_sha256="0" * 64)
    with pytest.raises(
        ProtocolError, match=rf"features=mini \(00000000\), and the samples' of mini \({mini.sha256[:8]}"
    ):
        made.check(mini, 16)


def test_statistics_of_other_dimensions_or_image_sizes_are_refused_by_both_numbers(tmp_path):
    network = Standin()
    path = tmp_path / "wide.npz"
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ProtocolError, match="have 5 dimensions, and features=inception 3"):
        statistics(path, network)
    path = adm_file(tmp_path / "adm.npz", network, IMAGES, arr_0=IMAGES)
    with pytest.raises(ProtocolError, match="of images of 16 px, and the samples have 32"):
        reference_statistics(path, network, 32, progress=False)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(3)}, "holds 'mu' and no 'sigma'"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"'mu' \(3,\) and 'sigma' \(4, 4\) are no finite mean"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "are no finite mean"),
        ({"mu": np.full(3, np.inf), "sigma": np.eye(3)}, "are no finite mean"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "pooled": np.zeros((5, 4))}, r"'pooled' is \(5, 4\), not \(M, 3\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "arr_0": np.zeros((5, 4))}, r"images must be uint8"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "damaged.npz", **arrays)
    with pytest.raises(DataError, match=message):
        statistics(tmp_path / "damaged.npz", Standin())


def test_sets_without_statistics_are_refused(mini):
    with pytest.raises(ProtocolError, match="at least 2 feature vectors, got 1"):
        statistics(ArraySource(IMAGES[:1]), mini)
    with pytest.raises(ConfigError, match="frame.image_size is 8, and image_size 16"):
        statistics(ArraySource(IMAGES), mini, frame=Frame(8))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        statistics(ArraySource(IMAGES), mini, batch_size=0)
