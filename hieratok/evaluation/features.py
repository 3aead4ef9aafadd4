"""Feature networks for Frechet distances: `mini` (the package's own), `inception` (the published one), or a callable.

A network is part of what a figure is: its name goes into the figure's label, its weights' hash into the protocol.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.error import URLError

import torch
from torch import Tensor

from ..config import suggest
from ..data.decode import to_float
from ..errors import CheckpointError, ConfigError, DataError, MissingDependencyError
from ..files import sha256_of
from ..losses.mini import load_mini
from ..losses.weights_file import load_weights

UNVERSIONED = "unversioned"

INCEPTION_VARIANT = "inception-v3-compat"
INCEPTION_LAYER = "2048"


class FeatureNetwork(Protocol):
    """What a Frechet distance needs of a network.

    Attributes:
        name: goes into every figure's key and label.
        sha256: of the weights, or "unversioned".
        dim: length of a feature vector.
        min_side: the smallest image side that it can look at.
    """

    name: str
    sha256: str
    dim: int
    min_side: int

    def __call__(self, images: Tensor) -> Tensor:
        """`(B, dim)` float32 of uint8 images `(B, 3, H, W)`."""


class MiniFeatures:
    """The pooled last map of the network that ships with the package; it stands in for Inception and is not like it."""

    name = "mini"

    def __init__(self, weights: str | Path | None, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.network = load_mini(weights).to(self.device)
        self.sha256 = self.network.sha256
        self.min_side = self.network.min_side
        self.dim = self.network.classifier.in_features

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network.pooled(to_float(images.to(self.device))).float()


class InceptionFeatures:
    """Inception-v3 as FID has it: TensorFlow's weights and resize to 299 pixels, the 2048 pooled features.

    Source: torch-fidelity's port, which agrees with the original to the last digits.
    """

    name = "inception"
    min_side = 1  # it resizes everything to 299 pixels
    dim = 2048

    def __init__(self, weights: str | Path | None, device: torch.device | str) -> None:
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as inception
        except ImportError as error:
            raise MissingDependencyError(
                "features=inception needs torch-fidelity: pip install 'hieratok[eval]'"
            ) from error
        path = Path(weights) if weights is not None else _download(inception.URL_INCEPTION_V3)
        # torch-fidelity unpickles whatever file it is given; it gets tensors that were read safely, serialised anew.
        tensors = io.BytesIO()
        torch.save(load_weights(path, "Inception"), tensors)
        tensors.seek(0)
        try:
            network = inception.FeatureExtractorInceptionV3(
                INCEPTION_VARIANT, [INCEPTION_LAYER], feature_extractor_weights_path=tensors
            )
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"{path} does not hold torch-fidelity's Inception-v3: {error}") from error
        self.device = torch.device(device)
        self.network = network.to(self.device)
        self.sha256 = sha256_of(path)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.device))[0].float()


class CallableFeatures:
    """Any function of uint8 images `(B, 3, H, W)` to `(B, dim)`."""

    min_side = 1

    def __init__(self, function: Callable[[Tensor], Tensor], device: torch.device | str) -> None:
        name = getattr(function, "name", None) or getattr(function, "__name__", None) or type(function).__name__
        self.name = str(name)
        if self.name in NETWORKS:
            raise ConfigError(f"features may not call themselves '{self.name}', a network of this package; rename them")
        self.function = function
        self.device = torch.device(device)
        self.sha256 = getattr(function, "sha256", None) or UNVERSIONED
        dim = getattr(function, "dim", None)
        self.dim = int(dim) if dim else self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        features = self.function(images.to(self.device)).float()
        if features.dim() != 2 or len(features) != len(images):
            raise ConfigError(
                f"features '{self.name}' must give ({len(images)}, dim) for {len(images)} images, "
                f"got {tuple(features.shape)}"
            )
        return features


def load_features(
    spec: str | Callable[[Tensor], Tensor], weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> FeatureNetwork:
    """A feature network by name, or a wrapped callable.

    Args:
        spec: "mini", "inception", or a callable of uint8 images `(B, 3, H, W)` to `(B, dim)`; a callable's name is its
            `name` or `__name__`, its length of features its `dim` or that of one black image of 64 x 64 pixels.
        weights: a local `.safetensors` or `.pth` file of the named network; None is the shipped file (mini) or the
            one that torch-fidelity publishes (inception, downloaded once).
        device: where the network runs.

    Raises:
        ConfigError: no network of that name, or weights for a callable.
        CheckpointError: the file is missing or holds something else.
        DataError: the download failed.
        MissingDependencyError: torch-fidelity is not installed.
    """
    if callable(spec):
        if weights is not None:
            raise ConfigError("feature_weights go with a named feature network; a callable brings its own")
        return CallableFeatures(spec, device)
    if spec not in NETWORKS:
        raise ConfigError(f"no feature network named '{spec}'{suggest(str(spec), NETWORKS)}")
    return NETWORKS[spec](weights, device)


def figure_key(figure: str, network: str) -> str:
    """The key of a figure: bare for the published network, with the network's name for any other.

    `figure_key("rfid", "mini") == "rfid_mini"`, `figure_key("rfid", "inception") == "rfid"`.
    """
    return figure if network == INCEPTION else f"{figure}_{network}"


def _download(url: str) -> Path:
    name = url.rsplit("/", 1)[-1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        hash_prefix = path.stem.rsplit("-", 1)[-1]
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix)
        except (URLError, OSError, RuntimeError) as error:
            raise DataError(
                f"the weights of Inception could not be downloaded from {url} ({error}); fetch them elsewhere and give "
                f"the file as feature_weights, or use features=mini"
            ) from error
    return path


INCEPTION = InceptionFeatures.name
NETWORKS: dict[str, Callable[[str | Path | None, torch.device | str], FeatureNetwork]] = {
    MiniFeatures.name: MiniFeatures,
    INCEPTION: InceptionFeatures,
}
