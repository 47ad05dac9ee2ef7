"""What the tests of uptraining start from: a tiny parent, conversions of it, text, runs."""

import dataclasses
import json
import random

import torch
from families import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import surgery
from surgery.train.checkpoints import checkpoints
from surgery.train.run import Run

WORDS = [f"w{i}" for i in range(120)]
BASE = ("tokens=640", "batch=4", "length=16", "layer_local=0.2", "learning_rate=5e-3")
"""10 steps of 64 tokens, two of them layer-local."""


def make_home(home):
    """A parent with a tokenizer, two conversions of it, and text."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{word: i + 3 for i, word in enumerate(WORDS)}}
    core = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<pad>")
    parent = tiny_model("llama")
    parent.save_pretrained(home / "parent")
    tokenizer.save_pretrained(home / "parent")
    rng = random.Random(0)
    for name, count in (("text.jsonl", 60), ("held.jsonl", 12)):
        texts = [" ".join(rng.choices(WORDS[:20], k=rng.randint(4, 30))) for _ in range(count)]
        (home / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    parent = surgery.load(home / "parent")
    gqa = {"name": "tiny", "steps": [{"rewriter": "gqa", "kv_heads": 1, "init": "mean", "grouping": "neighbour"}]}
    surgery.save(surgery.convert(parent, gqa), home / "native")
    low = {"name": "tiny", "steps": [{"rewriter": "lowrank", "rank": 16, "layers": "1"}]}
    ids = torch.randint(3, 120, (16, 16), generator=torch.Generator().manual_seed(0))
    surgery.save(surgery.convert(parent, low, calibration=ids), home / "latent")
    shared = {"name": "tiny", "steps": [{"rewriter": "share", "layout": "cla2", "init": "mean"}]}
    surgery.save(surgery.convert(parent, shared), home / "shared")
    return home


def run(home, out, *overrides, model="native", **options):
    """A run on a tiny model that logs every step."""
    made = Run(
        model=str(home / model),
        data=str(home / "text.jsonl"),
        out=out,
        overrides=(*BASE, *overrides),
        log_steps=1,
        save_steps=4,
    )
    return dataclasses.replace(made, **options)


def losses(out):
    """What was logged at each step, but for the clock."""
    state = json.loads((checkpoints(out / "checkpoints")[-1] / "trainer_state.json").read_text())
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in state["log_history"] if "loss" in entry]
