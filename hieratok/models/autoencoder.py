"""Any tokenizer behind one face: HieraTok and diffusers' autoencoders encode, decode and are recognised alike."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ..errors import ConfigError
from .tokenizer import HieraTok

# Classes whose images lie in [0, 1]; all others of diffusers have them in [-1, 1] (AutoencoderTiny maps them itself).
UNIT_RANGE = frozenset({"AutoencoderRAE"})
# Where the classes keep the side of the images that they were trained on.
SIZE_FIELDS = ("image_size", "sample_size")


class Autoencoder:
    """An adapter over a model with `encode` and `decode`.

    Attributes:
        model: the model itself.
        name: its class, for people and records.
        image_size: side of the images in pixels.
        sides: of the token maps that its decoder paints from, coarse to fine; one for all but HieraTok.
    """

    def __init__(self, model: ModelMixin, image_size: int | None = None) -> None:
        """`image_size`: None is what the model's config says.

        Raises:
            ConfigError: no autoencoder, or one of unknown image size.
        """
        for method in ("encode", "decode"):
            if not callable(getattr(model, method, None)):
                raise ConfigError(f"{type(model).__name__} has no {method}; give an autoencoder")
        self.model: Any = model
        self.name = type(model).__name__
        # AutoencoderRAE paints images of another size than its encoder resizes them to, and config need not say it.
        known = getattr(model, "decoder_image_size", None) or next(
            (model.config[field] for field in SIZE_FIELDS if model.config.get(field)), None
        )
        if isinstance(model, HieraTok) and image_size not in (None, known):
            raise ConfigError(f"image_size is {image_size}, this tokenizer's is {known}")
        side = image_size or known
        if side is None:
            raise ConfigError(f"{self.name} does not say the size of its images; give image_size")
        self.image_size = int(side)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def sides(self) -> tuple[int, ...]:
        return self.model.layout.sides if isinstance(self.model, HieraTok) else (self.latent_shape[1],)

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(d, h, w)` of one image's latents.

        Raises:
            ConfigError: they are not square maps.
        """
        black = torch.zeros(1, 3, self.image_size, self.image_size, device=self.device)
        shape = tuple(self.mode(self.encode(black)).shape[1:])
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ConfigError(f"{self.name} gives latents of shape {shape}; a generator needs square maps (d, h, h)")
        return shape

    @cached_property
    def deterministic(self) -> bool:
        """Whether it gives latents rather than a distribution over them."""
        black = torch.zeros(1, 3, self.image_size, self.image_size, device=self.device)
        return not hasattr(self._encoded(black), "latent_dist")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Mean and log-variance `(B, 2d, h, w)`, or latents `(B, d, h, w)` where it is deterministic, in float32.

        `images`: `(B, 3, H, W)` in [-1, 1].
        """
        encoded = self._encoded(images)
        if hasattr(encoded, "latent_dist"):
            distribution = encoded.latent_dist
            return torch.cat([distribution.mean, distribution.logvar], dim=1).float()
        latents = getattr(encoded, "latent", None)
        return (encoded.latents if latents is None else latents).float()  # AutoencoderTiny and VQModel: the plural

    def _encoded(self, images: Tensor) -> Any:
        images = images.to(self.dtype)
        with torch.no_grad():
            return self.model.encode((images + 1) / 2 if self.name in UNIT_RANGE else images)

    def mode(self, encoded: Tensor) -> Tensor:
        """The likeliest latents of what `encode` gave."""
        return encoded if self.deterministic else encoded.chunk(2, dim=1)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> tuple[Tensor, ...]:
        """The image of every scale, coarse to fine, `(B, 3, s, s)` in about [-1, 1], of latents as `encode` gives them.

        A tokenizer other than HieraTok has one scale.
        """
        return decode_scales(self.model, latents)

    def state_sha256(self) -> str:
        """What tells this tokenizer from any other."""
        return state_sha256(self.model)


def decode_scales(model: Any, latents: Tensor) -> tuple[Tensor, ...]:
    """See `Autoencoder.decode`."""
    decoded = model.decode(latents.to(next(model.parameters()).dtype))
    scales = decoded.scales if isinstance(model, HieraTok) else (decoded.sample,)
    return tuple(2 * scale - 1 for scale in scales) if type(model).__name__ in UNIT_RANGE else tuple(scales)


def as_autoencoder(model: Autoencoder | ModelMixin) -> Autoencoder:
    """The model behind the adapter, if it is not there yet."""
    return model if isinstance(model, Autoencoder) else Autoencoder(model)


def sample_moments(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents `(B, d, h, w)` drawn from mean and log-variance `(B, 2d, h, w)` with standard normal noise."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise


def state_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes and values of a model's state, as hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
