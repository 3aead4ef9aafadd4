"""What every test may use: a tiny model and a small folder of real, colourful images."""

from __future__ import annotations

import multiprocessing
import runpy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


# What a launcher gives to each of two processes, on a CPU.
LAUNCHED = """
import os, sys, torch
sys.stderr = open(f"{log}-{rank}", "w")
torch.set_num_threads(1)
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port)}
"""


@pytest.fixture
def in_two_processes(tmp_path: Path) -> Callable[..., None]:
    """Run a script in two processes that work together, with `rank` and the names that are given in it.

    They are forked from a server that has imported the library once, so they start sooner than by a launcher.
    """

    def run(script: str, **names: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hieratok.training.tokenizer"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path = tmp_path / "both.py"
        path.write_text(LAUNCHED + script + "\ntorch.distributed.destroy_process_group()\n")
        names = {**names, "port": port, "log": str(tmp_path / "log")}
        processes = [
            context.Process(target=runpy.run_path, args=(str(path),), kwargs={"init_globals": {**names, "rank": rank}})
            for rank in (0, 1)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(timeout=200)
            logs = "\n".join(file.read_text() for file in sorted(tmp_path.glob("log-?")))
            assert [process.exitcode for process in processes] == [0, 0], logs
        finally:
            for process in processes:
                process.kill()

    return run
