"""From class labels to images, as a pipeline of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ..config import suggest
from ..data.decode import to_uint8
from ..errors import ConfigError, NonFiniteError
from ..losses.diffusion import NUM_TIMESTEPS
from ..models.autoencoder import decode_scales
from ..models.dit import DiT

OUTPUT_TYPES = ("pil", "uint8", "pt", "np", "latent")

Images = Tensor | list[Image.Image] | Any  # Any: numpy arrays


@dataclass
class HieraTokPipelineOutput(BaseOutput):
    """`images`: as `output_type` says. `scales`: the same for every scale, coarse to fine; None unless asked for."""

    images: Any
    scales: list[Any] | None = None


class HieraTokPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Class labels to images by a DiT on a tokenizer's latents.

    Unlike diffusers' `DiTPipeline` it guides all latent channels, knows its own classes, undoes the normalisation by
    the statistics in the transformer's config, and can give the image of every scale. With a tokenizer-wide scalar
    normalisation (`normalization=scalar`) its folder opens in `DiTPipeline` too.
    """

    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]

    transformer: DiT
    vae: Any
    scheduler: Any

    if TYPE_CHECKING:
        config: Any  # a FrozenDict whose keys are attributes

    def __init__(
        self, transformer: DiT, vae: Any, scheduler: Any, id2label: dict[str | int, str] | None = None
    ) -> None:
        """`id2label`: names of the classes by their number."""
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        # Through JSON the keys become strings; they are strings from the beginning, so that both look alike.
        self.register_to_config(id2label={str(key): name for key, name in (id2label or {}).items()})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers', but safetensors only."""
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

    @property
    def num_classes(self) -> int:
        return self.transformer.num_classes

    @property
    def class_names(self) -> list[str]:
        """By number; a class without a name is called by its number."""
        return [self.config.id2label.get(str(i), str(i)) for i in range(self.num_classes)]

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the token maps that images are painted from, coarse to fine; one for a tokenizer of one scale."""
        layout = getattr(self.vae, "layout", None)
        return layout.sides if layout is not None else (int(self.transformer.config.sample_size),)

    def class_ids(self, class_labels: Sequence[int | str]) -> list[int]:
        """Labels by number from numbers or names.

        Raises:
            ConfigError: no such class.
        """
        names = self.class_names
        numbers = {name: i for i, name in reversed(list(enumerate(names)))}
        ids = []
        for label in class_labels:
            number = numbers.get(label) if isinstance(label, str) else int(label)
            if number is None and isinstance(label, str) and label.isdecimal():
                number = int(label)
            if number is None:
                raise ConfigError(f"no class '{label}'{suggest(str(label), names)}")
            if not 0 <= number < self.num_classes:
                raise ConfigError(f"no class {label}; this model has the classes 0 to {self.num_classes - 1}")
            ids.append(number)
        return ids

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str,
        guidance_scale: float = 4.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_scales: bool = False,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generate one image per label.

        Args:
            class_labels: numbers or names.
            guidance_scale: 1 is none; the paper's pictures have 4.2, its figures 1.
            num_inference_steps: of the scheduler; fewer are quicker, more are truer to the model.
            generator: one, or one per image, which makes an image independent of those beside it.
            output_scales: also give the image of every scale.
            guidance_interval: the times, 0 (clean) to 1 (noise), between which guidance acts (Kynkaanniemi et al.
                2024); outside it costs nothing.
            output_type: `pil`, `uint8` `(B, 3, H, W)`, `pt` the same as floats in [0, 1], `np` `(B, H, W, 3)` in
                [0, 1], or `latent` `(B, d, h, w)` as the tokenizer has them.
            return_dict: False gives a tuple.

        Raises:
            ConfigError: no such class or output type, or another number of generators than of labels.
            NonFiniteError: the model gives NaN or infinite latents.
        """
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(f"output_type '{output_type}'{suggest(output_type, OUTPUT_TYPES)}")
        one = isinstance(class_labels, (int, str))
        ids = self.class_ids([class_labels] if one else class_labels)  # type: ignore[list-item,arg-type]
        if isinstance(generator, list) and len(generator) != len(ids):
            raise ConfigError(f"{len(generator)} generators for {len(ids)} class_labels; give one per image, or one")
        labels = torch.tensor(ids, device=self._execution_device)
        latents = self.sample(labels, guidance_scale, num_inference_steps, generator, guidance_interval)
        latents = self.transformer.denormalize_latents(latents)
        if not torch.isfinite(latents).all():
            raise NonFiniteError("the generator gives NaN or infinite latents; use fp32, more steps or less guidance")
        if output_type == "latent":
            output = HieraTokPipelineOutput(images=latents)
        else:
            scales = [converted(image, output_type) for image in decode_scales(self.vae, latents)]
            output = HieraTokPipelineOutput(images=scales[-1], scales=scales if output_scales else None)
        self.maybe_free_model_hooks()
        return output if return_dict else (output.images, output.scales)

    def sample(
        self,
        labels: Tensor,
        guidance_scale: float,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        guidance_interval: Sequence[float] = (0.0, 1.0),
    ) -> Tensor:
        """Normalised latents `(B, d, h, w)` float32 of labels `(B,)`: noise, denoised step by step."""
        config = self.transformer.config
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        self.scheduler.set_timesteps(num_inference_steps, device=labels.device)
        latents = randn_tensor(shape, generator=generator, device=labels.device, dtype=torch.float32)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        noise_of_step = {"generator": generator} if takes_generator else {}
        keeps_variance = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        low, high = guidance_interval
        for time in self.progress_bar(self.scheduler.timesteps):
            guided = guidance_scale != 1 and low <= float(time) / NUM_TIMESTEPS <= high
            prediction = self.predict(latents, time, labels, guidance_scale if guided else 1.0)
            if not keeps_variance:
                prediction = prediction[:, : config.in_channels]
            latents = self.scheduler.step(prediction, time, latents, **noise_of_step).prev_sample
        return latents

    def predict(self, latents: Tensor, time: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
        """The transformer's answer in float32, guided away from that without a class on all latent channels.

        The variance, where there is one, stays that of the class.
        """
        inputs = self.scheduler.scale_model_input(latents, time) if self._scales_input else latents
        inputs, times = inputs.to(self.transformer.dtype), time.expand(len(latents))
        if guidance_scale == 1:
            return self.transformer(inputs, times, labels).sample.float()
        none = torch.full_like(labels, self.num_classes)
        both = self.transformer(torch.cat([inputs] * 2), torch.cat([times] * 2), torch.cat([labels, none])).sample
        by_class, by_none = both.float().chunk(2)
        channels = latents.shape[1]
        guided = by_none + guidance_scale * (by_class - by_none)
        return torch.cat([guided[:, :channels], by_class[:, channels:]], dim=1)

    @property
    def _scales_input(self) -> bool:
        return hasattr(self.scheduler, "scale_model_input")


def converted(images: Tensor, output_type: str) -> Any:
    """Images `(B, 3, H, W)` in about [-1, 1] as an output type; see `HieraTokPipeline.__call__`."""
    if output_type in ("pt", "np"):
        floats = (images.float() / 2 + 0.5).clamp(0, 1)
        return floats if output_type == "pt" else floats.cpu().permute(0, 2, 3, 1).numpy()
    pixels = to_uint8(images)
    if output_type == "uint8":
        return pixels
    return [Image.fromarray(image.numpy()) for image in pixels.cpu().permute(0, 2, 3, 1).contiguous()]


# Saved pipelines name a class by its module; the package's own name outlives any move of this file.
HieraTokPipeline.__module__ = "hieratok"
