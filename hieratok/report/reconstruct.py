"""Images of a person's own, beside their reconstruction at every scale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..data.decode import BadImage, decode_image, to_float, to_uint8
from ..data.frame import Frame, crop_image
from ..engine.pictures import reconstruction_grid, save_picture, to_array
from ..engine.run_folder import load_tokenizer
from ..errors import DataError, NonFiniteError
from ..models.tokenizer import HieraTok
from .gallery import psnr

AT_ONCE = 16  # images


def reconstruct(
    images: Sequence[str | Path],
    model: HieraTok | str | Path,
    output: str | Path = "reconstructions.png",
    *,
    separate: str | Path | None = None,
    device: str | None = None,
    frame: Frame | None = None,
) -> tuple[Path, dict[str, float]]:
    """Draw images, their reconstruction at every scale and the error, a row per image.

    Args:
        images: files of any size; they are cropped to the model's square.
        model: a tokenizer, or a path that `load_tokenizer` takes.
        output: the picture, a PNG.
        separate: a folder that also gets every finest reconstruction as `NAME.png`.
        device: where to compute; None is where the model is.
        frame: how images are cropped; None is the centre.

    Returns:
        The picture's path, and per image file the PSNR in dB of its uint8 reconstruction (infinite when equal).

    Raises:
        DataError: a file is not an image; all such files are named.
        NonFiniteError: the model paints NaN or infinite pixels.
        CheckpointError: there is no model at the path.
    """
    tokenizer = load_tokenizer(model) if isinstance(model, (str, Path)) else model.eval()
    frame = frame or Frame(int(tokenizer.config.image_size))
    originals, wrong = [], []
    for image in map(Path, images):
        try:
            decoded = decode_image(image.read_bytes(), frame.decode_side, frame.max_pixels, frame.background)
            originals.append(torch.from_numpy(crop_image(decoded, frame, None)).permute(2, 0, 1))
        except OSError as error:
            wrong.append(f"{image}: {error.strerror}")
        except BadImage as error:
            wrong.append(f"{image}: {error}")
    if wrong:
        raise DataError("these files cannot be used:\n  " + "\n  ".join(wrong))
    pixels = torch.stack(originals)
    if device is not None:
        tokenizer.to(torch.device(device))  # type: ignore[arg-type]
    parts = [paint(tokenizer, part) for part in pixels.split(AT_ONCE)]
    scales = [torch.cat(scale) for scale in zip(*parts, strict=True)]
    path = save_picture(reconstruction_grid(pixels, scales, tokenizer.config.scales), Path(output))
    if separate is not None:
        from PIL import Image

        taken: Counter[str] = Counter()
        for image, reconstruction in zip(map(Path, images), scales[-1], strict=True):
            taken[image.stem] += 1
            name = image.stem if taken[image.stem] == 1 else f"{image.stem}-{taken[image.stem]}"
            save_picture(Image.fromarray(to_array(reconstruction)), Path(separate) / f"{name}.png")
    errors = (pixels.double() - scales[-1].double()).square().mean(dim=(1, 2, 3)).tolist()
    return path, {str(image): psnr(error / 255**2) for image, error in zip(images, errors, strict=True)}


@torch.no_grad()
def paint(model: HieraTok, images: Tensor) -> list[Tensor]:
    """uint8 images of every scale, on the CPU, of uint8 images `(B, 3, S, S)`."""
    scales = model(to_float(images.to(model.device)), sample_posterior=False).scales
    if not all(torch.isfinite(scale).all() for scale in scales):
        raise NonFiniteError("the model paints NaN or infinite pixels; use an earlier checkpoint")
    return [to_uint8(scale).cpu() for scale in scales]
