"""Feature networks of the metrics of sets: `mini` (the package's own), `inception` (the published one), or a callable.

A network is part of what a figure is: its name goes into the figure's label, its weights' hash into the protocol.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.error import URLError

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import suggest
from ..data.decode import to_float
from ..errors import CheckpointError, ConfigError, DataError, MissingDependencyError, ProtocolError
from ..files import sha256_of
from ..losses.mini import load_mini
from ..losses.weights_file import load_weights

UNVERSIONED = "unversioned"

INCEPTION_VARIANT = "inception-v3-compat"
INCEPTION_LAYER = "2048"
INCEPTION_LOGITS = "logits_unbiased"  # ADM's Inception Score leaves the bias out

SPATIAL_CHANNELS = 7  # the first ones, for no stated reason (Nash et al. 2021; ADM's evaluator)
MINI_SPATIAL_MAP = 3  # of stride 8
MINI_SPATIAL_SIDE = 8


class Features(NamedTuple):
    """What a network sees in B images, float32.

    `pooled` `(B, dim)`: of Frechet distances, precision and recall. `logits` `(B, classes)`: of the Inception Score;
    None of a network that does not classify. `spatial` `(B, spatial_dim)`: a map of few channels, which knows where
    things are, as rows of pixels of channels; of sFID, or None.
    """

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class FeatureNetwork(Protocol):
    """What the metrics of sets need of a network.

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

    def everything(self, images: Tensor) -> Features:
        """The same, with logits and spatial features where the network has them."""


class MiniFeatures:
    """The pooled last map of the network that ships with the package; it stands in for Inception and is not like it.

    Spatial features: the first 7 channels of the map of stride 8, averaged down to 8 x 8 where the images are larger
    than 64 pixels; 448 numbers at 64 pixels.
    """

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

    @torch.no_grad()
    def everything(self, images: Tensor) -> Features:
        maps = self.network.features(to_float(images.to(self.device)))
        pooled = maps[-1].mean(dim=(2, 3))
        spatial = maps[MINI_SPATIAL_MAP]
        if max(spatial.shape[2:]) > MINI_SPATIAL_SIDE:
            spatial = F.adaptive_avg_pool2d(spatial, MINI_SPATIAL_SIDE)
        return Features(pooled.float(), self.network.classifier(pooled).float(), _spatial(spatial))


class InceptionFeatures:
    """Inception-v3 as FID has it: TensorFlow's weights and resize to 299 pixels, the 2048 pooled features.

    Logits are without bias and spatial features those of TensorFlow's `mixed_6/conv`, 17 x 17 of 7 channels, as in
    ADM's evaluator.

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
                INCEPTION_VARIANT, [INCEPTION_LAYER, INCEPTION_LOGITS], feature_extractor_weights_path=tensors
            )
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"{path} does not hold torch-fidelity's Inception-v3: {error}") from error
        self.device = torch.device(device)
        self.network = network.to(self.device)
        self.sha256 = sha256_of(path)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.device))[0].float()

    @torch.no_grad()
    def everything(self, images: Tensor) -> Features:
        maps: list[Tensor] = []
        # TensorFlow numbers the eleven mixtures through: its mixed_6 is the seventh, here Mixed_6d.
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _input, out: maps.append(out))
        try:
            pooled, logits = self.network(images.to(self.device))
        finally:
            hook.remove()
        return Features(pooled.float(), logits.float(), _spatial(maps[0]))


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

    def everything(self, images: Tensor) -> Features:
        return Features(self(images))


def _spatial(maps: Tensor) -> Tensor:
    """`(B, H * W * 7)`, in the order in which TensorFlow, and so ADM's files of statistics, has them."""
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()


def load_features(
    spec: str | FeatureNetwork | Callable[[Tensor], Tensor],
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> FeatureNetwork:
    """A feature network by name, or a wrapped callable.

    Args:
        spec: "mini", "inception", or a callable of uint8 images `(B, 3, H, W)` to `(B, dim)`; a callable's name is its
            `name` or `__name__`, its length of features its `dim` or that of one black image of 64 x 64 pixels. What
            this function gave before comes back as it is.
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
        if isinstance(spec, MiniFeatures | InceptionFeatures | CallableFeatures):
            return spec
        return CallableFeatures(spec, device)
    if spec not in NETWORKS:
        raise ConfigError(f"no feature network named '{spec}'{suggest(str(spec), NETWORKS)}")
    return NETWORKS[spec](weights, device)


def figure_key(figure: str, network: str) -> str:
    """The key of a figure: bare for the published network, with the network's name for any other.

    `figure_key("rfid", "mini") == "rfid_mini"`, `figure_key("rfid", "inception") == "rfid"`.
    """
    return figure if network == INCEPTION else f"{figure}_{network}"


def check_side(network: FeatureNetwork, image_size: int) -> None:
    """Raises:
    ProtocolError: images of that side are too small for the network.
    """
    if image_size < network.min_side:
        raise ProtocolError(
            f"images of {image_size} px are too small for features={network.name}, which needs {network.min_side}"
        )


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
