"""A training run's clock, guards and records; what a step computes stays with the training that uses it."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..data.bad import BadSample, BadSamples
from ..data.source import ImageSource
from ..errors import CheckpointError, ConfigError, NonFiniteError
from ..files import write_atomically
from ..models.presets import plain_config
from . import checkpoint
from .guards import SignalGuard, Stopped, refuse_non_finite
from .learner import MAIN, Learner
from .log import Progress, RunLog, say
from .optimizers import make_optimizers
from .run_folder import CHECKPOINTS, EVALUATION
from .settings import TrainConfig

MOST_OVERFLOWS = 30  # in a row: halving fp16's loss scale that often leaves nothing of it
B = TypeVar("B")
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(config: TrainConfig, seed: int) -> Accelerator:
    """The processes and the device of this run, with every random number generator seeded.

    Mixed precision stays with `Engine.autocast`: accelerate's wrapper rebuilds the model's output from a mapping,
    which dataclasses with required fields do not survive.

    Raises:
        ConfigError: fp16 without a GPU.
    """
    # Without a GPU accelerate joins the processes of torchrun (by gloo) only when it is told to use the CPU.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("train.precision=fp16 needs a GPU; on a CPU use bf16 or fp32")
    set_seed(seed)
    return accelerator


class Samples(Protocol):
    """What the engine knows of a batch: the names of its samples, and those that could not be used."""

    @property
    def keys(self) -> list[str]: ...

    @property
    def bad(self) -> list[BadSample]: ...


class Judgement(Protocol):
    """What an evaluator finds."""

    @property
    def metrics(self) -> dict[str, float]: ...

    def to_dict(self) -> dict[str, Any]: ...


def make_engine(
    config: TrainConfig, folder: Path, accelerator: Accelerator, model: ModelMixin, num_samples: int, bad: BadSamples
) -> Engine:
    """The engine of a run on `num_samples` training samples, at step 0."""
    engine = Engine(
        config, folder, accelerator, model, make_optimizers(model, config),
        total_steps=config.total_steps(num_samples), model_config=plain_config(model), bad=bad,  # type: ignore[arg-type]
    )  # fmt: skip
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.compile:
        model.compile_repeated_blocks()
    return engine


def run_facts(seed: int, accelerator: Accelerator) -> dict[str, Any]:
    """What `run.json` says of any run beside its configuration and data."""
    device = describe_device(accelerator.device)
    return {"seed": seed, "world_size": accelerator.num_processes, "device": device}


def data_facts(images: ImageSource) -> dict[str, Any]:
    """What `run.json` says of the images."""
    return {"name": images.name, "digest": images.digest, "num_train": len(images), "licence": images.licence}


def describe_device(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU with {threads} thread{'s' if threads > 1 else ''}"
    return device.type


class Engine:
    """Counts steps, keeps the average, logs, checkpoints, and stops the run before harm is done.

    Used as a context, in which it logs; `signals`, another, notes the wish to stop. A training does, per step:
    `autocast` and `backward` for each micro-batch, `clip_gradients`, `optimizer_step`, `end_step`.

    Attributes:
        model: the bare network; `forward` is the one to call, which synchronises processes.
        learners: all networks that learn: `model`, and those that `add` brought, which help to train it.
        step: optimizer steps done.
        observers: called with a step and what was logged of it.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        accelerator: Accelerator,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        total_steps: int,
        model_config: Mapping[str, Any],
        bad: BadSamples,
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.model, self.bad = model, bad
        self.device = accelerator.device
        self.main = accelerator.is_main_process
        self.world_size = accelerator.num_processes
        self.total_steps = total_steps
        self.model_config = dict(model_config)
        main = Learner(MAIN, model, list(optimizers), config, accelerator, config.ema_decay)
        self.learners: dict[str, Learner] = {MAIN: main}
        self.forward, self.ema = main.forward, main.ema
        self.observers: list[Callable[[int, Mapping[str, float]], None]] = []
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.signals = SignalGuard()
        self.step = 0
        self.elapsed = 0.0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}  # of steps that a sum is over: not every term is in every step
        self._steps_summed = 0
        self._begun = time.monotonic()  # of the part of the run that this process does
        self._elapsed_before = 0.0
        self._logged_at = (0, 0.0)
        self._keys: dict[str, None] = {}  # of the samples of this step, in their order
        self._new_bad: list[Any] = []
        self._wrong_losses: dict[str, float] = {}  # those that were not finite
        self.log: RunLog | None = None
        self.progress_bar: Progress | None = None

    # Beginning and end

    def add(self, learner: Learner) -> Learner:
        """Let another network learn in this run; before `restore`."""
        self.learners[learner.name] = learner
        return learner

    def restore(self) -> None:
        """Go on from the newest whole checkpoint of the run's folder; all processes take the same one.

        Raises:
            CheckpointError: all checkpoints are damaged, or it is of another model.
        """
        newest, warnings = checkpoint.newest_valid(self.folder / CHECKPOINTS)
        for warning in warnings:
            say(f"damaged checkpoint left out: {warning}", main=self.main)
        steps = gather_object([newest.step if newest else 0])
        if len(set(steps)) > 1:
            raise CheckpointError(f"the processes found different newest checkpoints ({steps}); they must share a disk")
        if newest is None:
            say(f"no checkpoint in {self.folder} yet; beginning at step 0", main=self.main)
            return
        try:
            for learner in self.learners.values():
                learner.restore(newest.tensors, newest.state, self.device)
            torch.set_rng_state(newest.tensors["rng"]["cpu"])
            self.step = int(newest.state["step"])
            self.elapsed = self._elapsed_before = float(newest.state["elapsed"])
            self._sums = {k: torch.tensor(v, device=self.device) for k, v in newest.state["sums"].items()}
            self._counts = {k: float(v) for k, v in newest.state["counts"].items()}
            self._steps_summed = int(newest.state["steps_summed"])
            self.scaler.load_state_dict(newest.state["scaler"])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{newest.path} is not a checkpoint of this run: {error}") from error
        say(f"going on from {newest.path}", main=self.main)

    def __enter__(self) -> Engine:
        self.log = RunLog(self.folder, main=self.main, tensorboard=self.config.tensorboard, from_step=self.step)
        limit = self.config.max_minutes
        total = limit * 60 if limit else self.total_steps
        done = min(self.elapsed if limit else self.step, total)
        self.progress_bar = Progress(total, done, shown=self.main)
        self._begun = time.monotonic()
        self._logged_at = (self.step, self.elapsed)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.log is not None and self.progress_bar is not None
        self.progress_bar.close()
        self.log.close()

    @property
    def samples_seen(self) -> int:
        """The position in the stream of samples."""
        return self.step * self.config.batch_size

    @property
    def progress(self) -> float:
        """The part of the run that is done, by steps or by the clock, whichever is further."""
        return self.part_at(self.step, self.elapsed)

    def part_at(self, step: int, elapsed: float) -> float:
        """The part of the run that so many steps and seconds are."""
        limit = self.config.max_minutes
        by_clock = elapsed / (limit * 60) if limit else 0.0
        return max(step / self.total_steps, by_clock)

    @property
    def finished(self) -> bool:
        return self.progress >= 1

    def run(
        self, batches: Generator[B, None, None], step: Callable[[Iterator[B]], None], look: Callable[[], None]
    ) -> None:
        """Take steps until the end of the run, each followed by its bookkeeping and a `look` at what is due.

        Raises:
            Stopped: by a signal, after a checkpoint.
        """
        if self.step and not self.finished:  # what was due at this step may have been cut off
            look()
        with self.signals, contextlib.closing(batches):
            while not self.finished:
                step(batches)
                self.end_step()
                look()

    # One step

    def autocast(self) -> AbstractContextManager[Any]:
        """The configured precision."""
        dtype = AUTOCAST[self.config.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    @contextlib.contextmanager
    def synchronising(self, last: bool) -> Iterator[None]:
        """Processes exchange gradients only with the last micro-batch of a step."""
        with contextlib.ExitStack() as stack:
            for learner in self.learners.values():
                stack.enter_context(nullcontext() if last else self.accelerator.no_sync(learner.forward))
            yield

    def backward(self, loss: Tensor, terms: Mapping[str, Tensor], batch: Samples, name: str = "loss") -> None:
        """Add a micro-batch's gradients, and remember what it was; `name`: what the logs call the loss."""
        self._keys |= dict.fromkeys(batch.keys)
        self._new_bad += [b for b in batch.bad if b.index not in self.bad.seen and b not in self._new_bad]
        if not torch.isfinite(loss.detach()):
            self._wrong_losses[name] = float(loss.detach())
        for term, value in {name: loss.detach(), **terms}.items():
            self._count(term, value.float(), 1 / self.config.accumulation)
        self.scaler.scale(loss / self.config.accumulation).backward()

    def clip_gradients(self, *names: str) -> dict[str, Tensor]:
        """Scale gradients down to the `max_grad_norm` of their network; gives the norms before that.

        `names`: of which networks; without them, of all that have gradients in this step.
        """
        norms = {}
        for name, learner in self.learners.items():
            if learner.has_gradients and (not names or name in names):
                for optimizer in learner.optimizers:
                    self.scaler.unscale_(optimizer)
                limit = learner.schedule.max_grad_norm or math.inf
                norms[name] = nn.utils.clip_grad_norm_(learner.network.parameters(), limit)
        return norms

    def change_weights(self, grad_norms: Mapping[str, Tensor]) -> None:
        """A step of the networks in `grad_norms`, unless a number on any process forbids it.

        Raises:
            NonFiniteError: a loss or a gradient norm is not finite.
            DataError: too many images are bad.
        """
        norms = {name: float(norm) for name, norm in grad_norms.items()}
        # fp16's loss scale is found by overflowing now and then; such a step changes no weight.
        wrong = {name: norm for name, norm in norms.items() if not math.isfinite(norm)}
        for name in norms:
            learner = self.learners[name]
            learner.overflows = learner.overflows + 1 if name in wrong and self.scaler.is_enabled() else 0
        norm_is_fatal = any(not 0 < self.learners[name].overflows <= MOST_OVERFLOWS for name in wrong)
        worst = self._agree(float(bool(self._wrong_losses) or norm_is_fatal), len(self._new_bad))
        if worst[0]:
            facts: dict[str, Any] = {**(self._wrong_losses or {"loss": "finite"}),
                     **{label_of(name, "gradient norm"): norm for name, norm in norms.items()}}  # fmt: skip
            refuse_non_finite(self.folder, self.step + 1, self.accelerator.process_index, list(self._keys), facts)
        if worst[1]:
            self._record_bad()
        progress = max((self.step + 1) / self.total_steps, self.progress)
        for name, norm in norms.items():
            learner = self.learners[name]
            if learner.began is None:
                learner.began = (self.step, self.elapsed)
            learner.set_rate(progress, self.part_at(*learner.began))
            for optimizer in learner.optimizers:
                if name not in wrong:
                    self.scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            if name not in wrong:
                self._count(label_of(name, "grad_norm"), torch.tensor(norm, device=self.device), 1.0)
                if learner.ema is not None:
                    learner.ema.update(learner.network, self.step + 1)

    def optimizer_step(self, grad_norms: Mapping[str, Tensor]) -> None:
        """Change the weights of the networks in `grad_norms`, which ends a step.

        Raises:
            NonFiniteError, DataError: as `change_weights` does.
        """
        self.change_weights(grad_norms)
        self.scaler.update()
        self.step += 1
        self._steps_summed += 1
        self._keys, self._new_bad = {}, []

    def end_step(self) -> None:
        """Log and checkpoint where due; stop where asked to.

        Raises:
            Stopped: by a signal, after the checkpoint.
        """
        elapsed = self._elapsed_before + time.monotonic() - self._begun
        signal_number, self.elapsed = self._agree(float(self.signals.received), elapsed)
        # The mean of a few last steps would end every curve in a jump.
        enough = 2 * self._steps_summed >= self.config.log_every or self._steps_summed == self.step
        if self.step % self.config.log_every == 0 or (self.finished and enough):
            self._write_metrics()
        if self.step % self.config.checkpoint_every == 0 or self.finished or signal_number:
            self.save()
        if self.finished and self.progress_bar is not None:
            self.progress_bar.close(done=True)
        if signal_number:
            say(f"stopped by a signal after step {self.step}; go on with --resume", main=self.main)
            raise Stopped(128 + int(signal_number))

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return bool(every) and (self.step % every == 0 or self.finished)

    def averaged(self) -> AbstractContextManager[None]:
        """The model holds the EMA weights inside the block."""
        return nullcontext() if self.ema is None else self.ema.applied(self.model)

    def judge(self, evaluate: Callable[[], Judgement], *, final: bool = False) -> None:
        """Evaluate the EMA weights; log the metrics, and at the end keep them in `eval.json`."""
        with self.averaged():
            found = evaluate()
        if self.main and final:
            write_atomically(self.folder / EVALUATION, json.dumps(found.to_dict(), indent=1).encode())
        if self.main and self.log is not None:
            self.log.metrics("eval", self.step, {**found.metrics, "samples_seen": self.samples_seen,
                                                 "elapsed": round(self.elapsed, 3)})  # fmt: skip

    def warn(self, message: str) -> None:
        """Tell people, and the run's log."""
        say(f"warning: step {self.step}: {message}", main=self.main)
        if self.log is not None:
            where = {"samples_seen": self.samples_seen, "elapsed": round(self.elapsed, 3)}
            self.log.metrics("warning", self.step, {"message": message, **where})

    def save(self) -> None:
        """Write a checkpoint of this step; all processes wait for it.

        Raises:
            NonFiniteError: the weights are not finite; the older checkpoints stay the newest.
            CheckpointError: the disk is full or cannot be written.
        """
        tensors: dict[str, Mapping[str, Tensor]] = {"rng": {"cpu": torch.get_rng_state()}}
        for learner in self.learners.values():
            tensors |= learner.tensors()
        for part in tensors.values():
            for name, tensor in part.items():
                if not torch.isfinite(tensor).all():
                    raise NonFiniteError(f"step {self.step}: {name} is not finite; no checkpoint was written. Lower "
                                         f"train.learning_rate, then go on with --resume")  # fmt: skip
        names = sorted(self._sums)
        sums: Tensor | list[Tensor] = self.mean(torch.stack([self._sums[name] for name in names])) if names else []
        if self.main:
            state = {
                "step": self.step,
                "samples_seen": self.samples_seen,
                "elapsed": self.elapsed,
                "world_size": self.world_size,
                "model": self.model_config,
                "sums": {name: float(value) for name, value in zip(names, sums, strict=True)},
                "counts": self._counts,
                "steps_summed": self._steps_summed,
                "began": {name: learner.began for name, learner in self.learners.items()},
                "scaler": self.scaler.state_dict(),
            }
            checkpoint.save(self.folder / CHECKPOINTS, self.step, tensors, state, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _count(self, name: str, value: Tensor, share: float) -> None:
        """Add to the sum behind the mean that is logged of a term; `share`: of a step."""
        known = self._sums.get(name)
        self._sums[name] = value * share if known is None else known + value * share
        self._counts[name] = self._counts.get(name, 0.0) + share

    # Between processes

    def mean(self, value: Tensor) -> Tensor:
        """Over processes."""
        return self.accelerator.reduce(value, "mean")

    def _agree(self, *values: float) -> tuple[float, ...]:
        """The largest of each value over all processes."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float32, device=self.device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tuple(tensor.tolist())

    def _record_bad(self) -> None:
        for sample in self.bad.add(gather_object(self._new_bad), write=self.main):
            say(f"bad image replaced: {sample.key}: {sample.reason}", main=self.main)

    def _write_metrics(self) -> None:
        assert self.log is not None and self.progress_bar is not None
        names = sorted(self._sums)
        means = torch.stack([self._sums[name] / self._counts[name] for name in names])
        means = self.mean(means)
        values: dict[str, float] = dict(zip(names, means.tolist(), strict=True))
        self._sums, self._counts, self._steps_summed = {}, {}, 0
        step, elapsed = self._logged_at
        speed = (self.step - step) * self.config.batch_size / max(self.elapsed - elapsed, 1e-9)
        self._logged_at = (self.step, self.elapsed)
        rates = {label_of(name, "learning_rate"): learner.rate for name, learner in self.learners.items()
                 if learner.began is not None}  # fmt: skip
        self.log.metrics("train", self.step, {
            **values, **rates, "samples_seen": self.samples_seen, "bad_images": len(self.bad),
            "images_per_second": round(speed, 2), "elapsed": round(self.elapsed, 3),
        })  # fmt: skip
        done = self.elapsed if self.config.max_minutes else self.step
        total = self.progress_bar.bar.total or done
        shown = {"loss": f"{values['loss']:.4f}", "images/s": f"{speed:.0f}"}
        self.progress_bar.update(min(done, total), self.step, shown)
        for observe in self.observers:
            observe(self.step, values)


def label_of(network: str, quantity: str) -> str:
    """What the logs call a quantity of one of the networks; that of the main one needs no name."""
    return quantity if network == MAIN else f"{quantity}_{network}"
