"""`surgery demo`: a small model pretrained on the spot, converted in several ways; what each cost and saved."""

from __future__ import annotations

import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .convert import convert
from .evaluate import evaluate
from .plan import plan
from .report import Report
from .show import progress
from .storage import save
from .text import Windows, load_windows

LENGTH = 128
STEPS = 300
VOCAB = 257  # bytes, and one token for the end


def run(out: Path | None = None) -> list[Report]:
    """Pretrain, convert, evaluate, print. Keeps the checkpoints under `out` where given."""
    console = Console(highlight=False)
    text = standard_library_text()
    cut = len(text) * 9 // 10
    tokenizer = byte_tokenizer()
    train, held_out = text[:cut], text[cut:]
    console.print(
        f"Pretraining a small MHA Llama on {len(train) / 1e6:.1f} MB of Python's own library, in bytes, on the CPU ..."
    )
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (out or Path(scratch)) / "parent"
        folder.mkdir(parents=True, exist_ok=True)
        parent = pretrain(train, seed=0)
        parent.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        parent = LlamaForCausalLM.from_pretrained(folder)
        console.print(f"done in {time.monotonic() - begun:.0f} s.")
        windows = windows_of(held_out[: 128 * LENGTH])
        calibration = windows_of(train[: 128 * LENGTH])
        console.print(*plan(parent, "gqa-2x").tables(), sep="\n")
        rows = []
        for name, init in (("gqa-2x", "mean"), ("gqa-2x", "rank1"), ("gqa-4x", "mean"), ("gqa-4x", "rank1")):
            step: dict[str, Any] = {"rewriter": "gqa", "kv_heads": "1/2" if name == "gqa-2x" else "1/4", "init": init}
            step |= {"gain_fit": False}  # the slowest part, and of little use behind the refits
            if init == "mean":  # as published: neighbours, nothing fitted
                step |= {"grouping": "neighbour", "refit_queries": False, "refit_output": False}
            begun = time.monotonic()
            child = convert(parent, {"name": name, "steps": [step]}, calibration=calibration)
            seconds = time.monotonic() - begun
            report = evaluate(child, baseline=parent, text=windows)
            label = f"{name}, mean pooling (published)" if init == "mean" else f"{name}, surgery"
            rows.append((label, report, seconds))
            if out is not None and init == "rank1":
                save(child, out / name, tokenizer=tokenizer, overwrite=True)
        console.print(_table(rows))
        if out is not None:
            console.print(f"Kept in {out}. Try: surgery generate {out / 'gqa-2x'} --prompt 'def '")
        console.print(
            "No training was done after conversion. Loss is on text that neither training nor calibration saw."
        )
    return [report for _, report, _ in rows]


def _table(rows: list[tuple[str, Report, float]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(("model", "KV bytes/token", "saved", "nats/byte", "change", "same top token", "seconds")):
        table.add_column(name, justify="right" if i else "left")
    base = rows[0][1].baseline
    assert base is not None
    table.add_row("parent", f"{base.kv_bytes_per_token:,.0f}", "", f"{base.nats_per_token:.3f}", "", "", "")
    for label, report, seconds in rows:
        m, gap = report.model, report.gap or 0.0
        table.add_row(
            label,
            f"{m.kv_bytes_per_token:,.0f}",
            f"{1 - m.kv_bytes_per_token / base.kv_bytes_per_token:.0%}",
            f"{m.nats_per_token:.3f}",
            f"{gap / base.nats_per_token:+.1%}",
            f"{report.agreement:.0%}",
            f"{seconds:.1f}",
        )
    return table


def standard_library_text(megabytes: float = 4.0) -> str:
    """Source text that every Python installation has, in a fixed order."""
    parts: list[str] = []
    size = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        part = file.read_text(encoding="utf-8", errors="ignore")
        parts.append(part)
        size += len(part)
        if size > megabytes * 1e6:
            break
    return "".join(parts).encode("ascii", "ignore").decode()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and `</s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "</s>"])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", model_max_length=LENGTH * 2)


def tokens_of(text: str) -> torch.Tensor:
    """Token ids of `byte_tokenizer`, fast."""
    return torch.tensor(byte_tokenizer()(text)["input_ids"], dtype=torch.long)


def windows_of(text: str) -> Windows:
    """Consecutive windows of `LENGTH` bytes."""
    ids = tokens_of(text)
    return load_windows(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH), vocab_size=VOCAB, length=LENGTH)


def pretrain(text: str, seed: int) -> LlamaForCausalLM:
    """A 3-layer MHA Llama of 8 heads, trained for `STEPS` steps: enough for heads to have roles."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCAB,
        max_position_embeddings=LENGTH * 2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCAB - 1,
    )
    model = LlamaForCausalLM(config).train()
    ids = tokens_of(text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    with progress("pretraining", STEPS) as advance:
        for _ in range(STEPS):
            starts = torch.randint(len(ids) - LENGTH, (16, 1), generator=generator)
            batch = ids[starts + torch.arange(LENGTH)]
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(1)
    return model.eval()
