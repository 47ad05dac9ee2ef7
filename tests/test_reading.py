"""Steps that read fewer slots than there are: what they choose, that they read no more, and what plans say."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import tiny_model
from gated_models import run, tokens
from methods import METHODS, merged, parent, sites
from torch import Tensor
from transformers import PreTrainedModel

import surgery
from surgery.measure.memory import tensor_bytes
from surgery.runtime.calling import cache_argument
from surgery.runtime.layout import LayerPlan, Ranked
from surgery.runtime.paged_attention import attend
from surgery.runtime.queries import Queries
from surgery.runtime.ranked_cache import RankedLayer
from surgery.runtime.reading import READERS
from surgery.runtime.slots import New

KEPT: dict[str, Any] = {"scorer": "streaming", "ratio": 1.0, "window": 4, "sinks": 2}
STEP = {"rewriter": "evict", "scorer": "streaming", "ratio": 1, "recent": 4, "sinks": 2}
FORMS = {"heads": ("identity", "llama"), "unequal groups": ("unequal_groups", "llama"), "readers": ("shared", "llama")}


def model_of(form: str, **options: Any) -> PreTrainedModel:
    method, family = FORMS[form]
    ranked = merged(METHODS[method], [family], "ranked", **KEPT | options)
    shares = METHODS[method].shares
    made = ranked if not shares else type(ranked)(METHODS[method].plan_and_weights, [family], shares, ranked.retain)
    return made.convert(parent(family), sites(family)).eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("read", READERS)
def test_reading_everything_changes_nothing(read: str, form: str) -> None:
    method, family = FORMS[form]
    ids, ends = tokens(length=80), [40, 48, *range(49, 81)]
    want = run(METHODS[method].convert(parent(family), sites(family)).eval(), ids, ends)[0]
    assert_close(run(model_of(form, read=read, read_ratio=1.0), ids, ends)[0], want)
    less = run(model_of(form, read=read, read_ratio=3.0), ids, ends)[0]
    assert torch.equal(less[:, :40], run(model_of(form), ids, ends)[0][:, :40])  # prompts read everything
    assert not torch.allclose(less[:, 48:], want[:, 48:], atol=1e-3)


class Read:
    """A layer of four query heads on two KV heads, and what loops say that a step reads of it."""

    def __init__(self, read: str, ratio: float) -> None:
        generator = torch.Generator().manual_seed(4)
        self.q, self.k, self.v = (torch.randn(2, n, 90, 8, generator=generator) for n in (4, 2, 2))
        self.layer = RankedLayer(Ranked(**KEPT, read=read, read_ratio=ratio), 0)
        self.ratio = ratio

    def add(self, begin: int, end: int) -> Any:
        at = slice(begin, end)
        return self.layer.add(
            New(key_BKTH=self.k[:, :, at], value_BKTV=self.v[:, :, at], logits_BKT=-torch.ones(2, 2, end - begin),
                weight_BKT=None, real_BT=None, turn=lambda x: x,
                queries=Queries(query_BNTH=self.q[:, :, at], real_BT=None, scale=8**-0.5))
        )  # fmt: skip

    def attended(self, t: int, slots: dict[tuple[int, int], list[int]]) -> Tensor:
        """[B, N, V] of the query at t, over those slots of each sequence and KV head."""
        out = torch.empty(2, 4, 8, dtype=torch.float64)
        for b, n in itertools.product(range(2), range(4)):
            some = slots[b, n // 2]
            logits = self.k[b, n // 2, some].double() @ self.q[b, n, t].double() * 8**-0.5
            out[b, n] = logits.softmax(0) @ self.v[b, n // 2, some].double()
        return out

    def quest(self, t: int) -> dict[tuple[int, int], list[int]]:
        found = {}
        for b, k in itertools.product(range(2), range(2)):
            pages = [list(range(i, min(i + 16, t + 1))) for i in range(0, t + 1, 16)]
            wanted = max(2, -(-max(6, -(-(t + 1) // self.ratio)) // 16))
            bounds = []
            for number, page in enumerate(pages):
                low, high = self.k[b, k, page].amin(0), self.k[b, k, page].amax(0)
                each = [float(torch.maximum(q * low, q * high).sum()) for q in self.q[b, 2 * k : 2 * k + 2, t]]
                bounds.append(float("inf") if number in (0, len(pages) - 1) else max(each))
            best = sorted(range(len(pages)), key=lambda i: -bounds[i])[: int(wanted)]
            found[b, k] = [slot for i in sorted(best) for slot in pages[i]]
        return found

    def sparq(self, t: int) -> tuple[dict[tuple[int, int], list[int]], Tensor]:
        """The slots, and what the mean over them weighs, [B, N]."""
        found, part = {}, torch.zeros(2, 4, dtype=torch.float64)
        wanted = int(max(6, -(-(t + 1) // self.ratio)))
        for b, k in itertools.product(range(2), range(2)):
            mine = range(2 * k, 2 * k + 2)
            channels = self.q[b, 2 * k : 2 * k + 2, t].abs().sum(0).topk(2).indices
            weights = {}
            for n in mine:
                q = self.q[b, n, t].double()
                scale = (8 * q[channels].abs().sum() / q.abs().sum()).sqrt()
                weights[n] = (self.k[b, k, : t + 1, channels].double() @ q[channels] / scale).softmax(0)
            score = sum(weights.values())
            always = [0, 1, *range(t - 3, t + 1)]
            order = sorted(range(t + 1), key=lambda i: (i not in always, -float(score[i])))
            found[b, k] = order[:wanted]
            for n in mine:
                part[b, n] = weights[n][found[b, k]].sum()
        return found, part


@pytest.mark.parametrize("ratio", [2.0, 5.0])
@torch.no_grad()
def test_quest_reads_the_pages_with_the_largest_bounds_and_no_others(ratio: float) -> None:
    read = Read("quest", ratio)
    read.add(0, 70)
    for t in range(70, 90):
        seen = read.add(t, t + 1)
        chosen, layer = read.quest(t), read.layer
        q = read.q[:, :, t : t + 1]
        whole = layer.pool.keys.clone(), layer.pool.values.clone()
        for b, k in itertools.product(range(2), range(2)):  # what is not chosen would show
            for place in {slot // 16 for slot in range(t + 1)} - {slot // 16 for slot in chosen[b, k]}:
                for pool in (layer.pool.keys, layer.pool.values):
                    pool[layer.tables[b, k, place]] = torch.nan
        assert layer.pool.keys.isnan().any() == (len(chosen[0, 0]) < t + 1)
        found = attend(None, q, seen, 8**-0.5, True)  # type: ignore[arg-type]
        assert_close(found[:, 0].double(), read.attended(t, chosen))
        layer.pool.keys, layer.pool.values = whole
    assert len(chosen[0, 0]) <= (48 if ratio == 2 else 32)


@torch.no_grad()
def test_sparq_reads_some_channels_and_the_slots_with_the_largest_scores_by_them() -> None:
    read = Read("sparq", 4.0)
    read.add(0, 70)
    for t in range(70, 90):
        seen = read.add(t, t + 1)
        (chosen, part), layer = read.sparq(t), read.layer
        whole = layer.pool.keys.clone(), layer.pool.values.clone()
        for b, k in itertools.product(range(2), range(2)):
            channels = read.q[b, 2 * k : 2 * k + 2, t].abs().sum(0).topk(2).indices.tolist()
            others = [h for h in range(8) if h not in channels]
            for slot in set(range(t + 1)) - set(chosen[b, k]):
                page = layer.tables[b, k, slot // 16]
                layer.pool.values[page, slot % 16] = torch.nan
                layer.pool.keys[page, slot % 16, others] = torch.nan
        found = attend(None, read.q[:, :, t : t + 1], seen, 8**-0.5, True)  # type: ignore[arg-type]
        layer.pool.keys, layer.pool.values = whole
        mean = read.v[:, :, : t + 1].double().mean(2).repeat_interleave(2, dim=1)
        want = read.attended(t, chosen) * part[..., None] + mean * (1 - part[..., None])
        assert_close(found[:, 0].double(), want)


@pytest.mark.parametrize("read", READERS)
@torch.no_grad()
def test_plans_count_all_slots_and_what_lies_beside_them(read: str) -> None:
    """Also when a page has come since, when slots leave, and for rows that are short or have turned."""
    model, ids = model_of("heads", read=read, read_ratio=2.0), tokens(length=150)
    plain = model_of("heads")
    for end in (60, 150):
        _, cache = run(model, ids, [end])
        held = tensor_bytes(cache)
        assert held == 2 * sum(plan.bytes_at(end) for plan in model.plans)
        assert tensor_bytes(run(plain, ids, [end])[1]) < held < 1.2 * tensor_bytes(run(plain, ids, [end])[1])
    _, stepwise = run(model, ids[:, :90], [60, *range(61, 91)])
    layer = stepwise.layers[0]
    noted = {name: layer.state[name].clone() for name in layer.reader.state(*[torch.zeros(2, 2, 0, 16)] * 2)}
    layer.reader.note(layer)
    for name, was in noted.items():
        assert_close(
            layer.state[name][:, :, :5] if was.ndim == 4 else layer.state[name], was[:, :, :5] if was.ndim == 4 else was
        )
    evicting = model_of("heads", read=read, read_ratio=2.0, ratio=2.0)
    _, cache = run(evicting, ids, [100, *range(101, 151)])
    assert (cache.layers[0].lengths <= 75 + 16).all()


@pytest.mark.parametrize("read", READERS)
@torch.no_grad()
def test_stock_models_read_less_as_converted_ones(read: str) -> None:
    model, ids = tiny_model("llama").eval(), tokens(length=80)
    step = STEP | {"read": read, "read_ratio": 3}
    child = surgery.convert(model, {"steps": [step]}).eval()
    want = run(child, ids, [60, *range(61, 81)])[0]
    cache = surgery.cache(
        model, evict="streaming", **{k: v for k, v in step.items() if k not in ("rewriter", "scorer")}
    )
    parts = [
        model(ids[:, a:b], **{cache_argument(model): cache}).logits
        for a, b in ((0, 60), *((i, i + 1) for i in range(60, 80)))
    ]
    assert_close(torch.cat(parts, 1), want)
    plan = surgery.plan(surgery.examine(model), {"steps": [step]})
    assert f"{read} reads 1 of 3" in plan.after[0].retain.label()
    assert "that saves reads, and no bytes of memory" in " ".join(str(plan).split())
    assert LayerPlan.from_dict(json.loads(json.dumps(plan.after[0].to_dict()))) == plan.after[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"read": "qest"}, "no reading 'qest'. Did you mean 'quest'"),
        ({"read_ratio": 2}, "read_ratio: nothing reads less. Add read: quest or sparq"),
        ({"read": "quest", "read_ratio": 0.5}, "read_ratio: 0.5 must be at least 1"),
        ({"read": "quest", "positions": "capped"}, "read: positions: capped is computed over all slots"),
        ({"read": "sparq", "merge": "mean"}, "read: merge: mean is computed over all slots"),
        ({"read": "quest", "scorer": "h2o"}, "read: h2o reads all slots at every step itself. Use streaming"),
        ({"read": "quest", "scorer": "window", "recent": None, "ratio": 4}, "read: the score window does not read it"),
    ],
)
def test_readings_that_do_not_go_together_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(surgery.RecipeError, match=sentence):
        surgery.plan(tiny_model("llama"), {"steps": [STEP | changes]})


def test_what_cannot_be_read_in_part_is_refused() -> None:
    mla = {"rewriter": "mla", "rank": 24, "rope_dims": 8}
    with pytest.raises(surgery.PlanError, match="layer 0: .* read: quest asks for keys and values of heads"):
        surgery.plan(tiny_model("llama"), {"steps": [mla, STEP | {"read": "quest"}]})
    with pytest.raises(surgery.PlanError, match="capped or have sinks, of which sparq knows nothing. Use read: quest"):
        surgery.plan(tiny_model("gemma2"), {"steps": [STEP | {"read": "sparq", "layers": "1"}]})
    model = model_of("heads", scorer="snapkv", observe=4, read="quest")
    with pytest.raises(ValueError, match="a step of a static cache does not ask which slots to read"):
        model.static_cache(64)
