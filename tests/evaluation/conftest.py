"""What tests of several processes share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run_two_processes(tmp_path: Path) -> Callable[..., list[Any]]:
    """What two processes of a run of `script`, given `arguments` and a folder, leave there in `rank0.json` and
    `rank1.json`."""

    def run(script: str, *arguments: Path) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-c", script, *map(str, arguments), str(tmp_path)]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        root = str(Path(__file__).parents[2])
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": root},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            for process in processes:
                printed, _ = process.communicate(timeout=120)
                assert process.returncode == 0, printed
        finally:
            for process in processes:
                process.kill()
        return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    return run
