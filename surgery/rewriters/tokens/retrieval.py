"""Which KV heads need all of their tokens: those that cost most when they stream, or that look up what came before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...anatomy.positions import max_positions
from ...attention.forward import project
from ...calibration import processes
from ...calibration.gradients import output_gradients
from ...calibration.text import Windows
from ...calibration.visit import Activations, Visit
from ...calibration.working_copy import WorkingCopy
from ...errors import PlanError
from ...runtime.budgets import BUDGETS, ByHead
from ...runtime.layout import LayerPlan, Ranked, Retain

PERIOD, TIMES = 500, 4
"""Random tokens that come again in the search for heads that look them up, at most, and how often they are read."""
ECHO = 1 / 15
"""Part of the heads found by that search which are echo heads."""


class _Head(NamedTuple):
    """What the query heads that read one KV head do with a batch of windows."""

    scores_BnTT: Tensor
    sinks_n: Tensor | None
    value_B1TV: Tensor
    o_nVD: Tensor

    def weights(self, visible_TT: Tensor) -> Tensor:
        """[B, n, T, T] of what queries see, as far as it came before them."""
        scores = self.scores_BnTT.masked_fill(~visible_TT.tril(), -torch.inf)
        if self.sinks_n is None:
            return scores.softmax(-1)
        sinks = self.sinks_n.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]

    def weights_at(self, query_P: Tensor, place_P: Tensor) -> Tensor:
        """[B, n, P] of single places before single queries, which see all that came before them."""
        hidden_TT = torch.ones(self.scores_BnTT.shape[-2:], dtype=torch.bool).triu(1)
        scores = self.scores_BnTT.masked_fill(hidden_TT, -torch.inf)
        total = scores.logsumexp(-1)
        if self.sinks_n is not None:
            total = torch.logaddexp(total, self.sinks_n.to(total)[:, None])
        return (scores[..., query_P, place_P] - total[..., query_P]).exp()


def retained(
    copy: WorkingCopy, plans: Sequence[LayerPlan], windows: Windows | None, seed: int
) -> dict[int, Retain | None]:
    """Owner -> its `Ranked` value with the heads that keep everything, or the shares, as its budget finds them.

    None where all heads of a layer keep everything.

    Args:
        plans: of the layers that evict, readers among them.
        windows: calibration text; budgets that go by it need it.
    """
    ranked = {plan.owner: plan.retain for plan in map(copy.settle, plans) if isinstance(plan.retain, Ranked)}
    first = next(iter(ranked.values()))
    budget, costs = BUDGETS[first.budget], {}
    if budget.by == "text":
        assert windows is not None
        costs = streaming_costs(copy, plans, windows, first.sinks, first.window or 0, seed)
    if isinstance(budget, ByHead):
        all_costs = torch.cat(list(costs.values()))
        # Of so many slots whatever the length, nobody knows when they are all.
        shares = divided(all_costs, budget.safe, first.ratio if first.slots is None else len(all_costs))
        parts = shares.split([len(cost) for cost in costs.values()])
        by_layer = {layer: tuple(map(float, part)) for layer, part in zip(costs, parts, strict=True)}
        return {layer: replace(value, shares=by_layer[layer]) for layer, value in ranked.items()}
    chosen = looking_up(copy, plans, first.part, seed) if budget.by == "lookup" else best(costs, first.part)
    made: dict[int, Retain | None] = {}
    for layer, value in ranked.items():
        whole = chosen.get(layer, ())
        heads = copy.project(layer).entry(4)[0]
        made[layer] = None if len(whole) == heads else replace(value, whole=whole, part=0.0)
    return made


def best(scores: Mapping[int, Tensor], part: float) -> dict[int, tuple[int, ...]]:
    """Layer -> its KV heads among the best `part` of all, at least one."""
    found = sorted(((float(s), layer, k) for layer, of_layer in scores.items() for k, s in enumerate(of_layer)))[::-1]
    chosen: dict[int, tuple[int, ...]] = {}
    for _, layer, head in sorted(found[: max(1, round(part * len(found)))], key=lambda entry: entry[1:]):
        chosen[layer] = (*chosen.get(layer, ()), head)
    return chosen


def divided(costs_X: Tensor, even: float, most: float) -> Tensor:
    """Shares, 1 on average and at most `most`: a part `even` of them for all alike, the rest in proportion to costs."""
    full = torch.zeros_like(costs_X, dtype=torch.bool)
    while True:  # what the largest cannot take goes to the others
        left, open_costs = len(costs_X) - most * full.sum(), costs_X.masked_fill(full, 0.0)
        among = (~full).sum().clamp_min(1)
        alike = torch.where(open_costs.sum() > 0, open_costs / open_costs.sum().clamp_min(1e-30), 1 / among)
        shares = torch.where(full, most, left * (even / among + (1 - even) * alike))
        over = (shares > most) & ~full
        if not bool(over.any()):
            return shares
        full = full | over


def streaming_costs(
    copy: WorkingCopy, plans: Sequence[LayerPlan], windows: Windows, sinks: int, recent: int, seed: int
) -> dict[int, Tensor]:
    """Owner -> [K] KL, in nats per token, that it costs where one KV head streams: sees first and newest tokens alone.

    To second order, each token on its own: what its attention output changes by, weighed by how much the parent's
    answers depend on it (see `output_gradients`). Readers' costs are added to those of their owners. Of each window the
    first half is read twice, so that there is something to look up: text alone hardly asks for that.

    Args:
        seed: of what `output_gradients` draws.

    Raises:
        PlanError: no window of text is longer than what streaming heads keep.
    """
    windows = _twice(windows)
    T = windows.ids_BT.shape[1]
    if sinks + recent >= T:
        raise PlanError(
            f"calibration text: windows of {T} tokens, of which heads that stream keep the first {sinks} and the "
            f"newest {recent}: no head would lose anything. Give longer windows (length=..., --length), or a smaller "
            "`recent`."
        )
    behind_TT = torch.arange(T)[:, None] - torch.arange(T)
    near_TT = (behind_TT < recent) | (torch.arange(T) < sinks)
    with output_gradients(copy, windows, [plan.layer for plan in plans], seed) as gradients:

        def of(visit: Visit) -> Tensor:
            costs_K = torch.zeros(len(visit.copy.read(visit.layer).groups), dtype=torch.float64)
            for batch, a in enumerate(visit.activations()):
                near, g_BTD = near_TT[: a.mask_BT.shape[1], : a.mask_BT.shape[1]], gradients[visit.layer][batch]
                for k, head in enumerate(_heads(visit, a)):
                    lost = (head.weights(torch.ones_like(near)) - head.weights(near)) @ head.value_B1TV
                    change_BT = torch.einsum("bntv,bntv->bt", lost, torch.einsum("btd,nvd->bntv", g_BTD, head.o_nVD))
                    costs_K[k] += change_BT[a.mask_BT].square().double().sum() / 2
            return processes.total(costs_K) / visit.tokens

        return _measured(copy, plans, windows, of, torch.add)


def looking_up(copy: WorkingCopy, plans: Sequence[LayerPlan], part: float, seed: int) -> dict[int, tuple[int, ...]]:
    """Layer -> KV heads that look up what came before: the best `part` of all, see `budgets.Razor`.

    Args:
        seed: of the tokens.
    """
    config = copy.layers.shell.config
    period = min(PERIOD, (max_positions(config) or TIMES * PERIOD) // TIMES)
    random = torch.Generator().manual_seed(seed)
    # As many tokens as a layer has channels: the way through the layers warns of fewer.
    rows = 1 + -(-max(site.hidden_size for site in copy.sites.values()) // (TIMES * period))
    rows += 10 * (processes.count() - 1)  # a batch, at least, for each process
    ids = torch.randint(config.get_text_config(decoder=True).vocab_size, (rows, period), generator=random)
    ids = ids.repeat(1, TIMES)
    windows = Windows(ids, torch.ones_like(ids, dtype=torch.bool), f"random-{seed}")
    order = torch.arange(ids.shape[1])
    behind_TT = order[:, None] - order
    # Echo: the earlier places of a query's token. Induction: what came behind those.
    places = [((behind_TT + n) % period == 0) & (behind_TT + n > 0) & (behind_TT >= 0) for n in (0, 1)]
    pairs = [(counts_TT & (order[:, None] >= period)).nonzero(as_tuple=True) for counts_TT in places]
    kind_P = torch.repeat_interleave(torch.tensor([len(queries) for queries, _ in pairs]))
    query_P, place_P = (torch.cat(some) for some in zip(*pairs, strict=True))

    def of(visit: Visit) -> Tensor:
        groups = visit.copy.read(visit.layer).groups
        sums = [torch.zeros(len(pairs), len(group), dtype=torch.float64) for group in groups]
        for a in visit.activations():
            for total, head in zip(sums, _heads(visit, a), strict=True):
                total.index_add_(0, kind_P, head.weights_at(query_P, place_P).sum(0).T.double())
        return torch.stack([processes.total(total).amax(-1) for total in sums], -1) / visit.tokens

    found = _measured(copy, plans, windows, of, torch.maximum)
    count = sum(scores.shape[-1] for scores in found.values())
    wanted = max(1, round(part * count))
    echo, induction = ({layer: scores[x] for layer, scores in found.items()} for x in (0, 1))
    echoes = round(ECHO * wanted)
    if echoes:
        for layer, heads in best(echo, echoes / count).items():
            induction[layer] = induction[layer].index_fill(0, torch.tensor(heads), torch.inf)
    return best(induction, wanted / count)


def _measured(
    copy: WorkingCopy,
    plans: Sequence[LayerPlan],
    windows: Windows,
    of: Callable[[Visit], Tensor],
    join: Callable[[Tensor, Tensor], Tensor],
) -> dict[int, Tensor]:
    """Owner -> what `of` says of its KV heads [..., K], joined with what it says of them under readers' queries."""
    owners = {plan.layer: plan.owner for plan in map(copy.settle, plans)}
    found: dict[int, Tensor] = {}
    held_out = copy.held_out  # the KL on these windows is none that anybody asks for
    for visit in copy.visits(windows, owners, kept=found):
        owner, scores = owners[visit.layer], of(visit)
        found[owner] = join(found[owner], scores) if owner in found else scores
    copy.held_out = held_out
    return found


def _twice(windows: Windows) -> Windows:
    """The first half of each window, two times over."""
    half = windows.ids_BT.shape[1] // 2
    ids, mask = (x[:, :half].repeat(1, 2) for x in (windows.ids_BT, windows.mask_BT))
    # Padding on the right, in windows that are shorter than a half.
    order = torch.argsort(~mask, dim=-1, stable=True)
    return replace(windows, ids_BT=ids.gather(1, order), mask_BT=mask.gather(1, order), digest=f"{windows.digest}x2")


def _heads(visit: Visit, a: Activations) -> Iterator[_Head]:
    """Of each KV head in turn."""
    own, copy = visit.copy.read(visit.layer), visit.copy
    q_BNTH = project(own, a.x_student_BTD)[0]
    k_BKTH, v_BKTV = copy.keys_values(visit.layer, {visit.layer: a.x_student_BTD, **a.inputs})
    for k, group in enumerate(map(list, own.groups)):
        scores_BnTT = q_BNTH[:, group] @ k_BKTH[:, k : k + 1].mT * own.scale
        if own.softcap is not None:
            scores_BnTT = torch.tanh(scores_BnTT / own.softcap) * own.softcap
        sinks = None if own.sinks_N is None else own.sinks_N[group]
        yield _Head(scores_BnTT, sinks, v_BKTV[:, k : k + 1], own.o_DNV[:, group].permute(1, 2, 0))
