"""Feature networks: their names, their hashes, and what is refused."""

from __future__ import annotations

import pickle

import pytest
import torch

from hieratok.errors import CheckpointError, ConfigError, ProtocolError
from hieratok.evaluation.features import check_side, figure_key, load_features
from hieratok.files import sha256_of
from hieratok.losses.mini import MINI_WEIGHTS, load_mini

IMAGES = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def channel_means(images):
    return images.double().mean(dim=(2, 3))


def test_mini_gives_192_features_of_uint8_images_and_the_hash_of_its_file():
    features = load_features("mini")
    out = features(IMAGES)
    assert (features.name, features.dim, features.sha256) == ("mini", 192, sha256_of(MINI_WEIGHTS))
    assert out.shape == (2, 192) and out.dtype == torch.float32
    torch.testing.assert_close(out, load_mini().pooled(IMAGES.float() / 127.5 - 1), rtol=1e-4, atol=1e-4)


def test_mini_also_classifies_and_knows_where_things_are():
    network, features = load_mini(), load_features("mini")
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    everything = features.everything(images)
    floats = images.float() / 127.5 - 1
    torch.testing.assert_close(everything.pooled, features(images))
    torch.testing.assert_close(everything.logits, network(floats), rtol=1e-4, atol=1e-4)
    spatial = network.features(floats)[3][:, :7]  # of stride 8
    assert spatial.shape == (2, 7, 8, 8) and everything.spatial.shape == (2, 448)
    expected = torch.stack([spatial[:, c, y, x] for y in range(8) for x in range(8) for c in range(7)], dim=1)
    torch.testing.assert_close(everything.spatial, expected, rtol=1e-4, atol=1e-4)
    assert features.everything(IMAGES).spatial.shape == (2, 7 * 4 * 4)
    assert features.everything(torch.zeros(1, 3, 256, 256, dtype=torch.uint8)).spatial.shape == (1, 448)


def test_the_spatial_features_tell_an_image_from_its_mirror_image_better_than_the_pooled_ones():
    features = load_features("mini")
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[..., :20] = 255
    here, there = features.everything(image), features.everything(image.flip(3))

    def difference(a, b):
        return float((a - b).norm() / a.norm())

    assert difference(here.spatial, there.spatial) > 2 * difference(here.pooled, there.pooled)


def test_a_callable_has_pooled_features_only():
    everything = load_features(channel_means).everything(IMAGES)
    assert everything.pooled.shape == (2, 3)
    assert everything.logits is None and everything.spatial is None


def test_a_network_that_was_loaded_may_be_given_again():
    for network in (load_features("mini"), load_features(channel_means)):
        assert load_features(network) is network


def test_images_that_a_network_cannot_look_at_are_refused_by_size():
    check_side(load_features("mini"), 16)
    with pytest.raises(ProtocolError, match="15 px are too small for features=mini, which needs 16"):
        check_side(load_features("mini"), 15)


def test_a_callable_is_known_by_its_name_and_has_no_version():
    features = load_features(channel_means)
    assert (features.name, features.dim, features.sha256) == ("channel_means", 3, "unversioned")
    assert features(IMAGES).dtype == torch.float32


def test_a_callable_may_state_its_name_its_length_and_its_hash():
    class Network:
        name, dim, sha256 = "dino", 5, "abc"

        def __call__(self, images):
            return torch.ones(len(images), 5)

    features = load_features(Network())
    assert (features.name, features.dim, features.sha256) == ("dino", 5, "abc")


def test_a_callable_that_gives_maps_or_poses_as_a_network_of_the_package_is_refused():
    with pytest.raises(ConfigError, match=r"must give \(1, dim\) for 1 images, got \(1, 3, 64, 64\)"):
        load_features(lambda images: images)
    channel_means.name = "inception"
    try:
        with pytest.raises(ConfigError, match="may not call themselves 'inception'"):
            load_features(channel_means)
    finally:
        del channel_means.name


def test_an_unknown_network_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="no feature network named 'inceptoin'; did you mean 'inception'"):
        load_features("inceptoin")


def test_only_the_published_network_has_figures_without_its_name():
    assert figure_key("rfid", "inception") == "rfid"
    assert figure_key("rfid", "mini") == "rfid_mini"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_inception_reads_a_local_file_without_a_download(tmp_path, suffix, monkeypatch):
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download"))
    tensors = inception_tensors(inception)
    tensors["fc.bias"] += torch.arange(1008)
    path = tmp_path / f"inception{suffix}"
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        from safetensors.torch import save_file

        save_file(tensors, path)
    features = load_features("inception", path)
    assert (features.name, features.dim, features.sha256) == ("inception", 2048, sha256_of(path))
    out = features(IMAGES[:1])
    assert out.shape == (1, 2048) and torch.isfinite(out).all()
    if suffix == ".pth":
        is_like_adms_evaluator(features, tensors)


def is_like_adms_evaluator(features, tensors):
    """Logits are without bias; spatial features are 7 channels of what the seventh mixture of the network begins with,
    in TensorFlow's order."""
    maps = []
    hook = features.network.Mixed_6d.register_forward_hook(lambda _module, _input, out: maps.append(out))
    everything = features.everything(IMAGES)
    hook.remove()
    torch.testing.assert_close(everything.pooled, features(IMAGES))
    torch.testing.assert_close(everything.logits, everything.pooled @ tensors["fc.weight"].T, rtol=1e-3, atol=1e-3)
    (mixture,) = maps
    assert mixture.shape == (2, 768, 17, 17) and everything.spatial.shape == (2, 2023)
    in_pixels = everything.spatial.reshape(2, 17, 17, 7)
    for channel in range(7):
        torch.testing.assert_close(in_pixels[..., channel], mixture[:, channel])
    assert (everything.spatial >= 0).all() and everything.spatial.std() > 0
    assert not features.network.Mixed_6d.branch1x1._forward_hooks  # else every call would keep a map


def inception_tensors(inception):
    """Random weights of Inception's shapes, without the constructor's download."""

    class Shapes(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        with torch.device("meta"):
            state = Shapes("inception-v3-compat", ["2048"]).state_dict()
    torch.manual_seed(0)
    made = {}
    for name, tensor in state.items():
        if tensor.dim() > 1:
            made[name] = torch.randn(tensor.shape) * (2 / tensor[0].numel()) ** 0.5
        elif tensor.dtype == torch.int64:
            made[name] = torch.zeros(tensor.shape, dtype=torch.int64)
        else:
            made[name] = torch.ones(tensor.shape) if name.endswith(("weight", "var")) else torch.zeros(tensor.shape)
    return made


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code of the weights file was run",))


def test_a_file_that_would_run_code_or_holds_something_else_is_refused(tmp_path):
    pytest.importorskip("torch_fidelity")
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"fc.weight": Malicious()}, protocol=2))
    with pytest.raises(CheckpointError, match="no file of tensors that can be read safely"):
        load_features("inception", tmp_path / "bad.pth")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold torch-fidelity's Inception-v3"):
        load_features("inception", tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no weights of Inception at"):
        load_features("inception", tmp_path / "missing.pth")


def test_weights_for_a_callable_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="a callable brings its own"):
        load_features(channel_means, tmp_path / "w.pth")
