"""Run folders of generators as a training writes them, out of a few numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from hieratok.engine.pictures import sample_grid, save_picture

CLASSES = ["animals", "flags", "food"]
MakeRun = Callable[..., Path]


@pytest.fixture
def shade() -> Callable[[int, int, int], int]:
    """The grey of a sample in the picture of a step, by its row and column."""
    return lambda step, row, column: (step // 100 * 40 + row * 10 + column) % 256


@pytest.fixture
def make_generator_run(tmp_path: Path, shade: Callable[[int, int, int], int]) -> MakeRun:
    """Writes the folder of a finished generator: `curve` maps steps to gFID, `pictures` are the steps drawn."""

    def make(
        name: str = "generator",
        curve: Mapping[int, float] | None = None,
        *,
        key: str = "gfid_mini",
        pictures: Sequence[int] = (),
        tokenizer: str = "multi",
        config: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
        finished: bool = True,
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        curve = curve or {100: 80.0, 200: 40.0, 300: 20.0}
        values = {
            "model": {"preset": "dit-tiny"}, "tokenizer": f"runs/{tokenizer}", "seed": 0, "output": str(folder),
            "loss": {"objective": "ddpm", "class_dropout": 0.1}, "train": {"steps": max(curve), "max_minutes": None},
            "sampling": {"num_inference_steps": 2},
            **(config or {}),
        }  # fmt: skip
        run = {
            "kind": "generator", "config": values, "command": "hieratok train generator", "parameters": 5_123_456,
            "started": "2025-11-24T22:48:11+00:00", "seed": 0, "versions": {"hieratok": "0.1.0"}, "world_size": 1,
            "device": "CPU with 2 threads", "classes": CLASSES,
            "dit": {"sample_size": 4, "in_channels": len(tokenizer), "num_layers": 6, "hidden_size": 256},
            "tokenizer": {"class": "HieraTok", "path": f"runs/{tokenizer}", "sha256": f"{tokenizer:0<64}"},
            "data": {"name": "openmoji", "digest": tokenizer, "num_train": 3886,
                     "licence": "by OpenMoji, CC BY-SA 4.0"},
        }  # fmt: skip
        (folder / "run.json").write_text(json.dumps(run))
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        lines: list[dict[str, Any]] = []
        for step in range(10, max(curve) + 1, 10):
            passed = {"step": step, "samples_seen": 8 * step, "elapsed": 0.5 * step}
            lines.append({"kind": "train", **passed, "loss": 1 + 9 / step, "mse": 1 + 8 / step, "vlb": 1 / step})
            if step in curve:
                lines.append({"kind": "eval", **passed, **figures(key, curve[step])})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if finished:
            final = figures(key, curve[max(curve)])
            halves = f"real_halves{key.removeprefix('gfid')}"
            evaluation = {
                "metrics": {**final, halves: 5.9}, "counts": {key: [2000, 3886], halves: [1943, 1943]},
                "protocol": protocol(folder, {"tokenizer_sha256": tokenizer, **(sampling or {})}),
                "warnings": ["few samples"],
            }  # fmt: skip
            (folder / "eval.json").write_text(json.dumps(evaluation))
        for step in pictures:
            shades = [shade(step, row, column) for row in range(len(CLASSES)) for column in range(2)]
            images = torch.tensor(shades, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
            save_picture(sample_grid(images, 2, CLASSES), folder / "pictures" / f"step-{step:08}.png")
        return folder

    return make


def figures(key: str, gfid: float) -> dict[str, float]:
    """What an evaluation finds."""
    network = key.removeprefix("gfid")
    return {key: gfid, f"sfid{network}": 2 * gfid, f"inception_score{network}": 400 / gfid,
            f"inception_score_std{network}": 0.07, f"precision{network}": 0.612, f"recall{network}": 0.345}  # fmt: skip


def protocol(folder: Path, sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "features": "mini", "features_sha256": "c0ffee42", "image_size": 32, "resize": "none", "num_samples": 2000,
        "samples": str(folder), "samples_digest": folder.name, "reference": "openmoji", "reference_digest": "dd",
        "reference_images": 3886, "reference_resize": "centre crop", "neighbours": 3, "neighbour_images": 1999,
        "split_size": 200, "seed": 0, "hieratok_version": "0.1.0",
        "sampling": {"scheduler": "ddpm", "num_inference_steps": 250, "guidance_scale": 1.0,
                     "guidance_interval": [0.0, 1.0], "labels": "balanced", "seed": 0, **sampling},
    }  # fmt: skip


@pytest.fixture
def images() -> torch.Tensor:
    """uint8 `(2, 3, 32, 32)`."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
