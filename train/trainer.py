"""Hugging Face's Trainer with our losses, our data, and checkpoints that appear complete or not at all."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from surgery.calibration.text import Windows
from surgery.checkpoints.companions import copy_companions
from surgery.console import progress
from surgery.errors import SurgeryError
from surgery.measure.gates import Counted, collapsed, count, gate_logits, gated
from surgery.recipe import Uptrain

from .checkpoints import CHECKPOINT, SAVING, checkpoints, clean, disk_errors, remove_checkpoints
from .data import PackedText
from .forcing import detach, forced_by
from .gates import budget_of, mean_alpha, shortfall, summed
from .losses import IGNORE, Distilled, Weights, distil, hidden_match
from .parent import Parent, head_input, head_of
from .parent_logits import KeptLogits
from .schedule import LAYER_LOCAL, Schedule, own_rates

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Score:
    """Means over held-out tokens, in nats; the KL at temperature 1, whatever that of the loss."""

    nats_per_token: float
    kl: float
    parent_nats_per_token: float
    ratio: float | None = None
    """Tokens per slot at the end of each sequence, over all gates; None where there is no gate."""


class NonFinite(SurgeryError):
    """Training met NaN or inf too often."""


class Uptrainer(Trainer):
    """Trains a converted model against its parent.

    Args:
        model: the converted model, or a peft model around it; what is trained requires a gradient.
        args: of Trainer; `max_steps` and the learning rate are the schedule's.
        text: this device's batches.
        parent: None where no loss asks for it.
        local: names of attention modules that the layer-local stage fits, and E|y|² of the parent's output in each.
        companions: folder whose tokenizer files go into every checkpoint.
        nonfinite_limit: so many optimizer steps with NaN or inf in loss or gradient end the run; each is left out.
        keep: checkpoints to keep.
        head: scale and soft cap of the logits (`read_head`).
        kept: where the parent's likeliest tokens are kept on disk.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        text: PackedText,
        schedule: Schedule,
        uptrain: Uptrain,
        parent: Parent | None,
        local: dict[str, float],
        companions: Path | None = None,
        nonfinite_limit: int = 3,
        keep: int = 2,
        head: tuple[float, float | None] = (1.0, None),
        kept: KeptLogits | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        with _same_use_cache(core(model).config):
            super().__init__(model=model, args=args, train_dataset=text, callbacks=callbacks)
        self.model_accepts_loss_kwargs = True  # makes Trainer count the predicted tokens of all devices
        self.text, self.schedule, self.uptrain, self.parent, self.local = text, schedule, uptrain, parent, local
        self.companions, self.nonfinite_limit, self.keep, self.head = companions, nonfinite_limit, keep, head
        self.kept = kept
        self.nonfinite = 0
        self.gates = gated(core(model))
        for gate in self.gates.values():
            gate.temperature = uptrain.gate_temperature
        self._told: set[str] = set()
        self._decided: Counted | None = None
        inside = {id(p) for name in local for p in core(model).get_submodule(name).parameters()}
        self._outside = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
        self.root = Path(str(args.output_dir))
        self._staging: Path | None = None
        self._sums: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._seconds, self._begun = 0.0, time.monotonic()
        self.remove_callback(PrinterCallback)

    def go(self, resume: Path | None) -> None:
        """Train from the start or from a checkpoint, to the end."""
        if resume is None:
            self.train()
            return
        state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
        self._seconds = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        if state.global_step < self.schedule.steps:
            self.train(resume_from_checkpoint=str(resume))
        else:  # Trainer would do one step more
            self._load_from_checkpoint(str(resume))
            self.state = state

    # What is read

    def get_train_dataloader(self) -> Any:
        """Batches in this process, not read ahead: the tokenizer is much faster than the model."""
        return torch.utils.data.DataLoader(self.text, batch_size=None)

    # What is minimised

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's. Hooks stay until the backward pass is over, which recomputes layers under checkpointing."""
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            self.remove_hooks()
        is_finite = torch.isfinite(loss)
        self._count(not_finite=~is_finite)  # also 0: every device adds up the same sums
        return loss if is_finite else torch.zeros_like(loss)  # Trainer's running mean would stay NaN for ever

    def remove_hooks(self) -> None:
        """Give the model's modules back as they were before `compute_loss`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro-batch: a sum over its tokens, divided by the tokens of the step on all devices."""
        labels = inputs["labels"]
        read = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        if self.schedule.stage(self.state.global_step).name == LAYER_LOCAL:
            error = self._layer_local(model, read)
            loss = error / (self.text.batch * self.text.length * len(self.local))
            self._count(layer_local=error.detach() / len(self.local), tokens=labels.numel())
        else:
            wants_parent = bool(self.uptrain.kl or self.uptrain.hidden)
            with gate_logits(core(self.accelerator.unwrap_model(model))) as logits:
                sums, extra = self._distilled(model, read, labels, self.parent if wants_parent else None)
            loss = (sums.total + extra) / num_items_in_batch
            if self.gates:
                loss = loss + self._gate_budget(model, logits, read)
            self._count(
                kl=sums.kl,
                nll=sums.nll,
                parent_nll=sums.parent_nll,
                hidden=extra.detach(),
                predicted=(labels != IGNORE).sum(),
            )
        if not torch.isfinite(loss):
            self._keep_batch(inputs)
        # DDP and FSDP average over devices; the divisor above is already that of all of them.
        return loss * self.accelerator.num_processes

    def _layer_local(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Sum over layers and tokens of the relative squared error of attention outputs, on the parent's own inputs.

        One forward pass: behind each attention the parent's runs on the same input, and its output is what the layer
        goes on with. So every layer reads what it would in the parent.
        """
        assert self.parent is not None
        inner = core(self.accelerator.unwrap_model(model))
        # FSDP gathers a layer's weights for the backward pass when a gradient arrives at the layer's output, so there
        # the errors must hang on the stream of hidden states; elsewhere backward through the MLPs is saved.
        connected = self.is_fsdp_enabled
        errors: list[Tensor] = []
        for name, scale in self.local.items():
            own, teacher = inner.get_submodule(name), self.parent.attention[name]
            self._hooks.append(own.register_forward_pre_hook(detach, with_kwargs=True))
            forced = forced_by(teacher, scale, errors, connected)
            self._hooks.append(own.register_forward_hook(forced, with_kwargs=True))
        with head_input(inner):
            logits = model(**inputs, use_cache=False).logits
        total = torch.stack(errors).sum()
        if connected:
            return total + 0.0 * logits.float().sum()
        # DDP waits for a gradient of everything that is trained; `_get_grad_norm` drops these again.
        return total + 0.0 * sum(p.flatten()[0].float() for p in self._outside)

    def _distilled(
        self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, parent: Parent | None
    ) -> tuple[Distilled, Tensor]:
        """The sums of `distil`, and the weighted sum of the hidden match."""
        inner = core(self.accelerator.unwrap_model(model))
        keep = self.kept if model.training else None
        kept = None if keep is None or parent is None else keep.read(inputs)
        parent_h, parent_head = None, None
        if parent is not None and kept is None:
            parent_h, parent_head = parent.last_hidden(inner, inputs)
            if keep is not None:
                kept = keep.write(inputs, parent_h, parent_head, labels)
        with head_input(inner) as seen:
            logits = model(**inputs, use_cache=False).logits
        h = seen[-1]
        weights = Weights(self.uptrain.kl, self.uptrain.ce, self.uptrain.temperature if model.training else 1.0)
        if kept is not None:
            parent_h, parent_head = None, None
        sums = distil(h, head_of(inner, *self.head), labels, parent_h, parent_head, weights, kept=kept)
        extra = h.new_zeros((), dtype=torch.float32)
        if self.uptrain.hidden and parent_h is not None:
            extra = self.uptrain.hidden * hidden_match(h, parent_h, labels)
        if self.is_fsdp_enabled:  # see _layer_local
            extra = extra + 0.0 * logits.float().sum()
        return sums, extra

    def _gate_budget(self, model: nn.Module, logits: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """This device's and micro-batch's part of the weighted shortfall of decisions."""
        counted = count(core(self.accelerator.unwrap_model(model)), logits, inputs)
        self._decided = Counted(*(part.detach() for part in counted))
        self._count_gates(self._decided)
        plain, options = core(self.accelerator.unwrap_model(model)), self.uptrain
        missing = shortfall(
            counted,
            budget_of(plain, self.text.length),
            options.gate_budget_per == "head",
            lambda x: self.accelerator.reduce(x, "sum"),
        )
        parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return (options.gate_budget * missing + options.gate_l1 * mean_alpha(plain, counted)) / parts

    def _count_gates(self, counted: Counted) -> None:
        self._count(
            gate_gone=counted.gone.sum(),
            gate_free=counted.free.sum(),
            gate_slots=counted.slots.sum(),
            gate_tokens=counted.tokens.sum(),
        )

    def _warn_of_collapse(self, counted: Counted) -> None:
        """Say once which gates let all tokens go, or none although they are asked to."""
        early = all(gate.target_ratio < 0.5 * (1 + gate.retain.ratio) for gate in self.gates.values())
        if early or self.state.global_step == 0:
            return
        heads = [gate.plan.decisions for gate in self.gates.values()]
        parts = zip(counted.gone.split(heads), counted.free.split(heads), strict=True)
        rates = [float(gone.sum() / free.sum().clamp_min(1)) for gone, free in parts]
        for text in collapsed(self.gates, rates):
            if text not in self._told:
                self._told.add(text)
                logger.warning("step %d: %s", self.state.global_step, text)

    @torch.no_grad()
    def score(self, windows: Windows, batch: int = 8) -> Score:
        """Held-out loss of the model as it is, and KL to the parent. Every device works through all of it."""
        model = self.model_wrapped
        was = model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        tokens = 0
        counts: list[Counted] = []
        shown = None if self.is_world_process_zero() else False
        with progress("scoring held-out text, windows", len(windows), shown, lines=shown is None) as advance:
            for ids, mask in windows.batches(batch):
                labels = ids.masked_fill(~mask, IGNORE).to(self.args.device)
                labels[:, 0] = IGNORE
                inputs = {"input_ids": ids.to(self.args.device)}
                plain = core(self.accelerator.unwrap_model(model))
                with gate_logits(plain) as logits:
                    found, _ = self._distilled(model, inputs, labels, self.parent)
                if logits:
                    counts.append(count(plain, logits, inputs, mask.to(self.args.device)))
                sums += torch.stack([found.nll, found.kl, found.parent_nll]).double().cpu()
                tokens += int((labels != IGNORE).sum())
                advance(len(ids))
        model.train(was)
        ratio = None
        if counts:
            counted = Counted(*(torch.stack(column).sum(0) for column in zip(*counts, strict=True)))
            self._warn_of_collapse(counted)
            ratio = float(counted.tokens.sum() / counted.slots.sum())
        return Score(nats_per_token=float(sums[0]) / tokens, kl=float(sums[1]) / tokens,
                     parent_nats_per_token=float(sums[2]) / tokens, ratio=ratio)  # fmt: skip

    # How fast

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's, without gates: their scale is what they say."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if ".gate." not in name]

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's; gates that learn beside other weights are a group of their own, with their own rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        gates = {id(p): p for name, p in trained.named_parameters() if ".gate." in name and p.requires_grad}
        if is_new and gates and self.uptrain.train != "gates":
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gates]
            rate = self.uptrain.gate_rate * self.args.learning_rate
            optimizer.add_param_group({"params": list(gates.values()), "lr": rate, "weight_decay": 0.0})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule's learning rates, as factors of the optimizer's."""
        if self.lr_scheduler is None:
            base = self.args.learning_rate
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(optimizer, lambda step: self.schedule.learning_rate(step) / base)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's, and the place where a step with NaN or inf in it is left out: the norm is the same everywhere."""
        if self.schedule.stage(self.state.global_step).name == LAYER_LOCAL:
            for parameter in self._outside:
                parameter.grad = None
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not math.isfinite(float(norm)):
            self.nonfinite += 1
            model.zero_grad(set_to_none=True)  # no gradient: the optimizer changes nothing
            step = self.state.global_step + 1
            logger.warning("step %d: loss or gradient is not finite; the step is left out", step)
            if self.nonfinite >= self.nonfinite_limit:
                raise NonFinite(
                    f"step {step}: loss or gradient is not finite, {self.nonfinite} times so far. Stopped. The batches "
                    f"of such a loss lie in {self.args.output_dir}. Lower the learning rate, or look at that text."
                )
        return norm

    def _keep_batch(self, inputs: dict[str, Tensor]) -> None:
        file = self.root / f"nonfinite-step-{self.state.global_step + 1}-{self.args.process_index}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({name: tensor.tolist() for name, tensor in inputs.items()}) + "\n")

    # What is told

    def _count(self, **sums: Any) -> None:
        for name, value in sums.items():
            value = torch.as_tensor(value, device=self.args.device).detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the parts of the loss per token since the last time; tokens instead of epochs."""
        names = sorted(self._sums)
        if names and "loss" in logs:
            values = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum")
            sums = dict(zip(names, values.tolist(), strict=True))
            if sums.get("tokens"):
                logs["layer_local"] = sums["layer_local"] / sums["tokens"]
            if sums.get("predicted"):
                logs["nll"] = sums["nll"] / sums["predicted"]
                if self.uptrain.kl or self.uptrain.hidden:
                    logs |= {name: sums[name] / sums["predicted"] for name in ("kl", "parent_nll")}
                if self.uptrain.hidden:
                    logs["hidden"] = sums["hidden"] / sums["predicted"]
            if sums.get("gate_free"):
                logs |= summed(sums)
                assert self._decided is not None
                self._warn_of_collapse(self._decided)
            if sums.get("not_finite"):
                logs["not_finite"] = sums["not_finite"]
            self._sums.clear()
        logs["seconds"] = round(self._seconds + time.monotonic() - self._begun, 2)
        logs["tokens"] = self.state.global_step * self.text.batch * self.text.length
        super().log(logs, start_time)
        self.state.log_history[-1].pop("epoch", None)  # of a stream without end

    # What is kept

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's, written beside the checkpoints and renamed when every device has written its part."""
        root = self.root
        name = f"{CHECKPOINT}{self.state.global_step}"
        staging = root / SAVING
        if self.args.should_save:
            clean(root)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            with disk_errors(root):
                super()._save_checkpoint(model, trial)
                self.text.save(staging / name, self.state.global_step, self.args.process_index)
                if self.args.should_save and self.companions is not None:
                    copy_companions(self.companions, staging / name)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            old = [root / name] if (root / name).exists() else []
            remove_checkpoints(root, old)
            (staging / name).rename(root / name)
            remove_checkpoints(root, checkpoints(root)[: -self.keep])
            clean(root)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, of which moments and step are taken."""
        with own_rates(self.optimizer, self.lr_scheduler):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.text.load(Path(resume_from_checkpoint))


@contextmanager
def _same_use_cache(config: Any) -> Iterator[None]:
    """Undo what making a Trainer writes into the config, and checkpoints would then say: its own `use_cache`, False."""
    before = {name: value for name, value in vars(config).items() if name == "use_cache"}
    yield
    vars(config).pop("use_cache", None)
    vars(config).update(before)


def core(model: nn.Module) -> Any:
    """The plain model, which peft may have wrapped."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]
