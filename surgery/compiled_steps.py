"""Decode steps under torch.compile where that takes less time in all: two steps of each kind are measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

_log = logging.getLogger(__name__)

SECONDS_PER_LAYER = 3.0
"""What compiling the step of a decoder layer is expected to take. SmolLM2-135M on one core: 100 s for 30 layers."""
SAVED = 0.4
"""Part of a step that compiling is expected to save. There: 0.19 s became 0.11 s."""
WARM = 4
"""Steps before compiled ones are at their speed: the first is compiled, and a GPU records its graph in later ones."""


class _Watch(StoppingCriteria):
    """Measures two steps, then ends the generation if `stop` says so, which is told what one of them took.

    Args:
        skip: steps before those.
    """

    def __init__(self, skip: int, stop: Callable[[float], bool]) -> None:
        self.skip, self.stop = skip, stop
        self.begun = time.perf_counter()
        self.times: list[float] = []
        self.stopped = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if len(self.times) < self.skip + 3:
            if input_ids.is_cuda:
                torch.cuda.synchronize(input_ids.device)
            self.times.append(time.perf_counter())
            if len(self.times) == self.skip + 3:
                self.stopped = self.stop(self.step)
        return torch.full(input_ids.shape[:1], self.stopped, device=input_ids.device)

    @property
    def first(self) -> float:
        """Seconds until the first token."""
        return self.times[0] - self.begun

    @property
    def step(self) -> float:
        """Seconds of each of the two steps."""
        return (self.times[-1] - self.times[-3]) / 2


def generate_ids(
    model: PreTrainedModel, input_ids_BT: Tensor, *, tokens: int, seed: int, compiled: bool | None, **options: Any
) -> Tensor:
    """`model.generate`, [B, T + tokens] or less where all sequences end before.

    Args:
        seed: of the tokens that are drawn; the same with and without compiled steps.
        compiled: None lets measured steps decide. Compiled ones read a static cache.
    """

    def run(watch: _Watch | None = None, **more: Any) -> Tensor:
        torch.manual_seed(seed)
        criteria = StoppingCriteriaList([] if watch is None else [watch])
        found: Tensor = model.generate(  # type: ignore[operator]
            input_ids=input_ids_BT, max_new_tokens=tokens, stopping_criteria=criteria, return_dict_in_generate=False,
            **options, **more,
        )  # fmt: skip
        return found

    def run_compiled(watch: _Watch | None = None) -> Tensor:
        config = CompileConfig()
        # Unless told so, transformers compiles on a GPU alone.
        config._compile_all_devices = True  # type: ignore[assignment]
        vars(model).pop("_compiled_call", None)  # in a copy of a model it is that of the model itself
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):  # hooks may have come, or gone
            return run(watch, cache_implementation="static", compile_config=config)

    if compiled is not None:
        return run_compiled() if compiled else run()

    def pays(step: float) -> bool:
        layers = int(getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 1))
        return SAVED * step * tokens > SECONDS_PER_LAYER * layers + plain.first

    plain = _Watch(0, pays)
    found = run(plain)
    if not plain.stopped:
        return found
    _log.info("a step takes %.0f ms, and %d are to come: compiling it", 1e3 * plain.step, tokens)
    fast = _Watch(WARM, lambda step: step >= plain.step)
    try:
        found = run_compiled(fast)
    except Exception as error:  # no compiler, or a model whose steps cannot be compiled: the text is what was asked for
        _log.warning("the step cannot be compiled, going on without (%s: %s)", type(error).__name__, _line(error))
        return run()
    if fast.stopped:
        _log.info("compiled steps are no faster: going on without")
        return run()
    if len(fast.times) == WARM + 3:
        _log.info("a compiled step takes %.0f ms", 1e3 * fast.step)
    return found


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
