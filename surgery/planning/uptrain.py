"""How a converted model is trained afterwards: the `uptrain` section of a recipe. Conversion itself never trains."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ..errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Uptrain:
    """How the converted model is trained afterwards (`surgery train`). Conversion itself never trains."""

    tokens: int
    """Text to train on; repeated where there is less of it."""
    layer_local: float | None = None
    """Part of the tokens for the first stage: each converted attention is fitted on the parent's own inputs. None: 0.1
    after a conversion without calibration text, else 0, for calibration has fitted each layer already."""
    learning_rate: float | None = None
    """Peak, of the second stage. None: 0.06 / hidden size, which is 3e-5 at width 2048 and 3e-4 at 192; a model
    that was converted without calibration wants several times that."""
    local_learning_rate: float | None = None
    """Peak, of the first stage. None: that of the second, times 3."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: float = 0.03
    """Part of the steps of each stage in which the learning rate rises."""
    decay: float = 0.2
    """`wsd` only: part of the steps, at the end, in which it falls to zero as 1 - sqrt."""
    kl: float = 1.0
    """Weight of KL(parent || model) on the logits in the second stage."""
    ce: float = 0.0
    """Weight of the cross-entropy on the text."""
    hidden: float = 0.0
    """Weight of the relative squared distance to the parent's last hidden state."""
    temperature: float = 1.0
    """Of both distributions in the KL, which is multiplied by its square."""
    train: Literal["converted", "attention", "all", "lora", "gates"] = "converted"
    """Attention that was converted, every attention, everything, low-rank adapters (`lora_*`), or the gates of `dms`
    and `dmc` alone."""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] | None = None
    """Names of linear layers, such as `q_proj`. None: every linear layer in the converted attention."""
    batch: int = 32
    """Sequences per optimizer step, over all devices."""
    length: int | None = None
    """Tokens per sequence. None: the model's context, at most 4096."""
    weight_decay: float = 0.1
    """Of matrices; vectors (gains, biases) have none."""
    gate_budget: float = 5.0
    """Weight of max(0, part of tokens that is to go - part that goes), where a step asks for a ratio."""
    gate_budget_per: Literal["model", "head"] = "model"
    """One budget for all layers and heads together, which then choose their own ratios, or one for each head."""
    gate_l1: float = 0.0
    """Weight of the mean alpha of heads whose tokens stay or go together (`gate: head`), whatever the ratio: the L1
    penalty of DuoAttention. `gate_budget` weighs the same mean, as far as it is above what the ratio leaves."""
    gate_rate: float = 5.0
    """Learning rate of gates that are trained beside other weights, in units of theirs. Trained alone (`train: gates`)
    they have `learning_rate` itself."""
    gate_ramp: float = 0.8
    """Part of the run in which the ratio rises from 1 to that of the recipe."""
    gate_temperature: float = 0.3
    """Of relaxed decisions."""
    separate_documents: bool = True
    """Positions start again at each document of a packed sequence, and no attention crosses the border."""

    def unread(self) -> dict[str, str]:
        """See `recipe.Step.unread`."""
        found = {}
        if self.schedule != "wsd":
            found["decay"] = "only schedule: wsd reads it. Leave it out."
        if self.train != "lora":
            found |= dict.fromkeys(
                ("lora_rank", "lora_alpha", "lora_targets"), "only train: lora reads it. Leave it out."
            )
        if self.train == "gates":
            found["gate_rate"] = "gates that are trained alone have learning_rate. Leave it out."
        if self.kl == 0:
            found["temperature"] = "it is that of the KL, whose weight kl is 0. Leave it out."
        if self.gate_budget == 0:
            found["gate_budget_per"] = "the budget has no weight where gate_budget is 0. Leave it out."
        if self.layer_local == 0:
            found["local_learning_rate"] = "there is no first stage where layer_local is 0. Leave it out."
        if self.layer_local == 1:
            second = ["kl", "ce", "hidden", "temperature", "gate_budget", "gate_budget_per", "gate_l1", "gate_ramp"]
            second += ["learning_rate"] * (self.local_learning_rate is not None)
            found |= dict.fromkeys(second, "it is of the second stage, and layer_local: 1 leaves none. Leave it out.")
        return found

    def validate(self, where: str) -> None:
        for name in ("tokens", "learning_rate", "local_learning_rate", "temperature", "batch", "lora_rank",
                     "gate_rate", "gate_temperature"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RecipeError(f"{where}.{name}: {value} must be positive.")
        for name in ("layer_local", "warmup", "decay", "gate_ramp"):
            if not 0 <= (getattr(self, name) or 0.0) <= 1:
                raise RecipeError(f"{where}.{name}: {getattr(self, name)} is a part of the whole: give 0 to 1.")
        for name in ("kl", "ce", "hidden", "weight_decay", "gate_budget", "gate_l1"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{where}.{name}: {getattr(self, name)} must not be negative.")
        if self.layer_local != 1 and not (self.kl or self.ce or self.hidden):
            raise RecipeError(f"{where}: kl, ce and hidden are all 0: the second stage would learn nothing.")
        if self.train == "gates" and self.layer_local:
            raise RecipeError(
                f"{where}.layer_local: gates are trained by the logits; the layer-local stage would train nothing. Set "
                "layer_local: 0."
            )
        if self.length is not None and self.length < 8:
            raise RecipeError(f"{where}.length: {self.length} tokens; give at least 8.")


OF_GATES = tuple(field.name for field in fields(Uptrain) if field.name.startswith("gate_"))
"""Options that are about gates."""
