"""Eviction by rank: what each score and budget keeps, against loops in float64, and what models make of it."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import tiny_model
from gated_models import contents, run, tokens
from methods import METHODS, merged, parent, sites
from tokenizers import Tokenizer
from tokenizing import word_tokenizer
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, PreTrainedTokenizerFast
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import surgery
from surgery.measure.memory import tensor_bytes
from surgery.quick_evict import NAME
from surgery.runtime.budgets import BUDGETS, Claim, OverLayers
from surgery.runtime.calling import cache_argument
from surgery.runtime.layout import LayerPlan, Ranked
from surgery.runtime.merging import MERGES, Neighbours
from surgery.runtime.noise import gumbel, uniform
from surgery.runtime.paged_attention import attend
from surgery.runtime.queries import Queries
from surgery.runtime.ranked_cache import RankedLayer
from surgery.runtime.rankers import RANKERS
from surgery.runtime.reading import READERS
from surgery.runtime.slots import New, Slots

SMALL: dict[str, Any] = {"ratio": 4.0, "window": 4, "sinks": 2, "observe": 4, "pool": 3}
MODELS = {
    "heads": ("identity", "llama"),
    "normed keys": ("identity", "qwen3"),
    "unequal groups": ("unequal_groups", "llama"),
    "readers": ("shared", "llama"),
    "latent": ("mla", "llama"),
    "latent, turned at read": ("lowrank", "qwen3"),
}
SEPARATORS = tuple(range(20, 45))
GREEDY = {"do_sample": False, "max_new_tokens": 40, "min_new_tokens": 40}


@functools.cache
def model_of(form: str, scorer: str, **options: Any) -> PreTrainedModel:
    method, family = MODELS[form]
    options |= {"separators": SEPARATORS} if scorer == "sepllm" else {}
    ranked = merged(METHODS[method], [family], "ranked", scorer=scorer, **SMALL | options)
    shares = METHODS[method].shares
    made = ranked if not shares else type(ranked)(METHODS[method].plan_and_weights, [family], shares, ranked.retain)
    return made.convert(parent(family), sites(family)).eval()


ALIKE = {
    "keyformer": "h2o",
    "buzz": "h2o",
    "vatp": "h2o",
    "scissorhands": "h2o",
    "nacl": "snapkv",
    "critical": "snapkv",
    "sepllm": "h2o",
}
"""Scores that read what another does, and are tried in fewer forms."""


def forms(scorer: str) -> list[str]:
    some = ("heads", "unequal groups", "latent") if scorer in ALIKE else tuple(MODELS)
    return [form for form in some if "latent" not in form or not RANKERS[scorer].plain_queries]


PAIRS = [(form, scorer) for scorer in RANKERS for form in forms(scorer)]


# ------------------------------------------------------------------------------------------- by hand


OUT = torch.randn(4, 12, 8, generator=torch.Generator().manual_seed(5))
"""W_o of each query head."""


def output_norms(value_BKSV: Tensor) -> Tensor:
    return torch.einsum("nov,bnsv->bnso", OUT, value_BKSV.repeat_interleave(2, dim=1)).abs().sum(-1)


def ahead(x: Tensor, offsets: Sequence[int]) -> Tensor:
    """Keys do not turn here, but for what queries to come would: a factor of its own for each channel."""
    return x if len(offsets) > 100 else x * torch.linspace(0.5, 1.0, 8)


def pair_norms(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).norm(dim=-2)


class Loop:
    """One sequence in one layer, token by token and head by head."""

    def __init__(self, retain: Ranked, q_NTH: Tensor, k_KTH: Tensor, v_KTV: Tensor) -> None:
        self.retain, self.q, self.k, self.v = retain, q_NTH.double(), k_KTH.double(), v_KTV.double()
        self.heads, self.group = len(k_KTH), len(q_NTH) // len(k_KTH)
        self.kept: list[list[int]] = [[] for _ in k_KTH]
        self.sums: list[dict[int, float]] = [{} for _ in k_KTH]
        self.seen = 0

    def attention(self, head: int, query: int, slots: list[int], noisy: bool = False) -> dict[int, float]:
        row = self.k[head // self.group]
        logits = [float(self.q[head, query] @ row[j]) / math.sqrt(row.shape[1]) for j in slots]
        if noisy:
            logits = [x + n for x, n in zip(logits, noise(len(logits), query, head), strict=True)]
        pairs = [(j, x) for j, x in zip(slots, logits, strict=True) if j <= query]
        slots, logits = [j for j, _ in pairs], [x for _, x in pairs]
        top = max(logits)
        total = sum(math.exp(x - top) for x in logits)
        return {j: math.exp(x - top) / total for j, x in zip(slots, logits, strict=True)}

    def add(self, count: int) -> None:
        new = list(range(self.seen, self.seen + count))
        self.seen += count
        scorer = self.retain.scorer
        for k in range(self.heads):
            self.kept[k] += new
            for query in new[-400:]:
                for h in range(k * self.group, (k + 1) * self.group):
                    found = self.attention(h, query, self.kept[k], noisy=scorer == "keyformer")
                    for j, weight in found.items():
                        adds = float(weight < 1 / len(found)) if scorer == "scissorhands" else weight
                        self.sums[k][j] = self.sums[k].get(j, 0.0) + adds / self.group
        slots = int(self.retain.slots_at(self.seen))
        ranker = RANKERS[self.retain.scorer]
        if count == 1:
            held = sum(map(len, self.kept))
            if not ranker.while_decoding or held < self.heads * (slots + self.retain.page):
                return
        newest = max(int(ranker.newest * slots), self.retain.window or 0)
        ranked = []
        for k in range(self.heads):
            score = self.score(k, new)
            order = self.kept[k]
            for place, j in enumerate(order):
                if place < self.retain.sinks or place >= len(order) - newest:
                    score[j] = math.inf
            ranked.append(sorted(order, key=lambda j: -score[j]))  # stable: the first of equals comes first
            if self.retain.budget == "ada":
                for j in ranked[k][: max(1, int(slots / 5))]:
                    score[j] = math.inf
                self.sums[k] |= {-1 - j: score[j] for j in order}  # for the comparison of heads below
        if self.retain.budget == "ada":
            pairs = [(k, j) for k in range(self.heads) for j in self.kept[k]]
            best = sorted(pairs, key=lambda p: -self.sums[p[0]][-1 - p[1]])[: slots * self.heads]
            self.kept = [[j for j in self.kept[k] if (k, j) in best] for k in range(self.heads)]
        else:
            self.kept = [sorted(ranked[k][:slots]) for k in range(self.heads)]

    def score(self, k: int, new: list[int]) -> dict[int, float]:
        retain, slots = self.retain, self.kept[k]
        mine = range(k * self.group, (k + 1) * self.group)
        if retain.scorer == "streaming":
            return {j: float(j) for j in slots}
        if retain.scorer == "sepllm":
            order = [j for j in slots if j % 5 != 3] + [j for j in slots if j % 5 == 3]
            return {j: float(place) for place, j in enumerate(order)}
        if retain.scorer == "knorm":
            return {j: -float(self.k[k, j].norm()) for j in slots}
        if retain.scorer == "scissorhands":
            return {j: -self.sums[k][j] for j in slots}
        if retain.scorer == "buzz":
            return self.buzz(k)
        if retain.scorer == "nacl":
            return self.nacl(k, new, mine)
        if retain.scorer == "triattention":
            return self.triattention(k, [i for i in new if i >= retain.sinks], mine)
        if retain.scorer in ("h2o", "vatp", "keyformer"):
            size = {j: float(self.v[k, j].abs().sum()) if retain.scorer == "vatp" else 1.0 for j in slots}
            return {j: self.sums[k][j] * size[j] for j in slots}
        if retain.scorer == "tova":
            # Heads keep the same tokens.
            last = [self.attention(h, new[-1], self.kept[h // self.group]) for h in range(len(self.q))]
            return {j: sum(weights[j] for weights in last) / len(self.q) for j in slots}
        if retain.scorer in ("snapkv", "critical"):
            observed = new[-retain.observe :]
            weights = [[self.attention(h, i, slots) for i in observed] for h in mine]
            before = [
                0.0 if j in observed else sum(a.get(j, 0.0) for of_head in weights for a in of_head) for j in slots
            ]
            half = retain.pool // 2
            pooled = [sum(before[max(0, i - half) : i + half + 1]) / retain.pool for i in range(len(slots))]
            found = dict(zip(slots, pooled, strict=True))
            if retain.scorer == "snapkv":
                return found
            stay = [j for i, j in enumerate(slots) if i < retain.sinks or i >= len(slots) - (retain.window or 0)]
            first = sorted(slots, key=lambda j: -math.inf if j in stay else -found[j])
            first = first[: int(retain.slots_at(self.seen)) // 2]
            out = {
                j: sum(float((OUT[h].double() @ self.v[k, j]).abs().sum()) for h in mine) / self.group for j in slots
            }
            return {j: math.inf if j in first else (found[j] + 1e-4) * out[j] for j in slots}
        assert retain.scorer == "expected"
        open_slots, used = slots[retain.sinks :], [i for i in new if i >= retain.sinks]
        total = dict.fromkeys(slots, 0.0)
        for h in mine:
            mean = torch.stack([self.q[h, i] for i in used]).mean(0)
            covariance = sum(torch.outer(self.q[h, i] - mean, self.q[h, i] - mean) for i in used) / len(used)
            width = self.k.shape[2]
            logits = [
                float(self.k[k, j] @ mean) / math.sqrt(width)
                + float(self.k[k, j] @ covariance @ self.k[k, j]) / width / 2
                for j in open_slots
            ]
            top = max(logits)
            below = sum(math.exp(x - top) for x in logits)
            for j, x in zip(open_slots, logits, strict=True):
                total[j] += math.exp(x - top) / below / self.group * float(self.v[k, j].norm())
        return total

    def buzz(self, k: int) -> dict[int, float]:
        """The best of each stretch before all others."""
        slots, budget = self.kept[k], int(self.retain.slots_at(self.seen))
        newest = max(budget // 2, self.retain.window or 0)
        free = slots[self.retain.sinks : len(slots) - newest]
        length = -(-max(1, len(free)) // max(1, budget - self.retain.sinks - newest))
        score = {j: self.sums[k][j] for j in slots}
        for begin in range(0, len(free), length):
            best = max(free[begin : begin + length], key=lambda j: self.sums[k][j])
            score[best] += 1000
        return score

    def nacl(self, k: int, new: list[int], mine: range) -> dict[int, float]:
        slots, observed = self.kept[k], new[-self.retain.observe :]
        weights = [self.attention(h, i, slots) for h in mine for i in observed]
        mean = {j: sum(a.get(j, 0.0) for a in weights) / len(weights) for j in slots}
        drawn = zip(slots, noise(len(slots), self.seen, k), strict=True)
        score = {j: math.log(max(mean[j], 1e-30)) + n for j, n in drawn}
        always = slots[: self.retain.sinks] + slots[len(slots) - (self.retain.window or 0) :]
        order = sorted(slots, key=lambda j: (j not in always, -mean[j]))
        return score | dict.fromkeys(order[: int(self.retain.slots_at(self.seen)) // 2], math.inf)

    def triattention(self, k: int, used: list[int], mine: range) -> dict[int, float]:
        total = dict.fromkeys(self.kept[k], 0.0)
        for h in mine:
            mean = torch.stack([self.q[h, i] for i in used]).mean(0)
            spread = sum(pair_norms(self.q[h, i]) for i in used) / len(used) - pair_norms(mean)
            for j in total:
                key = self.k[k, j]
                total[j] += float(key @ ahead(mean, range(17)) + pair_norms(key) @ spread) / self.group
        return total


def noise(count: int, *at: int) -> list[float]:
    """Of the first places of a row."""
    found: list[float] = gumbel(*(torch.tensor(place) for place in at), torch.arange(count)).tolist()
    return found


def test_noise_of_places_is_that_of_a_generator() -> None:
    drawn = uniform(torch.arange(300)[:, None], torch.arange(300))
    assert 0 < drawn.min() < 1e-4 and 1 - 1e-4 < drawn.max() < 1
    assert abs(float(drawn.mean()) - 0.5) < 0.005 and abs(float(drawn.std()) - 12**-0.5) < 0.005
    assert abs(float(torch.corrcoef(torch.stack((drawn[1:].flatten(), drawn[:-1].flatten())))[0, 1])) < 0.02
    assert len(drawn.unique()) > 0.99 * 300**2


@pytest.mark.parametrize("budget", ["uniform", "ada"])
@pytest.mark.parametrize("scorer", [name for name, ranker in RANKERS.items() if not ranker.rehearses])
def test_what_stays_is_what_loops_say(scorer: str, budget: str) -> None:
    retain = Ranked(scorer=scorer, budget=budget, **SMALL)
    generator = torch.Generator().manual_seed(3)
    rows, T = 2, 75
    q = torch.randn(rows, 4, T, 8, generator=generator) * 2
    k, v = (torch.randn(rows, 2, T, 8, generator=generator) for _ in range(2))
    v[..., 0] = torch.arange(T)  # which token it is
    layer = RankedLayer(retain, 0)
    loops = [Loop(retain, q[b], k[b], v[b]) for b in range(rows)]
    ends = [40, *range(41, 60), 68, *range(69, T + 1)]
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        at = slice(begin, end)
        layer.add(
            New(
                key_BKTH=k[:, :, at], value_BKTV=v[:, :, at], logits_BKT=-torch.ones(rows, 2, end - begin),
                weight_BKT=None, real_BT=None, turn=lambda x: x,
                queries=Queries(
                    query_BNTH=q[:, :, at], real_BT=None, scale=8**-0.5, plain_BNTH=q[:, :, at],
                    ahead=ahead, output_norms=output_norms,
                    pair_norms=pair_norms, separators_BT=(torch.arange(begin, end) % 5 == 3).expand(rows, -1),
                ),
            )
        )  # fmt: skip
        for loop in loops:
            loop.add(end - begin)
        slots = layer.slots()
        for b, loop in enumerate(loops):
            for head in range(2):
                held = slots.value_BKSV[b, head, : layer.lengths[b, head], 0].int().tolist()
                assert held == loop.kept[head], (end, b, head)
    assert len(held) < 45


@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_keep_the_mean_over_layers(budget: str) -> None:
    for tokens_seen in (30, 100, 1000):
        depths = [i / 6 for i in range(7)]
        kept = [Ranked(scorer="h2o", budget=budget, depth=d, **SMALL).slots_at(tokens_seen) for d in depths]
        mean = max(tokens_seen / 4, 6)
        assert mean <= sum(kept) / 7 <= mean + 1
        assert kept == sorted(kept, reverse=True)
        assert (kept[0] > kept[-1]) == (budget == "pyramid" and mean > 6)
        assert all(6 <= n <= tokens_seen for n in kept)


OVER_LAYERS = [name for name, budget in BUDGETS.items() if isinstance(budget, OverLayers)]


def claims(heads: Sequence[int] = (2, 2, 3, 2), tokens_seen: int = 40, always: int = 6) -> list[Claim]:
    """Of layers of so many heads that share, in two sequences."""
    generator, found = torch.Generator().manual_seed(4), []
    for n in heads:
        score = torch.rand(2, n, tokens_seen, generator=generator) ** (4 * torch.rand(1, generator=generator) + 1)
        opened = (torch.arange(tokens_seen) >= always).expand(2, n, -1)
        found.append(
            Claim(score_BKS=score.masked_fill(~opened, torch.inf), open_BKS=opened,
                  measure_B=torch.rand(2, generator=generator), mass_B=(score * opened).sum((1, 2)))
        )  # fmt: skip
    return found


@pytest.mark.parametrize("budget", OVER_LAYERS)
@pytest.mark.parametrize("part", [0.2, 0.6])
def test_dividing_as_layers_come_is_dividing_at_once(budget: str, part: float) -> None:
    rule, all_of_them = BUDGETS[budget], claims((2, 2, 2, 2))
    assert isinstance(rule, OverLayers)
    slots_B = torch.tensor([int(part * 8 * 34), int(part * 8 * 34) // 2])
    want = rule.divide(all_of_them, slots_B)
    left: list[Claim] = []
    for claim in all_of_them:
        left.append(claim)
        given = rule.divide(left, slots_B)
        keeps = [rule.keep(c.score_BKS, 6 + n) for c, n in zip(left, given.unbind(-1), strict=True)]
        left = [c.of(keep) for c, keep in zip(left, keeps, strict=True)]
        assert all((c.most_B <= n).all() for c, n in zip(left, given.unbind(-1), strict=True))
    assert torch.equal(given, want)
    assert ((2 * want).sum(-1) <= slots_B).all() and ((2 * want).sum(-1) > slots_B - 8).all()


def test_lean_heads_hold_the_same_part_of_what_they_attend_to() -> None:
    claim = claims((3,))[0]
    keep = BUDGETS["lean"].keep(claim.score_BKS, torch.tensor([20, 12]))
    assert (keep[..., :6]).all() and (57 <= keep[0].sum() <= 60) and (33 <= keep[1].sum() <= 36)
    score = claim.score_BKS.masked_fill(~claim.open_BKS, 0.0)
    kept, dropped = score.masked_fill(~keep, 0.0), score.masked_fill(keep, 0.0)
    part, next_one = kept.sum(-1) / score.sum(-1), dropped.amax(-1) / score.sum(-1)
    assert (part.amax(-1) <= (part + next_one).amin(-1)).all()  # no head could give a slot to another
    assert (kept.masked_fill(~keep, 2.0)[..., 6:].amin(-1) >= dropped.amax(-1)).all()
    assert len(keep.sum(-1).unique()) > 2


def test_budgets_over_layers_divide_as_defined() -> None:
    found, slots_B = claims(), torch.tensor([90, 120])
    heads = torch.tensor([2, 2, 3, 2])
    for b in range(2):
        cake = BUDGETS["cake"].divide(found, slots_B)[b]
        measure = torch.stack([c.measure_B[b] for c in found])
        share = measure * slots_B[b] / (measure * heads).sum()
        assert (cake < 34).all() and torch.equal(cake, share.long())
        dynamic = BUDGETS["dynamic"].divide(found, slots_B)[b]
        best = [c.score_BKS[b, :, 6:].sort(-1, descending=True).values.mean(0) for c in found]
        entries = sorted(
            ((float(x), int(n)) for values, n in zip(best, heads, strict=True) for x in values), reverse=True
        )
        room, taken = int(slots_B[b]), []
        for value, n in entries:
            room -= n
            taken += [value] if room >= 0 else []
        assert dynamic.tolist() == [sum(float(x) in taken for x in values) for values in best]
        prefix = BUDGETS["prefix"].divide(found, slots_B)[b]
        sums = [c.score_BKS[b, :, 6:].sort(-1, descending=True).values.sum(0).cumsum(0) / c.mass_B[b] for c in found]
        held = [float(total[n - 1]) for total, n in zip(sums, prefix, strict=True)]
        more = [float(total[n]) for total, n in zip(sums, prefix, strict=True)]
        assert min(more) >= max(held) and max(held) - min(held) < 0.1  # of a slot's size alike
        lazy = BUDGETS["simlayer"].divide(found, slots_B)[b]
        order = measure.argsort(descending=True).tolist()
        assert lazy[order[0]] == 34 and lazy[order[-1]] == 0
        assert int((lazy * heads).sum()) > slots_B[b] - 3


class Merged:
    """One head of one sequence: slots that go, folded into others one by one."""

    def __init__(self, key_SH: Tensor, value_SV: Tensor, goes: list[int], into: list[int]) -> None:
        self.key, self.value, self.goes, self.into = key_SH.double(), value_SV.double(), goes, into

    def nearest(self, i: int) -> tuple[float, int]:
        return max((float(torch.cosine_similarity(self.key[i], self.key[j], dim=0)), j) for j in self.into)

    def weighted(self, own: float, weight_of: dict[int, float]) -> tuple[Tensor, Tensor]:
        key, value = self.key.clone(), self.value.clone()
        for j in self.into:
            mine = [i for i in weight_of if self.nearest(i)[1] == j]
            base = own if own > 0 else 1 + len(mine) / 2
            total = base + sum(weight_of[i] for i in mine)
            for x, made in ((self.key, key), (self.value, value)):
                made[j] = (base * x[j] + sum(weight_of[i] * x[i] for i in mine)) / total if mine else x[j]
        return key, value

    def d2o(self) -> tuple[Tensor, Tensor]:
        likeness = {i: self.nearest(i)[0] for i in self.goes}
        mean = sum(likeness.values()) / len(likeness)
        return self.weighted(math.e, {i: math.exp(x) for i, x in likeness.items() if x >= mean})

    def lookm(self) -> tuple[Tensor, Tensor]:
        return self.weighted(0.0, dict.fromkeys(self.goes, 0.5))

    def kvmerger(self) -> tuple[Tensor, Tensor]:
        """Stretches are found by going from a slot towards one that stays, as far as neighbours are alike."""
        reached: dict[int, list[int]] = {}
        for i in self.goes:
            for d in range(1, len(self.key)):
                sides = [j for j in (i - d, i + d) if j in self.into and self.alike(min(i, j), max(i, j))]
                if sides:
                    reached.setdefault(sides[0], []).append(i)
                    break
        key, value = self.key.clone(), self.value.clone()
        for j, some in reached.items():
            far = {i: float((self.key[i] - self.key[j]).square().sum()) for i in some}
            mean = sum(far.values()) / len(far)
            weight = {i: math.exp(-x / 2 / mean) for i, x in far.items()}
            for x, made in ((self.key, key), (self.value, value)):
                made[j] = (x[j] + sum(w * x[i] for i, w in weight.items())) / (1 + sum(weight.values()))
        return key, value

    def alike(self, first: int, last: int) -> bool:
        pairs = ((self.key[i], self.key[i + 1]) for i in range(first, last))
        return all(float(torch.cosine_similarity(a, b, dim=0)) > 0.75 for a, b in pairs)

    def mean(self, more: float) -> tuple[Tensor, Tensor]:
        key, value, j = self.key.clone(), self.value.clone(), min(self.into)
        for x, made in ((self.key, key), (self.value, value)):
            made[j] = ((1 + more) * x[j] + sum(x[i] for i in self.goes)) / (1 + more + len(self.goes))
        return key, value

    def cam(self, attention: list[float], lots: list[float]) -> tuple[Tensor, Tensor]:
        value = self.value.clone()
        for i in self.goes:
            takers = [j for j in self.into if j > i][:32]
            mean = sum(attention[j] for j in takers) / max(1, len(takers))
            if takers and lots[i] < attention[i] / mean:
                value[takers] += self.value[i] / len(takers)
        return self.key, value


@pytest.mark.parametrize("rule", MERGES)
def test_what_leaves_is_folded_as_defined(rule: str) -> None:
    generator = torch.Generator().manual_seed(6)
    key, value = (torch.randn(2, 2, 70, 8, generator=generator) for _ in range(2))
    key = key + 1.5 * key.roll(1, 2) if rule == "kvmerger" else key  # some neighbours are alike
    attention, goes = torch.rand(2, 2, 70, generator=generator), torch.rand(2, 2, 70, generator=generator) < 0.5
    goes[..., :4] = False
    goes[..., -1] = False
    there = torch.ones_like(goes)
    there[1, :, 60:] = False  # a shorter row
    into = there & ~goes
    into[..., :4] = False
    goes = goes & there
    goes[0, 0] = False  # nothing leaves here
    more = 3.0 * (torch.arange(70) == into.byte().argmax(-1, keepdim=True)) if MERGES[rule].counts else None
    slots = Slots(key_BKSH=key, value_BKSV=value, expires_BKS=there.int(), born_BKS=there.int(), gathered_BKS=attention,
                  more_BKS=more)  # fmt: skip
    made = MERGES[rule].fold(slots, goes, into, torch.tensor([70, 60]))
    changed = 0
    for b, k in itertools.product(range(2), range(2)):
        left, stays = (x[b, k].nonzero()[:, 0].tolist() for x in (goes, into))
        loop = Merged(key[b, k], value[b, k], left, stays)
        lots = uniform(torch.tensor([70, 60][b]), torch.tensor(k), torch.arange(70)).tolist()
        needs = {"cam": (attention[b, k].tolist(), lots), "mean": (3.0,)}
        wanted = (loop.key, loop.value) if not left else getattr(loop, rule)(*needs.get(rule, ()))
        for got, want in zip((made.key_BKSH, made.value_BKSV), wanted, strict=True):
            assert_close(got[b, k, stays].double(), want[stays])
        assert torch.equal(made.value_BKSV[b, k, :4], value[b, k, :4])
        changed += int((made.value_BKSV[b, k, stays] != value[b, k, stays]).any())
        if made.more_BKS is not None:
            assert made.more_BKS[b, k].sum() == 3 + len(left) == made.more_BKS[b, k, min(stays)]
    assert changed == 3


@torch.no_grad()
def test_a_mean_counts_as_all_that_left() -> None:
    """Attention of one token, of several, and of scores, to slots and to a mean of all others, in float64."""
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(1, n, 64, 8, generator=generator) for n in (4, 2, 2))
    layer, dense = RankedLayer(Ranked(scorer="streaming", merge="mean", **SMALL), 0), torch.float64
    for begin, end in ((0, 40), *((i, i + 1) for i in range(40, 62)), (62, 64)):
        at = slice(begin, end)
        before = None if not begin else copy.deepcopy((layer.heavy(), *layer.side_by_side()))
        queries = Queries(query_BNTH=q[:, :, at], real_BT=None, scale=8**-0.5)
        seen = layer.add(
            New(key_BKTH=k[:, :, at], value_BKTV=v[:, :, at], logits_BKT=-torch.ones(1, 2, end - begin),
                weight_BKT=None, real_BT=None, turn=lambda x: x, queries=queries)
        )  # fmt: skip
        found = attend(None, q[:, :, at], seen, 8**-0.5, True)  # type: ignore[arg-type]
        if before is None:
            continue
        heavy, key, value, _ = before
        if end - begin == 1:  # after the step: slots of before and the new one, or what an eviction has left of them
            heavy, (key, value, _) = layer.heavy(), layer.side_by_side()
        else:
            key, value = (torch.cat((x, new[:, :, at]), 2) for x, new in ((key, k), (value, v)))
        assert heavy is not None
        place, more = heavy
        weight = torch.ones(1, 2, key.shape[2])
        weight[..., place] += more
        for t, n in itertools.product(range(end - begin), range(4)):
            S = key.shape[2] - (end - begin) + t + 1
            logits = key[0, n // 2, :S].to(dense) @ q[0, n, begin + t].to(dense) * 8**-0.5
            parts = weight[0, n // 2, :S] * logits.exp()
            assert_close(found[0, t, n].to(dense), (parts / parts.sum()) @ value[0, n // 2, :S].to(dense))
    heavy = layer.heavy()
    assert heavy is not None
    key, value, there = layer.side_by_side()
    gone = 64 - int(there[0, 0].sum()) + 1  # in one slot, which counts as so many
    assert (heavy[1] == gone - 1).all()
    assert_close(key[:, :, 2], k[:, :, 2 : 2 + gone].mean(2))
    assert_close(value[:, :, 2], v[:, :, 2 : 2 + gone].mean(2))


# ------------------------------------------------------------------------------------------- in models


@pytest.mark.parametrize(("form", "scorer"), PAIRS)
def test_a_budget_for_all_changes_nothing(form: str, scorer: str) -> None:
    method, family = MODELS[form]
    want, _ = run(METHODS[method].convert(parent(family), sites(family)).eval(), tokens(length=30), [20, 28, 29, 30])
    got, _ = run(model_of(form, scorer, ratio=1.0), tokens(length=30), [20, 28, 29, 30])
    assert_close(got, want)


@pytest.mark.parametrize(("form", "scorer"), PAIRS)
@torch.no_grad()
def test_bytes_are_planned_and_a_prompt_sees_everything(form: str, scorer: str) -> None:
    model, ids = model_of(form, scorer), tokens(length=90)
    logits, cache = run(model, ids, [90])
    assert tensor_bytes(cache) == 2 * sum(plan.bytes_at(90) for plan in model.plans)
    assert all((layer.lengths == 23).all() for layer in cache.layers if isinstance(layer, RankedLayer))
    assert torch.equal(logits, run(model_of(form, scorer, ratio=1.0), ids, [90])[0])
    assert_close(model(ids, use_cache=False).logits, logits)


@pytest.mark.parametrize(
    ("form", "scorer", "options"),
    [
        *(("heads", scorer, {}) for scorer in RANKERS),
        *(
            (form, scorer, {"budget": "ada"})
            for form, scorer in (("heads", "h2o"), ("latent", "snapkv"), ("latent", "h2o"))
        ),
        *(("heads", "snapkv", {"budget": budget}) for budget in OVER_LAYERS),
        ("latent", "snapkv", {"budget": "cake"}),
        *(("heads", "h2o", {"merge": merge}) for merge in MERGES),
        ("normed keys", "streaming", {"positions": "cache"}),
        *(("heads", "streaming", {"read": read, "ratio": 1.0, "read_ratio": 2.0}) for read in READERS),
        ("heads", "snapkv", {"budget": "cake", "merge": "d2o", "positions": "cache"}),
    ],
)
@torch.no_grad()
def test_rows_of_a_padded_batch_are_what_they_are_alone(form: str, scorer: str, options: dict[str, Any]) -> None:
    """Each has its own budget; padding before, between and behind the tokens of two prompts, of which two rows get none
    and one token of the second: less than a prompt, behind which slots leave as behind one token."""
    model, ids = model_of(form, scorer, **options), tokens(4, length=70)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    mask[1, 60:64] = 0
    mask[2, 40:64] = 0
    mask[3, 40:63] = 0
    cache, ends = DynamicCache(config=model.config), [40, 64, *range(65, 71)]
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    parts = []
    for begin, end in zip([0, *ends], ends, strict=False):
        parts.append(
            model(
                ids[:, begin:end], attention_mask=mask[:, :end], position_ids=position_ids[:, begin:end],
                use_cache=True, **{cache_argument(model): cache},
            ).logits
        )  # fmt: skip
    logits = torch.cat(parts, 1)
    for row in range(3 if "read" in options else 4):  # what a prompt sees is not chosen
        real = mask[row].bool()
        own_ends = list(dict.fromkeys(int(mask[row, :end].sum()) for end in ends))
        alone, own = run(model, ids[row : row + 1, real], own_ends)
        assert_close(logits[row : row + 1, real], alone)
        together = [found for i, found in enumerate(zip(*contents(cache), strict=True)) if i // _heads(cache) == row]
        for mine, theirs in zip(zip(*contents(own), strict=True), together, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def _heads(cache: DynamicCache) -> int:
    heads: int = cache.layers[0].lengths.shape[1]
    return heads


@torch.no_grad()
def test_tables_shrink_with_what_they_hold() -> None:
    """Whatever was there before slots left: two readings of a prompt, or a cache that had everything."""
    model, ids = model_of("heads", "kvzip"), tokens(length=200)
    _, cache = run(model, ids, [200])
    assert tensor_bytes(cache) == 2 * sum(plan.bytes_at(200) for plan in model.plans)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert tensor_bytes(cache) == 2 * sum(plan.bytes_at(200) for plan in model.plans)


@torch.no_grad()
def test_prompts_are_read_again_and_leave_what_that_asked_for() -> None:
    """Against the weights of a parent that reads the same text twice; a second prompt goes on from there."""
    model, ids = model_of("heads", "kvzip"), tokens(length=60)
    logits, cache = run(model, ids, [40])
    eager = parent("llama").eval()
    eager.set_attn_implementation("eager")
    weights = eager(ids[:, :40].repeat(1, 2), output_attentions=True).attentions
    eager.set_attn_implementation("sdpa")
    everything = run(model_of("heads", "h2o", ratio=1.0), ids, [40])[1]
    for layer, all_slots, attended in zip(cache.layers, everything.layers, weights, strict=True):
        most = attended[:, :, 40:, :40].amax(2).unflatten(1, (layer.lengths.shape[1], -1)).amax(2)
        most[..., :2] = most[..., -4:] = 2.0
        places = most.topk(10, dim=-1).indices.sort(-1).values
        want = all_slots.slots().key_BKSH.gather(2, places[..., None].expand(-1, -1, -1, 16))
        assert_close(layer.slots().key_BKSH[:, :, :10], want)
        assert (layer.lengths == 10).all() and layer.get_seq_length() == 40 and (layer.tokens == 40).all()
    run(model, ids[:, 40:], [20], cache)
    assert all((layer.lengths == 15).all() for layer in cache.layers)
    stock = surgery.cache(parent("llama"), evict="kvzip", ratio=4, recent=4, sinks=2)
    mask = torch.ones_like(ids[:, :40])
    again = parent("llama")(ids[:, :40], attention_mask=mask, **{cache_argument(model): stock}).logits
    assert_close(again, logits)
    for mine, theirs in zip(stock.layers, run(model, ids, [40])[1].layers, strict=True):
        assert_close(mine.slots().key_BKSH, theirs.slots().key_BKSH)
    with pytest.raises(ValueError, match=r"asks for an attention mask of shape \[2, 40\]"):
        model(ids[:, :40], attention_mask=torch.ones(2, 1, 40, 40, dtype=torch.bool).tril(), use_cache=True)
    with pytest.raises(ValueError, match="kvzip 4x: prompts are read twice, and no static cache"):
        model.static_cache(64)


@pytest.mark.parametrize("budget", OVER_LAYERS)
@torch.no_grad()
def test_layers_share_what_all_of_them_may_keep(budget: str) -> None:
    step = {"rewriter": "evict", "scorer": "snapkv", "budget": budget, "recent": 4, "sinks": 2, "observe": 4}
    model, ids = surgery.convert(tiny_model("llama", **FOUR), {"steps": [step]}).eval(), tokens(length=120)
    _, cache = run(model, ids, [100])
    layers = [layer for layer in cache.layers if isinstance(layer, RankedLayer)]
    for _ in range(2):
        held = torch.stack([layer.lengths for layer in layers])  # [L, B, K]
        mean = layers[0].retain.slots_at(int(layers[0].tokens[0]))
        assert (held == held[..., :1]).all() and (held >= 6).all()
        assert (4 * mean - 4 < held[..., 0].sum(0)).all() and (held[..., 0].sum(0) <= 4 * mean).all()
        assert len(held[:, 0, 0].unique()) > 1
        assert all(layer.claim is None for layer in layers)
        run(model, ids[:, 100:], [20], cache)  # a new question divides anew
    kept, first = copy.deepcopy(cache), layers[0]
    assert kept.layers[0].peers[0] is kept.layers[0] is not first


@pytest.mark.parametrize("budget", OVER_LAYERS)
@torch.no_grad()
def test_layers_share_beside_heads_that_keep_everything(budget: str) -> None:
    whole = {0: [1], 2: [0, 3]}
    step = {"rewriter": "evict", "scorer": "snapkv", "budget": budget, "recent": 4, "sinks": 2, "observe": 4}
    model = surgery.convert(tiny_model("llama", **FOUR), {"steps": [step | {"whole": whole}]}).eval()
    ids, cache = tokens(length=120), None
    for seen, new in ((100, 100), (120, 20)):
        _, cache = run(model, ids[:, seen - new : seen], [new], cache)
        mean = cache.layers[0].retain.slots_at(seen)
        shared = 0
        for i, layer in enumerate(cache.layers):
            some = whole.get(i, [])
            assert (layer.lengths[:, some] == seen).all()
            lengths = layer.lengths[:, [k for k in range(4) if k not in some]]
            assert (lengths == lengths[:, :1]).all() and (lengths >= 6).all()
            shared += lengths.sum(-1)
        assert (13 * mean - 16 < shared).all() and (shared <= 13 * mean).all()


@pytest.mark.parametrize("merge", MERGES)
@torch.no_grad()
def test_merging_changes_no_numbers_of_slots_and_nothing_where_none_leave(
    merge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Neighbours, "alike", -0.5)
    ids = tokens(length=100)
    plain, plain_cache = run(model_of("heads", "h2o"), ids, [60, *range(61, 101)])
    made, cache = run(model_of("heads", "h2o", merge=merge), ids, [60, *range(61, 101)])
    assert torch.equal(made[:, :60], plain[:, :60]) and not torch.allclose(made[:, 60:], plain[:, 60:])
    counts = 4 * 2 * 2 * 2 if MERGES[merge].counts else 0  # of each head in two sequences and two layers
    assert tensor_bytes(cache) == tensor_bytes(plain_cache) + counts
    model = model_of("heads", "h2o", merge=merge)
    assert tensor_bytes(run(model, ids, [60])[1]) == 2 * sum(plan.bytes_at(60) for plan in model.plans)
    assert_close(run(model_of("heads", "h2o", merge=merge, ratio=1.0), ids, [60, *range(61, 101)])[0], plain_of(ids))


def plain_of(ids: Tensor) -> Tensor:
    return run(model_of("heads", "h2o", ratio=1.0), ids, [60, *range(61, 101)])[0]


@pytest.mark.parametrize("form", ["heads", "normed keys", "readers"])
@torch.no_grad()
def test_positions_in_the_cache_are_those_of_a_text_without_what_left(form: str) -> None:
    """One layer's sinks and newest tokens, as if nothing had ever stood between them; layer 0 reads no other layer."""
    model, ids = model_of(form, "streaming", positions="cache"), tokens(length=64)
    _, cache = run(model, ids, [40, *range(41, 65)])
    layer = cache.layers[0]
    held = int(layer.lengths[0, 0])
    assert 16 <= held < 64 and (layer.lengths == held).all()
    short = torch.cat((ids[:, :2], ids[:, 64 - held + 2 :]), dim=1)
    # The same tokens at positions that end with the true one.
    at = torch.arange(64 - held, 64).expand(2, -1)
    whole = DynamicCache(config=model.config)
    reference = model_of(form, "streaming", positions="cache", ratio=1.0)
    reference(short, position_ids=at, use_cache=True, **{cache_argument(model): whole})
    want = whole.layers[0].slots()
    got = layer.slots()
    assert_close(got.key_BKSH[:, :, :held], want.key_BKSH[:, :, :held])
    assert_close(got.value_BKSV[:, :, :held], want.value_BKSV[:, :, :held])
    _, text = run(model_of(form, "streaming"), ids, [40, *range(41, 65)])
    assert not torch.allclose(text.layers[0].slots().key_BKSH[:, :, :2], got.key_BKSH[:, :, :2], atol=1e-3)


def capped_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **named: Any) -> Any:
    """Each query against keys that are turned for it, so that none seems more than 10 tokens away."""
    rotary, (N, T) = module.test_rotary, query.shape[1:3]
    key, value = (x.repeat_interleave(N // x.shape[1], dim=1) for x in (key, value))
    out = []
    for t in range(T):
        by = (t - torch.arange(t + 1) - 10).clamp_min(0)
        angle = by[:, None].double() * rotary.inv_freq.double()
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = key[:, :, : t + 1].chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        scores = (query[:, :, t : t + 1] @ turned.mT) * module.scaling
        scores = scores if mask is None else scores.masked_fill(~mask[:, :, t : t + 1, : t + 1], -1e30)
        out.append(scores.softmax(-1) @ value[:, :, : t + 1])
    return torch.cat(out, 2).transpose(1, 2), None


@pytest.mark.parametrize("form", ["heads", "normed keys"])
@torch.no_grad()
def test_no_slot_is_seen_further_away_than_the_cap(form: str) -> None:
    """While all slots are there, as stock attention with keys that are turned for each query; also behind padding."""
    family, ids = MODELS[form][1], tokens(length=60)
    model, stock = (
        model_of(form, "streaming", positions="capped", distance=10, ratio=1.0),
        copy.deepcopy(parent(family)),
    )
    for layer in stock.model.layers:
        layer.self_attn.test_rotary = stock.model.rotary_emb
    AttentionInterface.register("capped_test", capped_attention)
    AttentionMaskInterface.register("capped_test", sdpa_mask)
    stock.eval().config._attn_implementation = "capped_test"
    want = stock(ids, use_cache=False).logits
    for ends in ([60], [8, 40, *range(41, 61)]):
        assert_close(run(model, ids, ends)[0], want)
    assert not torch.allclose(run(model_of(form, "streaming", ratio=1.0), ids, [60])[0], want, atol=1e-3)
    far = model_of(form, "streaming", positions="capped", distance=60, ratio=1.0)
    assert_close(run(far, ids, [50, *range(51, 61)])[0], run(model_of(form, "streaming", ratio=1.0), ids, [60])[0])
    mask = torch.ones_like(ids)
    mask[0, :12] = 0
    at, cache = (mask.cumsum(-1) - 1).clamp_min(0), DynamicCache(config=model.config)
    parts = [
        model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=at[:, a:b], **{cache_argument(model): cache}).logits
        for a, b in ((0, 40), *((i, i + 1) for i in range(40, 60)))
    ]
    alone = stock(ids[:1, 12:], use_cache=False).logits
    assert_close(torch.cat(parts, 1)[:1, 12:], alone)
    assert_close(torch.cat(parts, 1)[1:], want[1:])


@pytest.mark.parametrize("scorer", [name for name, ranker in RANKERS.items() if not ranker.attends])
@torch.no_grad()
def test_slots_know_the_order_of_their_tokens(scorer: str) -> None:
    model, ids = model_of("heads", scorer, positions="capped", distance=10), tokens(length=64)
    _, cache = run(model, ids, [40])
    assert tensor_bytes(cache) == 2 * sum(plan.bytes_at(40) for plan in model.plans)
    run(model, ids[:, 40:], range(1, 25), cache)
    everything = run(model_of("heads", "h2o", ratio=1.0), ids, [64])[1].layers[0].slots().key_BKSH
    slots = cache.layers[0].slots()
    there = slots.expires_BKS > 0
    assert there.any() and (there.sum(-1) < 40).all()
    want = everything.gather(2, slots.born_BKS.long()[..., None].expand_as(slots.key_BKSH))
    assert_close(slots.key_BKSH[there], want[there])


@torch.no_grad()
def test_streaming_keeps_the_same_whether_tokens_came_at_once_or_alone() -> None:
    model, ids = model_of("heads", "streaming"), tokens(length=120)
    _, cache = run(model, ids, [40, *range(41, 121)])
    layer = cache.layers[0]
    budget = int(layer.retain.slots_at(120))
    assert budget <= int(layer.lengths.max()) < budget + layer.retain.page
    _, at_once = run(model, ids, [120])
    # Between two evictions there are more; the budget's are among them. Layer 0 reads the same in both.
    for held, wanted in zip(contents(cache)[0], contents(at_once)[0], strict=True):
        assert all(bool((held - slot).abs().amax(-1).min() < 1e-5) for slot in wanted)


@pytest.mark.parametrize("scorer", RANKERS)
@torch.no_grad()
def test_while_decoding_slots_leave_or_stay_as_the_plan_says(scorer: str) -> None:
    model, ids = model_of("heads", scorer), tokens(length=100)
    _, cache = run(model, ids, [60, *range(61, 101)])
    held, follows = int(cache.layers[0].lengths.max()), RANKERS[scorer].while_decoding
    assert (held <= 25 + 16) == follows
    assert follows or held == 15 + 40
    run(model, ids[:, :8], [8], cache)  # a new question
    assert int(cache.layers[0].lengths.max()) == 27


@pytest.mark.parametrize(("scorer", "budget"), [("snapkv", "ada"), ("h2o", "uniform")])
@torch.no_grad()
def test_heads_that_keep_everything_do_and_the_plan_counts_them(scorer: str, budget: str) -> None:
    step = {"rewriter": "evict", "scorer": scorer, "budget": budget, "recent": 4, "sinks": 2, "ratio": 8}
    step |= {"observe": 4} if scorer == "snapkv" else {}
    plan = surgery.plan(anatomy("llama", **FOUR), {"steps": [step | {"whole": {"1": [3, 0], 2: [0, 1, 2, 3]}}]})
    assert plan.after[2].retain is None and "all of heads 0, 3" in str(plan)
    assert plan.after[1].bytes_per_token == round(512 * (2 / 4 + 2 / 4 / 8))
    assert LayerPlan.from_dict(json.loads(json.dumps(plan.after[1].to_dict()))) == plan.after[1]
    model, ids = surgery.convert(tiny_model("llama", **FOUR), plan.recipe).eval(), tokens(length=120)
    _, cache = run(model, ids, [80])
    held = [layer.lengths for layer in cache.layers if isinstance(layer, RankedLayer)]
    assert [lengths.sum(-1).tolist() for lengths in held] == [[40, 40], [80 + 80 + 20] * 2, [40, 40]]
    assert (held[1][:, [0, 3]] == 80).all()
    if budget == "uniform":
        assert tensor_bytes(cache) == 2 * plan.cache_bytes(80)
    run(model, ids[:, 80:], range(1, 41), cache)
    assert (cache.layers[1].lengths[:, [0, 3]] == 120).all()
    assert (cache.layers[1].lengths[:, [1, 2]].sum(-1) < 2 * (15 + 16)).all() == RANKERS[scorer].while_decoding
    with pytest.raises(surgery.PlanError, match="layer 1: .*whole: names heads 0, 4; it caches 4"):
        surgery.plan(anatomy("llama", **FOUR), {"steps": [step | {"whole": {1: [0, 4]}}]})
    with pytest.raises(surgery.PlanError, match="names layer 3, where no tokens leave. They do in 0-1"):
        surgery.plan(anatomy("llama", **FOUR), {"steps": [step | {"whole": {3: [0]}, "layers": "0-1"}]})


def test_each_step_gives_its_layers_its_own_options() -> None:
    steps = [STEP | {"layers": "0-1"}, STEP | {"layers": "2-3", "ratio": 2, "pool": 3, "merge": "d2o"}]
    first, _, second, _ = (layer.retain for layer in surgery.plan(anatomy("llama", **FOUR), {"steps": steps}).after)
    assert isinstance(first, Ranked) and isinstance(second, Ranked)
    assert (first.ratio, first.pool, first.merge) == (4, 5, None)
    assert (second.ratio, second.pool, second.merge) == (2, 3, "d2o")


@torch.no_grad()
def test_separators_stay_and_are_found_in_the_tokenizer(tmp_path: Path) -> None:
    """Ids come from the recipe, or from the tokenizer, and stand in the config; stock models do alike."""
    words = word_tokenizer(100)
    core = json.loads(words.backend_tokenizer.to_str())
    vocab = core["model"]["vocab"]
    for word, mark in (("w20", "."), ("w21", ";"), ("w22", "..."), ("w23", "?")):
        vocab[mark] = vocab.pop(word)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), pad_token="<pad>")
    step = {"rewriter": "evict", "scorer": "sepllm", "ratio": 4, "recent": 4, "sinks": 2}
    parent_model = tiny_model("llama")
    assert "those that the tokenizer has" in " ".join(str(surgery.plan(anatomy("llama"), {"steps": [step]})).split())
    with pytest.raises(surgery.PlanError, match="sepllm asks which .* the model comes without a tokenizer. Give their"):
        surgery.convert(parent_model, {"steps": [step]})
    with pytest.raises(surgery.PlanError, match="and the tokenizer has none"):
        surgery.convert(parent_model, {"steps": [step]}, tokenizer=words)
    model = surgery.convert(parent_model, {"steps": [step]}, tokenizer=tokenizer).eval()
    assert [plan.retain.separators for plan in model.plans] == [(20, 21, 23)] * 2
    ids = tokens(length=80).clamp_min(30)
    ids[0, 7:50:9], ids[1, 60] = torch.tensor([20, 21, 23, 20, 21]), 23
    everything = run(model_of("heads", "h2o", ratio=1.0), ids, [80])[1].layers[0].slots().key_BKSH
    logits, cache = run(model, ids, [80])
    want = [[0, 1, 7, 16, 25, 34, 43, *range(67, 80)], [0, 1, 60, *range(63, 80)]]
    for row, places in enumerate(want):
        assert_close(cache.layers[0].slots().key_BKSH[row, :, :20], everything[row][:, places])
    stock = surgery.cache(parent_model, evict="sepllm", ratio=4, recent=4, sinks=2, separators=[20, 21, 23])
    assert_close(parent_model.eval()(ids, **{cache_argument(model): stock}).logits, logits)
    assert_close(stock.layers[0].slots().key_BKSH, cache.layers[0].slots().key_BKSH)
    embedded = parent_model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="the model was called with embeddings. Pass input_ids"):
        model(inputs_embeds=embedded, use_cache=True)
    model(inputs_embeds=embedded, use_cache=False)
    surgery.save(model, tmp_path / "child")
    assert surgery.load(tmp_path / "child").plans == model.plans
    parent_model.save_pretrained(tmp_path / "parent")
    tokenizer.save_pretrained(tmp_path / "parent")
    plan = surgery.convert_checkpoint(tmp_path / "parent", {"steps": [step]}, tmp_path / "other")
    assert plan.after == model.plans


@torch.no_grad()
def test_fixed_slots_bound_the_cache_however_long_it_runs() -> None:
    step = {"rewriter": "evict", "scorer": "tova", "slots": 20, "recent": 4, "sinks": 2}
    plan = surgery.plan(anatomy("llama"), {"steps": [step]})
    assert "tova 20 slots" in str(plan) and plan.cache_bytes(100) == plan.cache_bytes(10_000)
    assert plan.bytes_per_token == round(256 / (256 / 20)) * 2
    model, ids = surgery.convert(tiny_model("llama"), {"steps": [step]}).eval(), tokens(length=200)
    _, cache = run(model, ids, [50])
    assert tensor_bytes(cache) == 2 * plan.cache_bytes(50)
    most = 0
    for end in range(51, 201):
        run(model, ids[:, end - 1 : end], [1], cache)
        most = max(most, int(cache.layers[0].lengths.max()))
    assert most == 20 + 16 - 1


@pytest.mark.parametrize("scorer", ["snapkv", "h2o"])
def test_evaluation_decodes_from_what_is_left(scorer: str) -> None:
    """Of prompts, where slots leave behind those alone; their parent beside them on the same path."""
    found = surgery.evaluate(model_of("heads", scorer), baseline=parent("llama"), text=tokens(length=80))
    prompt, decoded = (found.differences[path].kl for path in ("prefill", "decode"))
    assert prompt.value < 1e-6 < 1e-3 < decoded.value
    assert ("the first 40 at once, then one token at a time" in str(found)) == (scorer == "snapkv")


@pytest.mark.parametrize("scorer", ["snapkv", "h2o"])
@torch.no_grad()
def test_beams_copies_and_turns(scorer: str) -> None:
    model, ids = model_of("heads", scorer), tokens(length=60)
    beams = model.generate(ids, **GREEDY | {"max_new_tokens": 20, "min_new_tokens": 20}, num_beams=3)
    assert beams.shape == (2, 80)
    _, cache = run(model, ids, [60])
    kept = copy.deepcopy(cache)
    first, _ = run(model, ids[:, :30], [10, *range(11, 31)], cache)
    again, _ = run(model, ids[:, :30], [10, *range(11, 31)], kept)
    assert torch.equal(first, again)
    swapped = run(model, ids, [60])[1]
    swapped.reorder_cache(torch.tensor([1, 0]))
    turned, _ = run(model, ids[:, :30].flip(0), [10, *range(11, 31)], swapped)
    assert_close(turned.flip(0), first)
    with pytest.raises(ValueError, match="cannot be taken back"):
        kept.crop(-1)


@torch.no_grad()
def test_in_training_no_cache_is_gone_on_from() -> None:
    model, ids = copy.deepcopy(model_of("heads", "snapkv")), tokens(length=40)
    _, cache = run(model, ids, [40])
    with pytest.raises(ValueError, match="was in training when tokens came"):
        model.train().generate(ids, **GREEDY)
    with pytest.raises(ValueError, match="no cache keeps"):
        run(model, ids, [1], cache)
    assert torch.equal(model(ids).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize(("form", "scorer", "budget"), [("heads", "expected", "ada"), ("latent", "snapkv", "cake")])
@torch.no_grad()
def test_scores_of_prompts_run_compiled_in_static_caches(form: str, scorer: str, budget: str) -> None:
    model, ids, graphs = model_of(form, scorer, budget=budget), tokens(length=60), []
    want, dynamic = run(model, ids, [50, *range(51, 61)])
    cache = model.static_cache(80, ratio=2.0)  # 13 slots of the prompt, and what is decoded

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    step = torch.compile(model.forward, backend=backend, fullgraph=True)
    parts = [model(ids[:, :50], use_cache=True, **{cache_argument(model): cache}).logits]
    for i in range(50, 60):
        now = {"attention_mask": (torch.arange(80) <= i).long().expand(2, -1), "position_ids": torch.full((2, 1), i)}
        parts.append(step(ids[:, i : i + 1], use_cache=True, **{cache_argument(model): cache}, **now).logits)
    torch.compiler.reset()
    assert_close(torch.cat(parts, 1), want)
    assert len(graphs) == 1
    for mine, theirs in zip(cache.layers, dynamic.layers, strict=True):
        assert torch.equal(mine.lengths, theirs.lengths)
    sized = sum(plan.static_bytes(80, 2.0) for plan in model.plans)
    assert tensor_bytes(cache) == 2 * sized < 2 * sum(plan.static_bytes(80) for plan in model.plans)
    with pytest.raises(RuntimeError, match="static cache is full"):
        run(model, ids, [8, *range(9, 61)], model.static_cache(80, ratio=4.0))


def test_what_has_no_form_is_refused() -> None:
    model = model_of("heads", "h2o")
    with pytest.raises(ValueError, match="h2o 4x: slots leave while tokens are decoded, .*Use a dynamic cache"):
        model.generate(tokens(), cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="h2o 4x: slots leave while tokens are decoded"):
        model.static_cache(64)
    _, cache = run(model, tokens(), [20])
    with pytest.raises(ValueError, match="layer 0: the given cache keeps tokens by h2o 4x, and its plan says tova 4x"):
        run(model_of("heads", "tova"), tokens(), [20], cache)
    data = model.plans[0].to_dict()
    assert LayerPlan.from_dict(data) == model.plans[0]
    for name, value in (("scorer", "snap"), ("budget", "adda"), ("merge", "d20"), ("read", "qest")):
        with pytest.raises(ValueError, match=f"layer 0: tokens leave by the .* '{value}', which is not known here"):
            LayerPlan.from_dict(data | {"retain": data["retain"] | {name: value}})


@functools.cache
def anatomy(family: str, **changes: Any) -> surgery.Anatomy:
    return surgery.examine(tiny_model(family, **changes))


FOUR = {"num_hidden_layers": 4, "num_key_value_heads": 4}
STEP = {"rewriter": "evict", "scorer": "snapkv", "ratio": 4, "recent": 8, "observe": 8, "sinks": 2}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scorer": "snapvk"}, "no scorer 'snapvk'. Did you mean 'snapkv'"),
        ({"budget": "adda"}, "no budget 'adda'. Did you mean 'ada'"),
        (
            {"scorer": "h2o", "observe": None, "budget": "cake"},
            "h2o leave while tokens are decoded, too. Use a scorer that",
        ),
        (
            {"scorer": "nacl", "budget": "prefix"},
            "those of nacl are no parts of attention. Use snapkv, kvzip, or another budget",
        ),
        ({"scorer": "kvzip", "observe": None, "budget": "cake"}, "kvzip at a second reading of it. Use the budget ada"),
        ({"merge": "d20"}, "no merging 'd20'. Did you mean 'd2o'"),
        ({"merge": "cam"}, "snapkv has no such sum. Use h2o, keyformer, or another merging: d2o, lookm"),
        ({"window": 100}, "window: the score snapkv does not read it. It reads ratio, sinks, page, budget, slots"),
        ({"scorer": "h2o"}, "observe: the score h2o does not read it"),
        ({"scorer": "window", "observe": None}, "recent: the score window does not read it"),
        ({"scorer": "window", "whole": {0: [0]}, "observe": None, "recent": None}, "whole: the score window does not"),
        ({"observe": 9}, "observe: 9 queries, but only the newest 8 tokens are sure to stay"),
        ({"pool": 4}, "pool: 4 must be odd"),
        ({"separators": [3]}, "separators: the score snapkv does not read it"),
        ({"scorer": "sepllm", "observe": None, "separators": []}, "separators: \\[\\]; give at least one id"),
        ({"distance": 9}, "distance: only positions: capped reads it"),
        ({"scorer": "knorm", "observe": None, "positions": "capped", "distance": 0}, "distance: 0 must be at least 1"),
        ({"positions": "capped"}, "snapkv goes by attention, .* Use streaming, sepllm, knorm, or positions: cache"),
        ({"recent": 0}, "recent: 0 must be at least 1"),
        ({"slots": 99, "ratio": 3}, "slots: 99 slots and ratio 3: give one of them"),
        ({"slots": 10}, "observe: slots: 10 are those that always stay, so that no slot is chosen by its score"),
        ({"ratio": 1, "observe": None, "pool": 3}, "pool: with ratio: 1 nothing leaves"),
        ({"slots": 9}, "slots: 9 are fewer than the 10 that always stay"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(surgery.RecipeError, match=sentence):
        surgery.plan(tiny_model("llama"), {"steps": [STEP | changes]})


def test_plans_refuse_what_cannot_be_scored_and_name_what_is_left() -> None:
    mla = {"rewriter": "mla", "rank": 24, "rope_dims": 8}
    expected = {"rewriter": "evict", "scorer": "expected", "recent": 8}
    with pytest.raises(surgery.PlanError, match="layer 0: .* the layer caches a latent. Use snapkv or h2o"):
        surgery.plan(anatomy("llama"), {"steps": [mla, expected]})
    with pytest.raises(surgery.PlanError, match="ratio: 30 is out of reach"):
        surgery.plan(anatomy("llama"), {"steps": [STEP | {"ratio": 30}]})
    plan = surgery.plan(anatomy("gemma2"), {"steps": [STEP]})
    assert [layer.retain is None for layer in plan.after] == [True, False]
    assert "layers 0 keep their windows as they are" in " ".join(str(plan).split())
    with pytest.raises(surgery.PlanError, match="layer 0: .* sees the newest 8 tokens only"):
        surgery.plan(anatomy("gemma2"), {"steps": [STEP | {"layers": "0"}]})
    twice = {"rewriter": "evict", "scorer": "kvzip", "recent": 8}
    with pytest.raises(surgery.PlanError, match="kvzip reads each prompt twice, and layers 0 would keep it twice"):
        surgery.plan(anatomy("gemma2"), {"steps": [twice]})
    with pytest.raises(surgery.PlanError, match="kvzip reads prompts again, at positions behind them"):
        surgery.plan(anatomy("gpt2"), {"steps": [twice]})
    capped = {"rewriter": "evict", "scorer": "streaming", "recent": 8, "positions": "capped"}
    plan = surgery.plan(anatomy("llama"), {"steps": [capped]})
    assert plan.after[0].retain.distance == 256 and "seen at most 256 away" in plan.after[0].retain.label()
    with pytest.raises(surgery.PlanError, match="positions: capped turns keys and values, and the layer caches a"):
        surgery.plan(anatomy("llama"), {"steps": [mla, capped]})
    with pytest.raises(surgery.PlanError, match="layer 0: .* scores know no distance that could be capped"):
        surgery.plan(anatomy("gpt2"), {"steps": [capped]})
    for option in ({"merge": "d2o"}, {"positions": "cache"}):
        with pytest.raises(surgery.PlanError, match="layer 0: .* keys and values, and the layer caches a latent"):
            surgery.plan(anatomy("llama"), {"steps": [mla, STEP | option]})
        plan = surgery.plan(anatomy("llama"), {"steps": [STEP | option]})
        assert LayerPlan.from_dict(json.loads(json.dumps(plan.after[0].to_dict()))) == plan.after[0]
        assert ("d2o merges" in str(plan)) == ("merge" in option)
        assert ("close up when others leave" in str(plan)) == ("positions" in option)
    pyramid = surgery.plan(anatomy("llama", **FOUR), {"steps": [STEP | {"budget": "pyramid"}]})
    assert [layer.retain.depth for layer in pyramid.after] == [0, 1 / 3, 2 / 3, 1]
    assert "static" in str(pyramid)
    h2o = surgery.plan(anatomy("llama"), {"steps": [{"rewriter": "evict", "scorer": "h2o", "recent": 8}]})
    assert "static" not in str(h2o)


# ------------------------------------------------------------------------------------------- stock models


@pytest.mark.parametrize(
    ("family", "scorer", "budget"),
    [
        ("llama", "snapkv", "cake"),
        ("qwen3", "h2o", "uniform"),
        *(pytest.param(family, "tova", "pyramid", marks=pytest.mark.slow) for family in ("gpt_neox", "gpt2", "phi3")),
    ],
)
def test_stock_models_evict_as_converted_ones(family: str, scorer: str, budget: str) -> None:
    model, ids = tiny_model(family).eval(), tokens(length=60)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    options = {"ratio": 4, "recent": 8, "sinks": 2, "budget": budget} | ({"observe": 8} if scorer == "snapkv" else {})
    child = surgery.convert(model, {"steps": [{"rewriter": "evict", "scorer": scorer, **options}]}).eval()
    want = child.generate(ids, attention_mask=mask, **GREEDY, return_dict_in_generate=True)
    plain = model.generate(ids, attention_mask=mask, **GREEDY)
    for _ in range(2):
        cache = surgery.cache(model, evict=scorer, **options)
        assert torch.equal(
            model.generate(ids, attention_mask=mask, **GREEDY, **{cache_argument(model): cache}), want.sequences
        )
        assert tensor_bytes(cache) == tensor_bytes(want.past_key_values)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), plain)  # other caches are as they were
    steps = []
    for places in (0, 2, 4):  # arguments that come by their place
        cache = surgery.cache(model, "int4", evict=scorer, **options)
        for new, seen in ((ids, mask), (ids[:, :1], torch.cat((mask, mask[:, -1:]), 1))):
            positions = (seen.cumsum(-1) - 1).clamp_min(0)[:, -new.shape[1] :]
            given = [new, seen, positions, cache]
            names = ["input_ids", "attention_mask", "position_ids", cache_argument(model)]
            steps.append(model(*given[:places], **dict(zip(names[places:], given[places:], strict=True))).logits)
    assert all(torch.equal(logits, steps[i % 2]) for i, logits in enumerate(steps))
    with pytest.raises(ValueError, match="an attention mask of shape"):
        model(ids, attention_mask=mask[:, :3], **{cache_argument(model): cache})
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_passes_of_two_threads_by_one_stock_model_do_not_disturb_each_other() -> None:
    model, ids, found = tiny_model("llama"), tokens(length=60), []

    def says() -> Tensor:
        cache = surgery.cache(model, evict="h2o", ratio=3, recent=4, sinks=2)
        return run(model, ids, [40, 41, 60], cache)[0]

    def from_another_thread(*_: Any) -> None:
        handle.remove()
        other = threading.Thread(target=lambda: found.append(says()))
        other.start()
        other.join()

    want = says()
    handle = model.model.layers[0].register_forward_hook(from_another_thread)  # in the middle of a pass
    found.append(says())
    assert len(found) == 2 and all(torch.equal(logits, want) for logits in found)
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_copies_of_a_stock_model_read_prompts_again_as_often() -> None:
    model, ids = tiny_model("llama"), tokens(length=100)
    found = []
    for turn in range(3):
        # Copies of a model whose attention hands its queries to caches by now.
        stock = (lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)))[turn](model)
        cache = surgery.cache(stock, evict="kvzip", ratio=3, recent=4, sinks=2)
        found.append(run(stock, ids, [40, 60, 61, 80, 100], cache)[0])
    assert all(torch.equal(logits, found[0]) for logits in found)


@torch.no_grad()
def test_an_adapter_counts_in_what_the_output_makes_of_values() -> None:
    peft = pytest.importorskip("peft")
    model, ids = copy.deepcopy(model_of("heads", "critical")), tokens(length=60)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], r=8)).eval()
    random = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    ends = [40, *range(41, 61)]
    logits, cache = run(adapted.get_base_model(), ids, ends)
    merged_logits, merged_cache = run(adapted.merge_and_unload(), ids, ends)
    assert_close(logits, merged_logits)
    for one, other in zip(contents(cache), contents(merged_cache), strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scorer", ["h2o", "snapkv", "critical", "kvzip", "streaming"])
@torch.no_grad()
def test_what_leaves_under_autocast_is_as_much_as_without(scorer: str) -> None:
    model, ids, ends = model_of("heads", scorer), tokens(length=60), [40, *range(41, 61)]
    wanted, plain = run(model, ids, ends)
    with torch.autocast("cpu", torch.bfloat16):
        found, cache = run(model, ids, ends)
    prompt = (found - wanted)[:, :40].norm() / wanted[:, :40].norm()
    assert 0 < prompt < 0.05  # bfloat16, and nothing has left yet
    assert found.isfinite().all()
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(layer.state["lengths"], other.state["lengths"])


def test_stock_models_that_hide_their_queries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    with pytest.raises(surgery.PlanError, match="runs with attn_implementation 'eager'"):
        surgery.cache(eager, evict="knorm", recent=8)
    with pytest.raises(surgery.PlanError, match="reads queries before their rotation"):
        surgery.cache(tiny_model("llama"), evict="expected", recent=8)
    with pytest.raises(surgery.PlanError, match="positions: cache turns keys further"):
        surgery.cache(tiny_model("llama"), evict="streaming", recent=8, positions="cache")
    with pytest.raises(surgery.PlanError, match="no score 'window' that orders slots"):
        surgery.cache(tiny_model("llama"), evict="window")
    with pytest.raises(surgery.PlanError, match="evict: stock models let tokens go in dynamic caches alone"):
        surgery.cache(tiny_model("llama"), "int8", evict="snapkv", max_cache_len=64)
    model, other = tiny_model("llama").eval(), tiny_model("llama").eval()
    cache = surgery.cache(model, evict="knorm", recent=8)
    other(tokens(), **{cache_argument(model): cache})
    with pytest.raises(RuntimeError, match="layer 0: nobody asked for the keys .* belongs to another model"):
        other(tokens()[:, :1], **{cache_argument(model): cache})
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, AttentionInterface()["sdpa"])
    with pytest.raises(RuntimeError, match="layer 0: .* handed it no queries"):
        model(tokens(), **{cache_argument(model): cache})
    assert model.config._attn_implementation == "sdpa"
