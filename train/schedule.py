"""When what is trained, and how fast: stages, learning rates, and ramps of quantities that modules own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from surgery.recipe import Uptrain

LAYER_LOCAL: Literal["layer-local"] = "layer-local"
LOGITS: Literal["logits"] = "logits"
LOCAL_RATE = 3.0
"""Learning rate of the first stage, in units of the second's, where the recipe names none."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of optimizer steps with one loss and one learning-rate curve."""

    name: Literal["layer-local", "logits"]
    begin: int
    steps: int
    learning_rate: float
    """Peak."""

    @property
    def end(self) -> int:
        return self.begin + self.steps


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The stages of a run and the learning rate at every step."""

    stages: tuple[Stage, ...]
    shape: Literal["wsd", "cosine"]
    warmup: float
    decay: float

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1].end

    def stage(self, step: int) -> Stage:
        """The stage that optimizer step `step` (counted from 0) belongs to."""
        return next((stage for stage in self.stages if step < stage.end), self.stages[-1])

    def learning_rate(self, step: int) -> float:
        """Of optimizer step `step`, counted from 0."""
        stage = self.stage(step)
        done = step - stage.begin
        rising = round(self.warmup * stage.steps)
        if done < rising:
            return stage.learning_rate * (done + 1) / (rising + 1)
        if self.shape == "cosine":
            return stage.learning_rate * cosine(done - rising, stage.steps - rising)
        return stage.learning_rate * wsd(done, stage.steps, self.decay)


def wsd(step: int, steps: int, decay: float) -> float:
    """Constant, then 1 - sqrt over the last part `decay` of the steps (MiniCPM, arXiv:2404.06395; the form of
    arXiv:2405.18392)."""
    falling = round(decay * steps)
    past = step - (steps - falling)
    return 1.0 if past < 0 else max(0.0, 1.0 - math.sqrt((past + 1) / (falling + 1)))


def cosine(step: int, steps: int) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


def schedule(uptrain: Uptrain, sequence_length: int, hidden_size: int) -> Schedule:
    """The schedule of `uptrain`: layer-local first where it is asked for, then the logits."""
    steps = max(1, uptrain.tokens // (uptrain.batch * sequence_length))
    local = min(steps, round((uptrain.layer_local or 0.0) * steps))
    rate = uptrain.learning_rate or 0.06 / hidden_size
    stages = []
    if local:
        peak = uptrain.local_learning_rate or LOCAL_RATE * rate
        stages.append(Stage(name=LAYER_LOCAL, begin=0, steps=local, learning_rate=peak))
    if steps > local:
        stages.append(Stage(name=LOGITS, begin=local, steps=steps - local, learning_rate=rate))
    return Schedule(stages=tuple(stages), shape=uptrain.schedule, warmup=uptrain.warmup, decay=uptrain.decay)


@contextmanager
def own_rates(optimizer: Any, scheduler: Any) -> Iterator[None]:
    """Inside, the state of a checkpoint is loaded; rates and weight decay stay this run's, at the step of that state.

    torch loads those of the run that wrote it, which may be others (`--force`).

    Args:
        optimizer, scheduler: as made for this run; a `LambdaLR`. Either may be wrapped by accelerate.
    """
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    inner: LambdaLR = getattr(scheduler, "scheduler", scheduler)
    inner.base_lrs = [group["initial_lr"] for group in own]
    for group, options, factor in zip(optimizer.param_groups, own, inner.lr_lambdas, strict=True):
        group.update(options, lr=options["initial_lr"] * factor(inner.last_epoch))


@runtime_checkable
class Ramped(Protocol):
    """A module with a quantity that training raises or lowers: a compression ratio, a mix-in, a head's weight."""

    def set_ramp(self, progress: float) -> None:
        """Take the value for `progress`, 0 at the first step and 1 from the end of the ramp on."""


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A straight line over a part of the run."""

    begin: float = 0.0
    end: float = 0.95

    def progress(self, step: int, steps: int) -> float:
        """0 before `begin` of the run, 1 after `end`."""
        first, last = self.begin * steps, self.end * steps
        return min(1.0, max(0.0, (step - first) / max(1e-9, last - first)))


class RampCallback(TrainerCallback):
    """Tells every module that has `set_ramp` how far the run is, before each optimizer step.

    The progress depends on the step alone, so a resumed run goes on where it was.
    """

    def __init__(self, ramp: Ramp) -> None:
        self.ramp = ramp

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        progress = self.ramp.progress(state.global_step, state.max_steps)
        for module in model.modules():
            if isinstance(module, Ramped):
                module.set_ramp(progress)
