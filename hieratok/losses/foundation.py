"""Frozen networks whose spatial features serve the VF loss (`alignment.py`) and a discriminator over features.

`mini` ships with the package and stands in for a foundation model on machines without a network. `timm:NAME` is any
ViT or convolutional network of timm, such as `timm:vit_large_patch14_dinov2.lvd142m`. A path is a folder in the format
that timm exchanges with the hub. The name of the network goes with every figure made by it.

Source of how images are fed: Yao et al. 2025 (VA-VAE, arXiv 2501.01423).
"""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError, ConfigError, MissingDependencyError
from ..files import sha256_of
from .mini import CHANNELS, load_mini
from .perceptual import _sha256_of_tensors
from .weights_file import load_weights

Normalize = Literal["half", "network"]

NUM_LAYERS = 4  # maps that `layers` gives where the network has as many
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the second is read as tensors only


class Foundation(nn.Module):
    """A frozen network in evaluation mode for ever; gradients flow through it to the images.

    It runs under the ambient autocast, in float32 where there is none; the maps that it returns are float32.

    Attributes:
        name: `mini`, `timm:NAME`, or a folder's name.
        sha256: of the file of its weights, or of its tensors where they came from the hub.
        channels: of the map that `forward` gives.
        layer_channels: of the maps that `layers` gives, shallow to deep.
    """

    name: str
    sha256: str
    channels: int
    layer_channels: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def layers(self, images: Tensor) -> list[Tensor]:
        """Float32 maps `(B, C_i, h_i, w_i)`, shallow to deep, of images `(B, 3, S, S)` in [-1, 1]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """The deepest map that suits the grid, `(B, C, h, w)` float32, of images `(B, 3, S, S)` in [-1, 1]."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Foundation:
        """Stays in evaluation mode: the network is frozen."""
        return super().train(False)


class MiniFoundation(Foundation):
    """The shipped network: maps of stride 2, 4, 8 and 16, of 32, 64, 128 and 192 channels.

    `forward` gives the deepest map whose side is at least `grid_side`: for images of 64 pixels and a grid of 8 x 8 it
    is that of stride 8, 128 channels. A grid finer than every map gets the deepest map. Its input is in [-1, 1], so
    both normalisations are the same.
    """

    def __init__(self, weights: str | Path | None, image_size: int, grid_side: int) -> None:
        super().__init__()
        self.network = load_mini(weights)
        if image_size < self.network.min_side:
            raise ConfigError(f"image_size {image_size} is below {self.network.min_side}, the smallest for mini")
        self.name, self.sha256 = "mini", self.network.sha256
        self.layer_channels = list(CHANNELS[1:])
        self.index = deepest_for_grid([image_size >> i for i in range(1, len(CHANNELS))], grid_side)
        self.channels = self.layer_channels[self.index]

    def layers(self, images: Tensor) -> list[Tensor]:
        """Four maps, see the class."""
        return [features.float() for features in self.network.features(images)[1:]]

    def forward(self, images: Tensor) -> Tensor:
        """One map, see the class."""
        return self.network.features(images)[1 + self.index].float()


class TimmFoundation(Foundation):
    """A network of timm.

    A ViT gets images resized (bilinear, antialiased) to `grid_side` patches, so that its tokens lie on the latent's
    grid: 224 pixels for a 16 x 16 grid of DINOv2's patches of 14, and the image as it is where the network's patch is
    the tokenizer's. Class and register tokens are dropped. `layers` are the tokens after a quarter, a half, three
    quarters and all of the blocks, each through the network's final norm; `forward` is the last of them, which is
    what timm's `forward_features` gives.

    A convolutional network gets images as they are. `layers` are its last four maps; `forward` is the deepest whose
    side is at least `grid_side`, or else the deepest of all.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, network: Any, name: str, sha256: str, image_size: int, grid_side: int, normalize: Normalize
    ) -> None:
        """`network`: timm's model, with its weights.

        Raises:
            ConfigError: it has no maps of features, or cannot look at images of this side.
        """
        super().__init__()
        if not hasattr(network, "forward_intermediates"):
            raise ConfigError(f"{name} is a network whose maps of features timm cannot give; choose another")
        self.network = network.float().requires_grad_(False).eval()
        self.name, self.sha256 = name, sha256
        # timm describes images in [0, 1]; here they are in [-1, 1].
        mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        self.normalize = normalize
        self.register_buffer("shift", 2 * mean - 1, persistent=False)
        self.register_buffer("scale", 2 * std, persistent=False)

        reductions = [info["reduction"] for info in network.feature_info]
        depth = len(reductions)
        self.is_vit = len(set(reductions)) == 1  # a convolutional network's maps shrink with depth
        self.side = grid_side * reductions[-1] if self.is_vit else image_size
        if self.is_vit:
            self.indices = sorted({math.ceil(depth * i / NUM_LAYERS) - 1 for i in range(1, NUM_LAYERS + 1)})
        else:
            self.indices = list(range(depth))[-NUM_LAYERS:]
        try:
            if self.is_vit and hasattr(network, "set_input_size"):
                # Positions are resampled here, and not in every call.
                network.set_input_size(img_size=(self.side, self.side))
            with torch.no_grad():
                maps = self.layers(torch.zeros(1, 3, image_size, image_size))
        except Exception as error:  # each family has its own
            raise ConfigError(f"{name} cannot look at images of {self.side} pixels: {error}") from error
        self.layer_channels = [features.shape[1] for features in maps]
        self.index = len(maps) - 1 if self.is_vit else deepest_for_grid([m.shape[-1] for m in maps], grid_side)
        self.channels = self.layer_channels[self.index]

    def layers(self, images: Tensor) -> list[Tensor]:
        """Four maps, or as many as the network has blocks; see the class."""
        return self._maps(images, self.indices)

    def forward(self, images: Tensor) -> Tensor:
        """One map, see the class."""
        return self._maps(images, [self.indices[self.index]])[0]

    def _maps(self, images: Tensor, indices: list[int]) -> list[Tensor]:
        images = images.float()
        if images.shape[-1] != self.side:
            images = F.interpolate(images, size=(self.side, self.side), mode="bilinear", antialias=True)
        if self.normalize == "network":
            images = (images - self.shift) / self.scale
        maps = self.network.forward_intermediates(
            images, indices=indices, norm=self.is_vit, stop_early=True, intermediates_only=True
        )
        return [features.float() for features in maps]


def load_foundation(
    spec: str, weights: str | Path | None = None, *, image_size: int, grid_side: int, normalize: Normalize = "half"
) -> Foundation:
    """The frozen network that `spec` names, for images of side `image_size` and latents of side `grid_side`.

    `spec`: `mini`, `timm:NAME`, or a folder with `config.json` and `model.safetensors` in timm's hub format.
    `weights`: a local `.safetensors` or `.pth` file in place of the shipped weights or the hub's; it may be in any form
    that timm converts for this network, and need not hold the classifier.
    `normalize`: `half` feeds images as they are, in [-1, 1], as VA-VAE does; `network` applies the network's own mean
    and deviation.

    Raises:
        ConfigError: an unknown spec, network or normalisation, or a network that cannot look at such images.
        CheckpointError: weights are missing or of another network, or the hub cannot be reached.
        MissingDependencyError: timm is needed and not installed.
    """
    if normalize not in ("half", "network"):
        raise ConfigError(f"normalize '{normalize}' is neither half nor network")
    if spec == "mini":
        return MiniFoundation(weights, image_size, grid_side)
    if spec.startswith("timm:"):
        network, sha256 = _load_by_name(spec.removeprefix("timm:"), weights)
        return TimmFoundation(network, spec, sha256, image_size, grid_side, normalize)
    folder = Path(spec)
    if not spec or not folder.is_dir():
        raise ConfigError(
            f"foundation '{spec}' is neither mini, nor timm:NAME, nor a folder in timm's format that exists"
        )
    if weights is not None:
        raise ConfigError(f"the folder {spec} holds the network's weights; leave out the file {weights}")
    network, sha256 = _load_folder(folder)
    return TimmFoundation(network, folder.resolve().name, sha256, image_size, grid_side, normalize)


def deepest_for_grid(sides: list[int], grid_side: int) -> int:
    """Index of the deepest map whose side is at least that of the grid, or else of the deepest; shallow to deep."""
    fine_enough = [i for i, side in enumerate(sides) if side >= grid_side]
    return fine_enough[-1] if fine_enough else len(sides) - 1


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError("this foundation needs timm: pip install 'hieratok[foundation]'") from error
    return timm


def _load_by_name(name: str, weights: str | Path | None) -> tuple[nn.Module, str]:
    """A network of timm's register and the hash of its weights."""
    timm = _timm()
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise ConfigError(f"timm has no network '{architecture}'" + (f"; near it: {', '.join(near)}" if near else ""))
    try:
        described = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ConfigError(f"timm has no weights '{name}': {error}") from error
    if weights is not None:
        return _create(name, Path(weights), described.classifier if described else None), sha256_of(Path(weights))
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # of the hub, the network, the disk
        raise CheckpointError(
            f"timm cannot get the weights of {name}: {error}; give a local file of them as foundation_weights"
        ) from error
    return network, _sha256_of_tensors(network.state_dict())


def _load_folder(folder: Path) -> tuple[nn.Module, str]:
    """The network of a folder in timm's hub format and the hash of its weights."""
    timm = _timm()
    try:
        described = json.loads((folder / "config.json").read_text())
        architecture = described["architecture"]
        classifier = described.get("pretrained_cfg", described).get("classifier")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} has no config.json that names the architecture of a network of timm: {error}"
        ) from error
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise CheckpointError(f"{folder / 'config.json'} names '{architecture}', which is no network of timm")
    files = [folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()]
    if not files:
        raise CheckpointError(f"{folder} holds none of {', '.join(FOLDER_WEIGHTS)}")
    return _create(f"local-dir:{folder}", files[0], classifier), sha256_of(files[0])


def _create(name: str, path: Path, classifier: str | list[str] | tuple[str, ...] | None) -> nn.Module:
    """A network of timm with the weights of a file, through timm's own conversion for the family; strict.

    `classifier`: the names of its last layers, which are left out.
    """
    dropped = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in load_weights(path, name).items()}
    tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[0] not in dropped}
    # With no classifier described, timm takes the weights to be those of all layers, and is strict.
    overlay = {"state_dict": tensors, "source": None, "file": None, "classifier": None}
    try:
        network = _timm().create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except Exception as error:  # of the conversion, the shapes, the arguments in a folder
        raise CheckpointError(f"{path} does not hold the weights of {name}: {error}") from error
    network.pretrained_cfg.pop("state_dict", None)  # or the tensors would be kept twice
    return network
