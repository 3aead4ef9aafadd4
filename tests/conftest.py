"""What every test may use: a tiny model and a small folder of real, colourful images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

TINY = {
    "image_size": 32, "patch_size": 8, "latent_channels": 4, "scales": [1, 2, 4],
    "encoder_num_layers": 1, "encoder_hidden_size": 32, "encoder_num_heads": 2,
    "decoder_num_layers": 2, "decoder_hidden_size": 32, "decoder_num_heads": 2,
}  # fmt: skip


@pytest.fixture
def tiny_fields() -> dict:
    return dict(TINY)


@pytest.fixture
def tiny_model():
    import torch

    from hieratok.models.tokenizer import HieraTok

    torch.manual_seed(0)
    return HieraTok(**TINY).eval()


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """24 images of 48 x 40 pixels in the class folders a, b and c; PNG and JPEG by turns."""
    from PIL import Image

    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:40, 0:48]
    for i in range(24):
        waves = [np.sin(rows * f + columns * g + p) for f, g, p in rng.uniform(0, 0.5, (3, 3))]
        pixels = (127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)
        folder = tmp_path / "images" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / (f"{i:02}.png" if i % 2 else f"{i:02}.jpg"))
    return tmp_path / "images"
