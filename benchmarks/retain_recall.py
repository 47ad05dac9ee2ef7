"""Eviction in a model that recalls: trained gates beside windows, H2O, key norm at the same slots, and fewer heads.

    python benchmarks/retain_recall.py
    python benchmarks/retain_recall.py --only heads mlp   # these alone, into retain_recall_gates.json

The reference models are too little trained to look anything up, so that a window loses nothing in them. This one is
made here: a Llama of two layers (4 heads of 32) that first repeats random words, then reads notes. A note is a name and
a thing, three to six of them hidden in filler sentences; at the end every note is asked for again, in another order,
192 words in all. The parent answers all of them. Its tokenizer has a token per word.

Conversions are trained on the same kind of text, as their recipes do: 0.3M tokens by KL to the parent, gates alone for
`dms` and `dmc`; `dmc` once more with the weights of attention, for 1.5M tokens, as what it averages is new to them. The
eviction that nothing is trained for gets the slots that the gates take at the end of a text; beside gates of heads
stands `evict` with `budget: duo`, which finds as many heads by calibration. `answers` counts the things that are asked
for: how many are the likeliest token, and their nats, decoding token by token through the cache from word 96 on; H2O,
which has no cache here, in one pass that computes what decoding would.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import environment, write
from retain_quality import Attended
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import surgery
from surgery.calibration.text import Windows
from surgery.console import progress
from surgery.measure.gates import read_gates
from surgery.measure.memory import cache_size
from surgery.measure.recall import FILLER, NAMES, THINGS
from surgery.measure.scoring import decode
from surgery.train.run import Run
from surgery.train.uptrain import uptrain

SEED, LENGTH, PREFILL, HELD = 0, 192, 96, 128
WORK = Path(tempfile.gettempdir()) / "surgery-recall-benchmark"
"""The parent and the trained conversions; kept."""
REPEATING, READING, BATCH = 800, 1000, 16
"""Steps of the parent's training, and texts in each of the second kind."""
LINES = [line.replace(",", " ,").replace(".", " .").split() for line in FILLER]
TRAINING = {"tokens": 300_000, "batch": 8, "length": LENGTH, "layer_local": 0.0}
GATES = {"train": "gates", "learning_rate": 2e-3}
TRAINED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dms, ratio 4": ({"rewriter": "dms", "ratio": 4, "window": 8}, GATES),
    "dms, ratio 6": ({"rewriter": "dms", "ratio": 6, "window": 8}, GATES),
    "dms, heads, ratio 2": ({"rewriter": "dms", "gate": "head", "ratio": 2, "window": 8}, GATES),
    "dms, heads, ratio 4": ({"rewriter": "dms", "gate": "head", "ratio": 4, "window": 8}, GATES),
    "dms, mlp, ratio 4": ({"rewriter": "dms", "gate": "mlp", "ratio": 4, "window": 8}, GATES),
    "dms, mlp, ratio 6": ({"rewriter": "dms", "gate": "mlp", "ratio": 6, "window": 8}, GATES),
    "dmc, ratio 4": ({"rewriter": "dmc", "ratio": 4, "window": 12}, GATES),
    "dmc, ratio 4, attention trained": (
        {"rewriter": "dmc", "ratio": 4, "window": 12},
        {"tokens": 1_500_000, "learning_rate": 1e-3},
    ),
    "gqa, 1 of 4 heads": ({"rewriter": "gqa", "kv_heads": 1}, {}),
}


def notes(rng: random.Random) -> tuple[list[str], list[int]]:
    """`LENGTH` words, and the places of those that answer."""
    count = rng.randint(3, 6)
    names, things = rng.sample(NAMES.split(), count), rng.sample(THINGS.split(), count)
    facts = [["Note", name, thing, "."] for name, thing in zip(names, things, strict=True)]
    room, lines = LENGTH - 8 * count, []
    while room:
        lines.append(rng.choice(LINES)[-room:])
        room -= len(lines[-1])
    for fact in facts:
        lines.insert(rng.randint(0, len(lines)), fact)
    asked = rng.sample(facts, count)
    answers = [LENGTH - 4 * count + 4 * i + 2 for i in range(count)]
    return [word for line in (*lines, *asked) for word in line], answers


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<end>", "Note", ".", *NAMES.split(), *THINGS.split(), *(w for line in LINES for w in line)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<end>")


def texts(seed: int, reader: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and places of answers, endless."""
    rng = random.Random(seed)
    while True:
        words, answers = notes(rng)
        yield reader.convert_tokens_to_ids(words), answers


def parent() -> Path:
    """Trained once: repeating random words first, without which nothing is looked up for a long time."""
    folder = WORK / "parent"
    if folder.exists():
        return folder
    reader, rng = tokenizer(), random.Random(SEED)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(reader), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=256, bos_token_id=None, eos_token_id=reader.eos_token_id,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    steps, source = REPEATING + READING, texts(SEED, reader)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 100, 1, (steps - s) / (steps / 4)))
    with progress("training the parent", steps) as advance:
        for step in range(steps):
            if step < REPEATING or step % 4 == 0:
                words = torch.randint(3, 3 + len(NAMES.split()) + len(THINGS.split()), (32, rng.randint(8, 48)))
                ids, known = torch.cat((words, words), 1), words.shape[1]
            else:
                ids, known = torch.tensor([next(source)[0] for _ in range(BATCH)]), 0
            logits = model(ids, use_cache=False).logits[:, known:-1]
            cross_entropy(logits.transpose(1, 2), ids[:, known + 1 :]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            advance(1)
    model.save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


def trained(name: str) -> Path:
    """The trained conversion; a run that was stopped goes on."""
    step, more = TRAINED[name]
    home, text = WORK / name.replace(", ", "-").replace(" ", "-"), WORK / "notes.jsonl"
    if not text.exists():
        source, reader = texts(SEED + 1, tokenizer()), tokenizer()
        lines = (" ".join(reader.convert_ids_to_tokens(next(source)[0])) for _ in range(2000))
        text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    if not (home / "start").exists():
        recipe = {"name": name, "steps": [step], "uptrain": {**TRAINING, **more}}
        surgery.convert_checkpoint(str(parent()), recipe, home / "start", calibration=str(text), length=LENGTH)
    if not (home / "run" / "model").exists():
        uptrain(Run(model=str(home / "start"), data=str(text), out=home / "run", seed=SEED))
    return home / "run" / "model"


@torch.inference_mode()
def scores(model: PreTrainedModel, ids_BT: Tensor, answers: list[list[int]], through_cache: bool) -> dict[str, float]:
    """Answers right, their nats, and nats of all tokens from `PREFILL` on."""
    if through_cache:
        logp = torch.cat([x for _, x in decode(model.eval(), ids_BT[:, :-1], PREFILL)], dim=1)
    else:
        logp = model.eval()(ids_BT, use_cache=False).logits[:, PREFILL - 1 : -1].float().log_softmax(-1)
    labels = ids_BT[:, PREFILL:]
    nll = -logp.gather(-1, labels[..., None])[..., 0]
    asked = torch.zeros_like(labels, dtype=torch.bool)
    for row, places in zip(asked, answers, strict=True):
        row[torch.tensor(places) - PREFILL] = True
    right = (logp.argmax(-1) == labels)[asked].float()
    return {
        "answers_right": float(right.mean()), "answer_nats": float(nll[asked].mean()),
        "nats_per_token": float(nll.mean()),
    }  # fmt: skip


def rows(only: list[str]) -> tuple[list[dict[str, Any]], str]:
    """What each cache answers, of those conversions whose name contains one of `only`, and the digest of the text."""
    reader = tokenizer()
    source = texts(SEED + 2, reader)
    held = [next(source) for _ in range(HELD)]
    ids, answers = torch.tensor([ids for ids, _ in held]), [places for _, places in held]
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
    windows = Windows(ids, torch.ones_like(ids, dtype=torch.bool), digest)
    other = texts(SEED + 3, reader)
    calibration = torch.tensor([next(other)[0] for _ in range(64)])
    whole = surgery.load(parent(), dtype=torch.float32)
    found = []

    def add(name: str, model: PreTrainedModel, through_cache: bool = True, **more: Any) -> dict[str, Any]:
        begun = time.monotonic()
        row = {"name": name, **more, **scores(model, ids, answers, through_cache)}
        if through_cache:
            row["cache_bytes"] = cache_size(model, ids[:1]).bytes
        if "tokens_per_slot" not in row:
            gates = read_gates(model, windows)
            row |= {"tokens_per_slot": gates.total, "by_head": gates.to_dict()["tokens_per_slot_by_head"]}
        found.append(row | {"seconds": round(time.monotonic() - begun, 1)})
        return row

    add("parent", whole, tokens_per_slot=1.0)
    for name, (step, _) in TRAINED.items():
        if only and not any(part in name for part in only):
            continue
        child = surgery.load(trained(name), dtype=torch.float32)
        row = add(name, child, **({"tokens_per_slot": 1.0} if step["rewriter"] == "gqa" else {}))
        if step["rewriter"] != "dms" or step.get("gate") == "mlp":
            continue
        if step.get("gate") == "head":
            by_head = [ratio for of_layer in row["by_head"].values() for ratio in of_layer]
            ratio = len(by_head) / sum(ratio == 1 for ratio in by_head)  # of heads; the others keep what always stays
            found_by_text = {"scorer": "streaming", "budget": "duo", "ratio": ratio, "recent": step["window"]}
            duo = surgery.convert(whole, {"steps": [{"rewriter": "evict", **found_by_text}]}, calibration=calibration)
            add(f"evict, budget duo, as {name}", duo, tokens_per_slot=row["tokens_per_slot"])
            continue
        slots = round(LENGTH / row["tokens_per_slot"])
        scored = {
            "window and sinks": {"window": slots - 4},
            "windows by layer": {"window": slots - 4, "windows": "sensitivity"},
            "key norm": {"scorer": "key_norm", "window": step["window"], "ratio": row["tokens_per_slot"]},
        }
        for other_name, more in scored.items():
            recipe = {"steps": [{"rewriter": "evict", **more}]}
            add(f"{other_name}, as {name}", surgery.convert(whole, recipe, calibration=calibration, seed=SEED))
        AttentionInterface.register(f"h2o-{slots}", Attended(slots))
        AttentionMaskInterface.register(f"h2o-{slots}", sdpa_mask)
        evicting = surgery.load(parent(), dtype=torch.float32, attn_implementation=f"h2o-{slots}")
        add(f"h2o, as {name}", evicting, through_cache=False, tokens_per_slot=LENGTH / slots)
    return found, digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="parts of names of what is trained; into another file")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    found, digest = rows(only)
    name = "retain_recall_gates" if only else "retain_recall"
    write(name, {**environment(SEED), "length": LENGTH, "texts": HELD, "text": digest, "rows": found})
    table = Table("cache", "tokens per slot", "bytes", "answers right", "answer nats", "nats/token")
    for row in found:
        table.add_row(
            row["name"], f"{row['tokens_per_slot']:.2f}", f"{row['cache_bytes']:,}" if "cache_bytes" in row else "",
            f"{row['answers_right']:.0%}", f"{row['answer_nats']:.3f}", f"{row['nats_per_token']:.4f}",
        )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
