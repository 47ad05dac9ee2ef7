"""What `real_models.py` measures of a child: text and questions, through its cache, beside the parent's answers."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import reference
from torch import Tensor
from transformers import PreTrainedModel

from surgery.calibration.text import Windows, load_windows
from surgery.measure.memory import cache_size
from surgery.measure.recall import TASKS, Asked, answer_questions, compose_questions
from surgery.measure.scoring import decode
from surgery.measure.statistics import bootstrap

GREEDY_PROMPT, GREEDY = 128, 64
ANSWERED = 0.5
"""Part of the questions of a task that the parent must answer for the task to count."""
LENGTHS = (256, 512, 1024, 2048, 4096)
"""Tokens of context of the questions."""
DEPTHS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Sizes:
    """How much is read, decoded and asked."""

    calibration: tuple[int, int]
    """Windows, tokens of each."""
    windows: int
    """Of each text."""
    prompt: int
    """Tokens of a window that are prefilled."""
    decoded: int
    """Tokens behind them that are decoded one by one, and counted."""
    questions: int
    """Of each task, length and depth."""
    longest: int = max(LENGTHS)
    """Tokens of context of the longest questions."""


# ----------------------------------------------------------------------------------------------- text


def clean_wikitext(text: str) -> str:
    """WikiText-2 as people write: no word-level spaces, no headings, and no sentence with an `<unk>` in it."""
    lines = (line.strip() for line in text.splitlines())
    kept = []
    for line in lines:
        if not line or line.startswith("="):
            continue
        sentences = re.split(r"(?<= [.?!]) (?=[A-Z\"])", line)
        whole = " ".join(s for s in sentences if "<unk>" not in s)
        whole = re.sub(r" @([-,.])@ ", r"\1", whole)
        whole = re.sub(r" ([.,;:?!%)\]]|'s\b|n't\b|'(?:re|ve|ll|d|m)\b)", r"\1", whole)
        whole = re.sub(r"([(\[$£]) ", r"\1", whole)
        whole = re.sub(r'" ([^"]*?) "', r'"\1"', whole)
        if len(whole) > 200:
            kept.append(whole)
    return "\n\n".join(kept)


def read_texts(tokenizer: Any, config: Any, sizes: Sizes) -> dict[str, Windows]:
    """Windows of each text, evenly spaced over it; one token more than is read, the last label."""
    stories = reference("text", "tinystories-917.jsonl").read_text().splitlines()
    texts = {
        "wikitext2": clean_wikitext(reference("text", "wikitext2-test.txt").read_text()),
        "tinystories": "\n\n".join(json.loads(line)["text"] for line in stories),
        "shakespeare": reference("text", "tinyshakespeare.txt").read_text(),
    }
    found = {}
    for name, text in texts.items():
        windows = load_windows(
            [text], tokenizer, vocab_size=config.vocab_size, length=sizes.prompt + sizes.decoded + 1, where=name
        )
        whole = windows.ids_BT[windows.mask_BT.all(1)]
        ids = whole[torch.linspace(0, len(whole) - 1, sizes.windows).round().long()]
        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
        found[name] = Windows(ids, torch.ones_like(ids, dtype=torch.bool), digest, windows.start)
    return found


# ----------------------------------------------------------------------------------------------- models


def decoded(model: PreTrainedModel, ids_WT: Tensor, prompt: int) -> Iterator[Tensor]:
    """Log-probabilities [W, vocab] after each token behind the prompt, read from the cache."""
    for position, logp in decode(model, ids_WT[:, :-1], prompt):
        if position >= prompt:
            yield logp[:, 0]


def in_one_pass(model: PreTrainedModel, ids_WT: Tensor, prompt: int) -> Iterator[Tensor]:
    """The same from one forward pass, for an attention that computes what decoding would."""
    last = ids_WT.shape[1] - 1 - prompt
    logits = torch.cat([model(part, use_cache=False, logits_to_keep=last).logits for part in ids_WT[:, :-1].split(8)])
    for i in range(last):
        yield logits[:, i].float().log_softmax(-1)


class Answers:
    """What the parent says, computed once and kept on disk."""

    def __init__(
        self, folder: Path, texts: dict[str, Windows], sizes: Sizes, load: Callable[[], PreTrainedModel]
    ) -> None:
        self.texts, self.sizes = texts, sizes
        self.ids_WT = torch.cat([windows.ids_BT for windows in texts.values()])
        key = hashlib.sha256(repr((asdict(sizes), [w.digest for w in texts.values()])).encode()).hexdigest()[:16]
        path = folder / f"{key}.pt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            parent = load().float().eval()
            with torch.inference_mode():
                logp = torch.stack(list(decoded(parent, self.ids_WT, sizes.prompt)))
                found = {
                    "logp": logp,
                    "greedy": continued(parent, self.ids_WT),
                    "bytes": torch.tensor(cache_size(parent, self.ids_WT[:1, :-1]).bytes),
                }
            torch.save(found, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        found = torch.load(path, mmap=True)
        self.logp: Tensor = found["logp"]
        """[decoded, windows, vocab]"""
        self.greedy: Tensor = found["greedy"]
        self.cache_bytes = int(found["bytes"])

    def parts(self) -> dict[str, slice]:
        """The windows of each text, and all of them."""
        each = self.sizes.windows
        named = {name: slice(i * each, (i + 1) * each) for i, name in enumerate(self.texts)}
        return {**named, "all": slice(None)}


def continued(model: PreTrainedModel, ids_WT: Tensor) -> Tensor:
    """Greedy tokens [W, GREEDY] behind the first tokens of each window."""
    prompt = ids_WT[:, : min(GREEDY_PROMPT, ids_WT.shape[1] // 2)]
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=GREEDY, min_new_tokens=GREEDY
    )
    return out[:, prompt.shape[1] :]


# ----------------------------------------------------------------------------------------------- measures


def text_quality(model: PreTrainedModel, answers: Answers, h2o_slots: int | None, seed: int) -> dict[str, Any]:
    """Likelihood of decoded tokens and distance to the parent, for each text and all; bytes of the cache.

    `tvd_kept` is 1 - TVD: the part of the probability that both give alike.

    Raises:
        AssertionError: a log-probability is not a number.
    """
    ids, prompt = answers.ids_WT, answers.sizes.prompt
    path = decoded if h2o_slots is None else in_one_pass
    sums = torch.zeros(5, len(ids), dtype=torch.float64)
    for i, logp in enumerate(path(model, ids, prompt)):
        base, label = answers.logp[i], ids[:, prompt + i + 1, None]
        p, q = base.exp(), logp.exp()
        values = (
            -logp.gather(-1, label)[:, 0], -base.gather(-1, label)[:, 0], (p * (base - logp)).sum(-1),
            torch.minimum(p, q).sum(-1), (base.argmax(-1) == logp.argmax(-1)).float(),
        )  # fmt: skip
        sums += torch.stack(values).double()
    assert sums.isfinite().all(), "a log-probability is not finite"
    tokens = torch.full((len(ids), 1), float(answers.sizes.decoded), dtype=torch.float64)
    found: dict[str, Any] = {}
    for name, part in answers.parts().items():
        nll, base_nll, kl, kept, same = (row[part, None] for row in sums)
        measures = {"nats_per_token": nll, "gap": nll - base_nll, "kl": kl, "tvd_kept": kept, "agreement": same}
        found[name] = {m: asdict(bootstrap(values, tokens[part], seed)) for m, values in measures.items()}
    read = ids.shape[1] - 1
    if h2o_slots is None:
        held = cache_size(model, ids[:1, :-1])
        size = {"cache_bytes": held.bytes, "planned_bytes": held.predicted_bytes, "is_measured": True}
    else:
        size = {"cache_bytes": round(answers.cache_bytes * min(1.0, h2o_slots / read)), "is_measured": False}
    part = size["cache_bytes"] / answers.cache_bytes
    return {**found, **size, "tokens": read, "part_of_parent": part, "kl": found["all"]["kl"]["value"]}


def greedy(model: PreTrainedModel, answers: Answers, seed: int) -> dict[str, Any]:
    """The part of the greedy tokens before the first that is not the parent's, and the part of all that are alike."""
    same = continued(model, answers.ids_WT) == answers.greedy
    until = same.long().cumprod(1).sum(1, keepdim=True).double()
    tokens = torch.full_like(until, GREEDY)
    alike = same.sum(1, keepdim=True).double()
    return {
        "until_first_difference": asdict(bootstrap(until, tokens, seed)),
        "alike": asdict(bootstrap(alike, tokens, seed)),
        "tokens": GREEDY,
    }


class Recall:
    """Questions hidden in filler, the same for all rows."""

    def __init__(self, config: Any, tokenizer: Any, questions: int, seed: int) -> None:
        self.compose = partial(compose_questions, config, tokenizer, depths=DEPTHS, questions=questions, seed=seed)

    def ask(self, model: PreTrainedModel, length: int, tasks: Sequence[str] | None, one_pass: bool) -> dict[str, Any]:
        """Right answers of each task and of all that are asked; of the parent, those tasks that it answers count.

        Args:
            tasks: those to ask; None for all, of a parent.
        """
        asked = self.compose(tasks=tuple(tasks or TASKS), lengths=[length])[length]
        by_task: dict[str, Any] = {}
        for (task, depth), some in asked.items():  # a few at a time: caches of long contexts add up
            if one_pass:
                right, nats = _in_one_pass(model, some, length)
            else:
                cell = answer_questions(model, {length: {(task, depth): some}})[0]
                right, nats = round(cell.exact * cell.questions), cell.nats
            entry = by_task.setdefault(task, {"right": 0, "questions": 0, "nats": 0.0, "right_by_depth": []})
            entry["right"] += right
            entry["questions"] += len(some)
            entry["nats"] += nats / len(DEPTHS)
            entry["right_by_depth"].append(right)
        answered = [t for t, e in by_task.items() if tasks or e["right"] >= ANSWERED * e["questions"]]
        right = sum(by_task[t]["right"] for t in answered)
        count = sum(by_task[t]["questions"] for t in answered)
        low, high = wilson(right, count)
        return {
            "answered": answered, "right": right, "questions": count, "low": low, "high": high,
            "exact": right / count if count else math.nan,
            "nats": sum(by_task[t]["nats"] for t in answered) / max(1, len(answered)), "by_task": by_task,
        }  # fmt: skip


def _in_one_pass(model: PreTrainedModel, asked: Sequence[Asked], length: int) -> tuple[int, float]:
    """Questions answered right, and the mean nats of the right answers."""
    longest = max(a.answer for a in asked)
    ids = torch.tensor([a.ids + [0] * (longest - a.answer) for a in asked])
    right, nats = torch.ones(len(asked), dtype=torch.bool), torch.zeros(len(asked), dtype=torch.float64)
    for i, logp in enumerate(in_one_pass(model, ids, length - 1)):
        counts = torch.tensor([i < a.answer for a in asked])
        label = ids[:, length + i]
        nats -= torch.where(counts, logp.gather(-1, label[:, None])[:, 0], 0.0).double()
        right &= (logp.argmax(-1) == label) | ~counts
    return int(right.sum()), float(nats.mean())


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion."""
    if not count:
        return math.nan, math.nan
    z = 1.959964
    p, spread = right / count, 1 + z * z / count
    middle = (p + z * z / (2 * count)) / spread
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / spread
    return max(0.0, middle - half), min(1.0, middle + half)
