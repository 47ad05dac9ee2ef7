"""Tables of `Directions`: which directions of K and V are held with how many bits, from calibration text.

A vector x is turned to z = U'M^(1/2)(x - mean). M is the metric in which an error is felt: of keys E[q q'] of the
queries that read them, turned to the places of the keys; of values W_o'W_o. U are the principal directions there, so
that z is uncorrelated. Bits go one by one to the direction whose error falls most (reverse water-filling), and the step
of each direction is the one with the least squared error on the text. Keys are taken before their rotation, which would
mix the channels of a pair; values are divided by their norms before steps are chosen, for attention may look at short
ones alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.linalg import hermitian
from ...calibration.visit import Visit
from ...errors import PlanError
from ...runtime.calibrated_forms import TABLES, Directions
from ...runtime.layout import Codec
from .entries import sampled_entries
from .samples import as_tables, sampled

_MOST = 8
_LEAST_METRIC = 1e-6
"""Of the largest eigenvalue: directions that nothing reads are held all the same, roughly."""
_STEPS = 9


@dataclass(frozen=True, kw_only=True)
class StreamDirections:
    """What the text says of the keys, or values, of one layer; tables for any number of bits follow from it."""

    letter: str
    """`k` or `v`."""
    normed: bool
    """Whether vectors are held less their norms under the metric."""
    turn_KWW: Tensor
    back_KWW: Tensor
    middle_KW: Tensor
    steps_bKW: Tensor
    """By bits, 0 to 8: of each direction the step with the least squared error, and that error."""
    errors_bKW: Tensor

    def widths(self, bits: float) -> Tensor:
        """[K, W]: bits of each direction."""
        return shared_out(self.errors_bKW, Directions(bits, self.normed, None).code_bits(self.turn_KWW.shape[-1]))

    def error(self, bits: float) -> float:
        """Squared error under the metric."""
        return float(self.errors_bKW.gather(0, self.widths(bits)[None]).sum())

    def tables(self, bits: float) -> dict[str, Tensor]:
        """By the names of `Codec.table_shapes`; int32, floats seen as their bits."""
        widths = self.widths(bits)
        step = self.steps_bKW.gather(0, widths[None])[0]
        found = dict(zip(TABLES, (self.turn_KWW, self.back_KWW, step, self.middle_KW), strict=False))
        return as_tables(self.letter, {**found, "widths": widths})


def directions_of_layer(visit: Visit, store: Codec) -> list[StreamDirections]:
    """Of the keys of one layer, and of its values where `store` encodes them; of the entries of a latent cache.

    Raises:
        PlanError: the text has too few tokens behind the first ones.
    """
    latent = visit.copy.form(visit.layer).latent_of_cache
    if latent is not None:
        return [directions_of(*sampled_entries(visit, store, latent), normed=False, mean=True, letter="k")]
    seen = sampled(visit, store)
    made = [directions_of(seen.k_KPH, seen.key_metric_KHH, normed=False, mean=True, letter="k")]
    if store.v_bits is not None:
        made.append(directions_of(seen.v_KPV, seen.value_metric_KVV, normed=True, mean=False, letter="v"))
    return made


def directions_of(x_KPW: Tensor, metric_KWW: Tensor, *, normed: bool, mean: bool, letter: str) -> StreamDirections:
    """Directions of one stream.

    Args:
        x_KPW: vectors of the text.
        normed: vectors are held less their norms under the metric.
        mean: their mean is subtracted.
    """
    x = x_KPW.double()
    middle = x.mean(1) if mean else torch.zeros_like(x[:, 0])
    root, inverse = _roots(metric_KWW)
    y = (x - middle[:, None]) @ root
    if normed:
        y = y / y.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    u = torch.linalg.eigh(hermitian(y.mT @ y)).eigenvectors.flip(-1)
    steps, errors = _steps(y @ u)
    return StreamDirections(
        letter=letter, normed=normed, turn_KWW=root @ u, back_KWW=u.mT @ inverse, middle_KW=middle,
        steps_bKW=steps, errors_bKW=errors,
    )  # fmt: skip


def shared_out(errors_bKW: Tensor, count: int) -> Tensor:
    """[K, W]: bits of each direction, `count` in each head, by what one more takes off the error.

    Args:
        errors_bKW: squared error with 0, 1, .. bits; made to fall ever less where it does not.
    """
    most = len(errors_bKW) - 1
    gains = (errors_bKW[:-1] - errors_bKW[1:]).clamp_min(0.0)
    gains = torch.flip(torch.flip(gains, (0,)).cummax(0).values, (0,))
    widths = torch.zeros(errors_bKW.shape[1:], dtype=torch.long)
    for k in range(len(widths)):
        left = torch.cat((gains[:, k], torch.full_like(gains[:1, k], -1.0)))
        for _ in range(count):
            best = left.gather(0, widths[k][None])[0].argmax()
            widths[k, best] += 1
        if int(widths[k].max()) > most:
            raise PlanError(f"{count} bits are more than {widths.shape[1]} directions can take. Ask for fewer bits.")
    return widths


def _roots(metric_KWW: Tensor) -> tuple[Tensor, Tensor]:
    """M^(1/2) and its inverse, float64."""
    values, vectors = torch.linalg.eigh(hermitian(metric_KWW.double()))
    largest = values[:, -1:].clamp_min(1e-30)
    values = values.clamp_min(_LEAST_METRIC * largest)
    root, inverse = ((vectors * v[:, None]) @ vectors.mT for v in (values.sqrt(), values.rsqrt()))
    return root, inverse


def _steps(z_KPW: Tensor) -> tuple[Tensor, Tensor]:
    """[bits, K, W]: of each direction the step with the least squared error, and that error, for 0 to 8 bits."""
    spread = z_KPW.square().mean(1).sqrt().clamp_min(1e-12)
    steps, errors = [torch.ones_like(spread)], [spread.square()]
    z = z_KPW.float()
    for bits in range(1, _MOST + 1):
        half = 2.0 ** (bits - 1)
        # From well inside to well outside of what suits a normal; heavy tails ask for more.
        reaches = torch.linspace(0.6 + 0.3 * bits, 2.2 + 0.8 * bits, _STEPS, dtype=torch.float64)
        tried = reaches[:, None, None] * spread / half
        found = torch.stack([_error(z, step.float(), half) for step in tried])
        best = found.argmin(0, keepdim=True)
        steps.append(tried.gather(0, best)[0])
        errors.append(found.gather(0, best)[0].double())
    return torch.stack(steps), torch.stack(errors)


def _error(z_KPW: Tensor, step_KW: Tensor, half: float) -> Tensor:
    step = step_KW[:, None]
    return (((z_KPW / step).floor_().clamp_(-half, half - 1) + 0.5) * step - z_KPW).square_().mean(1)
