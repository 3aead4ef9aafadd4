"""One pass over a set of images, by one process or by several that share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.bad import too_many
from ..data.loader import Batch
from ..data.source import ImageSource
from ..errors import DataError, HieratokError
from .frechet import GaussianSums

if TYPE_CHECKING:
    from accelerate import Accelerator


def rank_of(accelerator: Accelerator | None) -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)


def walk(
    batches: Iterable[Batch],
    step: Callable[[Batch], None],
    *,
    total: int,
    title: str,
    progress: bool,
    accelerator: Accelerator | None,
) -> None:
    """Hand this process's batches to `step`, without gradients and with exact convolutions, under a bar.

    Args:
        total: the images of all processes.
        title: of the bar.

    Raises:
        HieratokError: another process failed, and its message says why.
        Exception: whatever `step` and `batches` raise, once all processes have come here.
    """
    rank, world_size = rank_of(accelerator)
    bar = tqdm(total=total, desc=title, unit="image", disable=not progress or rank != 0)
    failure: Exception | None = None
    # TF32, which cuDNN uses unasked, has 10 bits where fp32 has 23.
    cudnn = torch.backends.cudnn
    exact = cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    )
    try:
        with torch.no_grad(), exact:
            for batch in batches:
                step(batch)
                bar.update(min(len(batch.indices) * world_size, total - bar.n))
    except Exception as error:
        if world_size == 1:
            raise
        failure = error  # the other processes wait for our sums
    finally:
        bar.close()
    if accelerator is not None and world_size > 1:
        failed = add_up(accelerator, torch.tensor(float(failure is not None)))
        if failure is not None:
            raise failure
        if float(failed):
            raise HieratokError("the evaluation failed in another process, whose message says why")


def check_evaluated(source: ImageSource, evaluated: int, max_bad_fraction: float) -> None:
    """Compare how many images all processes evaluated with how many there are.

    Raises:
        DataError: too many were bad, or none was good.
    """
    bad = len(source) - evaluated
    if bad > math.floor(len(source) * max_bad_fraction):
        raise too_many(bad, len(source), max_bad_fraction)
    if evaluated == 0:
        raise DataError(f"{source.name} holds no image that could be evaluated")


def add_up(accelerator: Accelerator, sums: Tensor) -> Tensor:
    """The sum of all processes' tensors."""
    return accelerator.reduce(sums.to(accelerator.device), reduction="sum").to(sums.device)  # type: ignore[union-attr]


def add_up_gaussian(accelerator: Accelerator, sums: GaussianSums) -> None:
    """Make `sums` those of all processes."""
    sums.count = int(add_up(accelerator, torch.tensor(sums.count)))
    sums.sum, sums.outer = add_up(accelerator, sums.sum), add_up(accelerator, sums.outer)


def gather_rows(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """`(N, ...)`: the rows of all processes, one behind the other; each may have another number of them."""
    count = torch.tensor([len(rows)], device=accelerator.device)
    counts = accelerator.gather(count).tolist()  # type: ignore[union-attr]
    most = max(*counts, 1)
    padded = rows.new_zeros((most, *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = accelerator.gather(padded.to(accelerator.device)).to(rows.device)  # type: ignore[union-attr]
    return torch.cat([part[:n] for part, n in zip(gathered.split(most), counts, strict=True)])
