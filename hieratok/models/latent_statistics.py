"""Latents with zero mean and unit deviation: what a diffusion model expects, and how to undo it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class LatentStatistics:
    """Normalisation by the `latents_mean` and `latents_std` (d numbers each) in a model's config."""

    config: Any

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Latents `(B, d, h, w)` with zero mean and unit deviation per channel, by the statistics in the config."""
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize_latents`: what a tokenizer's `decode` expects."""
        mean, std = self._latent_statistics(latents)
        return latents * std + mean

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.latents_mean is None or self.config.latents_std is None:
            raise ValueError("this model has no latents_mean and latents_std; training stores them at its end")
        mean, std = (
            latents.new_tensor(v).view(1, -1, 1, 1) for v in (self.config.latents_mean, self.config.latents_std)
        )
        return mean, std
