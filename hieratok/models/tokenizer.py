"""HieraTok: a multi-scale vision-transformer autoencoder. Reads top to bottom like Figure 2 of the paper.

    images -> encoder -> posterior -> latents -> downsampler -> token map per scale -> decoder -> image per scale

Shapes: B batch, H W pixels, h w the latent grid (H / patch_size), d latent channels, D hidden size, N tokens,
s the side of a scale's token map, p the patch size.

Paper: Sec. 3.2, Table 10, App. E. Where the paper is silent, `docs/paper.md` says what was chosen and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional as F

from .downsample import DOWNSAMPLERS
from .latent_statistics import LatentStatistics
from .loading import SafeLoading
from .scales import ATTENTION_PATTERNS, ScaleLayout
from .transformer import Transformer

Generator = torch.Generator | list[torch.Generator] | None


@dataclass
class HieraTokDecoderOutput(DecoderOutput):
    """`sample`: the finest image that was decoded, `(B, 3, H, W)`, about [-1, 1].

    `scales`: the image of every decoded scale, `(B, 3, s * p, s * p)`, coarse to fine; the last one is `sample`.
    """

    scales: tuple[Tensor, ...] = ()


@dataclass
class HieraTokOutput(BaseOutput):
    """What training looks at: the images of `HieraTokDecoderOutput`, the posterior, and the decoded latents."""

    sample: Tensor
    scales: tuple[Tensor, ...]
    posterior: DiagonalGaussianDistribution
    latents: Tensor


class Encoder(nn.Module):
    """Patches by convolution, a transformer, and the moments of the posterior of each token (Sec. 3.1)."""

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        grid_side: int,
        latent_channels: int,
        hidden_size: int,
        transformer: Transformer,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.zeros(1, hidden_size, grid_side, grid_side))
        self.layout = ScaleLayout((grid_side,))
        self.transformer = transformer
        self.moments = nn.Linear(hidden_size, 2 * latent_channels)

    def forward(self, images: Tensor, generator: Generator) -> Tensor:
        """Moments `(B, 2d, h, w)` of images `(B, 3, H, W)`, in the precision of the weights."""
        token_map = self.patch_embed(images) + self.position  # (B, D, h, w)
        grid = token_map.shape[2:]
        tokens = self.transformer(self.layout.join([token_map]), self.layout, "full", generator)  # (B, N, D)
        moments = in_weight_precision(self.moments, tokens)  # (B, N, 2d)
        return moments.transpose(1, 2).unflatten(2, grid)


class Decoder(nn.Module):
    """Latents to one image per scale: downsample, concatenate coarse to fine, attend, paint patches (Sec. 3.2)."""

    def __init__(
        self,
        layout: ScaleLayout,
        pattern: str,
        latent_channels: int,
        out_channels: int,
        patch_size: int,
        hidden_size: int,
        downsampler: nn.Module,
        transformer: Transformer,
        pixel_heads: int,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.pattern = pattern
        self.patch_size = patch_size
        grid_side = layout.sides[-1]
        self.project = nn.Linear(latent_channels, hidden_size)
        self.downsampler = downsampler
        self.position = nn.Parameter(torch.zeros(1, hidden_size, grid_side, grid_side))
        self.scale_embedding = nn.Parameter(torch.zeros(len(layout.sides), hidden_size))
        self.transformer = transformer
        patch_values = out_channels * patch_size**2
        self.to_pixels = nn.ModuleList(nn.Linear(hidden_size, patch_values) for _ in range(pixel_heads))

    def forward(self, latents: Tensor, max_scale: int | None, generator: Generator) -> tuple[Tensor, ...]:
        """Images `(B, 3, s * p, s * p)` of latents `(B, d, h, w)`, coarse to fine, up to the scale `max_scale`."""
        layout = self.layout.up_to(max_scale)
        token_map = self.project(latents.movedim(1, -1)).movedim(-1, 1)  # (B, D, h, w)
        token_maps = self.downsampler(token_map, len(layout.sides))
        token_maps = [
            m + self.positions(i, side) for i, (m, side) in enumerate(zip(token_maps, layout.sides, strict=True))
        ]
        tokens = self.transformer(layout.join(token_maps), layout, self.pattern, generator)  # (B, N, D)
        images = []
        for i, (start, end) in enumerate(layout.spans):
            head = cast(nn.Linear, self.to_pixels[min(i, len(self.to_pixels) - 1)])
            images.append(self.unpatchify(in_weight_precision(head, tokens[:, start:end]), layout.sides[i]))
        return tuple(images)

    def last_layer(self, scale: int) -> Tensor:
        """The weights `(3 * p * p, D)` that paint the pixels of a scale, given by its place from coarse to fine."""
        return cast(nn.Linear, self.to_pixels[min(scale, len(self.to_pixels) - 1)]).weight

    def positions(self, scale: int, side: int) -> Tensor:
        """The spatial table area-interpolated to `side`, plus the scale's vector: `(1, D, side, side)` (App. E)."""
        return F.adaptive_avg_pool2d(self.position, side) + self.scale_embedding[scale].view(1, -1, 1, 1)

    def unpatchify(self, patches: Tensor, side: int) -> Tensor:
        """`(B, side * side, 3 * p * p)` to `(B, 3, side * p, side * p)`."""
        p = self.patch_size
        image = patches.unflatten(1, (side, side)).unflatten(3, (-1, p, p))  # (B, s, s, 3, p, p)
        return image.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, side * p, side * p)


def in_weight_precision(linear: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer outside autocast: bf16 has 8 bits, too few for a pixel or a moment."""
    x = x.to(linear.weight.dtype)
    if not torch.amp.is_autocast_available(x.device.type):  # the meta device, on which costs are counted
        return linear(x)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x)


class HieraTok(SafeLoading, LatentStatistics, ModelMixin, ConfigMixin, AutoencoderMixin):  # type: ignore[misc]
    """The multi-scale tokenizer; with `scales` of one side it is the single-scale baseline.

    It follows diffusers' conventions for an autoencoder with a KL bottleneck, so it loads through
    `diffusers.AutoModel` and serves as the `vae` of a pipeline.

    Args:
        image_size: side H = W of the images, in pixels.
        patch_size: side p of a patch; the latent grid is `image_size / patch_size`.
        in_channels: colour channels.
        latent_channels: channels d of the latent (f16d16 has 16).
        scales: sides of the decoder's token maps, coarse to fine, ending in the grid's side; None is the powers of two.
        encoder_num_layers, encoder_hidden_size, encoder_num_heads: the encoder (Table 10).
        decoder_num_layers, decoder_hidden_size, decoder_num_heads: the decoder (Table 10).
        mlp_ratio, qkv_bias, mlp_bias, layer_norm_eps, initializer_range: of both (Table 10). `qkv_bias` covers the
            output projection of the attention too.
        encoder_drop_path_rate, decoder_drop_path_rate: stochastic depth at the last layer, rising linearly.
        attention_pattern: `scale_causal`, `scale_independent` or `full` (Table 3).
        attention_backend: `auto`, `prefix`, `mask` or `matmul`; the same result at another speed.
        downsampler: `conv` or `interpolation` (Table 3).
        initial_log_variance: of the posterior before training. At 0 its noise drowns the latents until the encoder
            has learned to quieten it, which a short run feels.
        pixel_head: `shared` by all scales, or one `per_scale`. Table 7's parameter count leaves room for one only.
        scaling_factor: 1 / standard deviation of the latents, as pipelines with a single factor expect.
        shift_factor: None; kept because pipelines read it.
        latents_mean, latents_std: d numbers each, measured on the training set at the end of training.

    Raises:
        ValueError: the numbers do not fit together; the message names them.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # type: ignore[assignment]
    _repeated_blocks = ["Block"]  # type: ignore[assignment]

    if TYPE_CHECKING:
        config: Any  # a FrozenDict whose keys are attributes

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        latent_channels: int = 16,
        scales: Sequence[int] | None = None,
        encoder_num_layers: int = 6,
        encoder_hidden_size: int = 768,
        encoder_num_heads: int = 12,
        decoder_num_layers: int = 24,
        decoder_hidden_size: int = 1024,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_bias: bool = False,
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        encoder_drop_path_rate: float = 0.0,
        decoder_drop_path_rate: float = 0.1,
        attention_pattern: str = "scale_causal",
        attention_backend: str = "auto",
        downsampler: str = "conv",
        initial_log_variance: float = 0.0,
        pixel_head: str = "shared",
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not divisible by patch_size {patch_size}")
        if attention_pattern not in ATTENTION_PATTERNS:
            raise ValueError(f"attention_pattern '{attention_pattern}' is none of {', '.join(ATTENTION_PATTERNS)}")
        if downsampler not in DOWNSAMPLERS:
            raise ValueError(f"downsampler '{downsampler}' is none of {', '.join(DOWNSAMPLERS)}")
        if pixel_head not in ("shared", "per_scale"):
            raise ValueError(f"pixel_head '{pixel_head}' is neither shared nor per_scale")
        grid_side = image_size // patch_size
        scales = powers_of_two(grid_side) if scales is None else list(scales)
        self.register_to_config(scales=scales)
        self.layout = ScaleLayout.checked(scales, grid_side)

        def transformer(num_layers: int, hidden_size: int, num_heads: int, drop_path_rate: float) -> Transformer:
            return Transformer(
                num_layers, hidden_size, num_heads, mlp_ratio, qkv_bias, mlp_bias, layer_norm_eps, drop_path_rate,
                attention_backend,
            )  # fmt: skip

        self.encoder = Encoder(
            in_channels, patch_size, grid_side, latent_channels, encoder_hidden_size,
            transformer(encoder_num_layers, encoder_hidden_size, encoder_num_heads, encoder_drop_path_rate),
        )  # fmt: skip
        self.decoder = Decoder(
            self.layout, attention_pattern, latent_channels, in_channels, patch_size, decoder_hidden_size,
            DOWNSAMPLERS[downsampler](decoder_hidden_size, scales, layer_norm_eps),
            transformer(decoder_num_layers, decoder_hidden_size, decoder_num_heads, decoder_drop_path_rate),
            pixel_heads=len(scales) if pixel_head == "per_scale" else 1,
        )  # fmt: skip
        self._initialize(initializer_range)

    def _initialize(self, std: float) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
                if depthwise:  # starts as an area pooling, whatever its size
                    nn.init.constant_(module.weight, 1 / module.weight[0].numel())
                else:
                    nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.encoder.moments.bias[self.config.latent_channels :], self.config.initial_log_variance)
        for table in (self.encoder.position, self.decoder.position, self.decoder.scale_embedding):
            nn.init.trunc_normal_(table, std=std)

    @apply_forward_hook
    def encode(self, images: Tensor, return_dict: bool = True, generator: Generator = None) -> Any:
        """The posterior over latents, `.latent_dist` over `(B, d, h, w)`, of images `(B, 3, H, W)` in [-1, 1].

        `generator` draws the encoder's drop path while training; the posterior's own noise is drawn by its `sample`.

        Raises:
            ValueError: images of another size than the model's.
        """
        side = self.config.image_size
        if images.shape[1:] != (self.config.in_channels, side, side):
            raise ValueError(
                f"images must be (B, {self.config.in_channels}, {side}, {side}), got {tuple(images.shape)}"
            )
        posterior = DiagonalGaussianDistribution(self.encoder(images, generator))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self,
        latents: Tensor,
        return_dict: bool = True,
        max_scale: int | None = None,
        generator: Generator = None,
    ) -> Any:
        """The image of every scale, from latents `(B, d, h, w)` as `encode` gives them (not normalised).

        With `max_scale` only the scales up to that side are computed; under scale-causal and scale-independent
        attention they are the same images that the full decode paints.

        Raises:
            ValueError: latents of another shape, no such scale, or `max_scale` under full attention, where coarse
                images depend on the finer tokens.
        """
        side = self.layout.sides[-1]
        if latents.shape[1:] != (self.config.latent_channels, side, side):
            expected = f"(B, {self.config.latent_channels}, {side}, {side})"
            raise ValueError(f"latents must be {expected} for this model, got {tuple(latents.shape)}")
        if self.config.attention_pattern == "full" and max_scale not in (None, side):
            raise ValueError(
                "max_scale needs scale_causal or scale_independent attention: under full attention coarse images "
                "depend on finer tokens; decode all scales and take .scales"
            )
        scales = self.decoder(latents, max_scale, generator)
        return HieraTokDecoderOutput(sample=scales[-1], scales=scales) if return_dict else (scales[-1],)

    def forward(self, images: Tensor, sample_posterior: bool = True, generator: Generator = None) -> HieraTokOutput:
        """Reconstruct images `(B, 3, H, W)` in [-1, 1] at every scale.

        Args:
            images: the batch.
            sample_posterior: decode a sample of the posterior (training) or its mode.
            generator: one `torch.Generator`, or a list of B of them, which makes a sample's noise and drop path
                independent of the batch that it is in.
        """
        posterior = self.encode(images, generator=generator).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        decoded = self.decode(latents, generator=generator)
        return HieraTokOutput(sample=decoded.sample, scales=decoded.scales, posterior=posterior, latents=latents)


# Saved pipelines name a class by its module; the package's own name outlives any move of this file.
HieraTok.__module__ = "hieratok"


def powers_of_two(grid_side: int) -> list[int]:
    """`[1, 2, 4, ..., grid_side]`: the default scales.

    Raises:
        ValueError: the side is no power of two; `scales` must then be given.
    """
    if grid_side < 1 or grid_side & (grid_side - 1):
        raise ValueError(f"the latent's side {grid_side} is no power of two; give scales that end in it")
    return [2**i for i in range(grid_side.bit_length())]
