"""Models from folders that a person may have been given: tensors only, and all of them."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError


class SafeLoading:
    """A stricter `from_pretrained` for models of diffusers' kind; stands before `ModelMixin` among the bases."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load from a folder or hub id as diffusers does, but safetensors only, with every weight accounted for.

        Raises:
            CheckpointError: weights are missing or left over.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        model, info = super().from_pretrained(  # type: ignore[misc,attr-defined]
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
        if wrong:
            listed = "; ".join(f"{key.replace('_', ' ')}: {list(names)[:5]}" for key, names in wrong.items())
            raise CheckpointError(f"{pretrained_model_name_or_path} does not hold this model's weights: {listed}")
        return (model, info) if wants_info else model
