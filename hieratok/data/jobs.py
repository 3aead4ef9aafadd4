"""Folders that a job fills with shards, and that an interrupted job goes on with.

`job.json` says what the job is and is written first, `manifest.json` says that all shards are there and comes last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import write_atomically

JOB, MANIFEST = "job.json", "manifest.json"
UNFINISHED = (f".{JOB}.*.tmp", f".{MANIFEST}.*.tmp")  # what a broken write leaves


def claim_folder(output: Path, job: Mapping[str, Any], kind: str, unfinished_shards: str) -> None:
    """Claim a new folder for a job, or check that it is this job's; leftovers of broken writes are removed.

    Args:
        output: a folder that is new, empty, or this job's.
        job: what `job.json` says; every field of it makes another job.
        kind: what the folder holds, in the words of a message: "an encoding".
        unfinished_shards: a pattern of files that a broken write of a shard leaves.

    Raises:
        ConfigError: the folder holds something else, or another job.
    """
    output.mkdir(parents=True, exist_ok=True)
    if (output / JOB).is_file():
        try:
            known = json.loads((output / JOB).read_text())
        except ValueError as error:
            raise ConfigError(f"{output / JOB} is damaged ({error}); give another output folder") from error
        # Through JSON, as the file was: tuples are lists there.
        differing = [key for key, value in json.loads(json.dumps(job)).items() if known.get(key) != value]
        if differing:
            raise ConfigError(
                f"{output} holds {kind} with another {', '.join(differing)}; give another output folder, "
                f"or delete this one"
            )
    elif set(output.iterdir()) - set(output.glob(UNFINISHED[0])):
        raise ConfigError(f"{output} is not empty and does not hold {kind}; give a new output folder")
    else:
        write_atomically(output / JOB, (json.dumps(job, indent=2) + "\n").encode())
    for pattern in (*UNFINISHED, unfinished_shards):
        for leftover in output.glob(pattern):
            leftover.unlink()
