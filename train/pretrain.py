"""Pretrain the reference models: Llama-style MHA decoders on English prose, with a byte-level BPE of their own.

    python -m surgery.train.pretrain small --corpus ../shared/reference/corpus -o ./small      # CPU, about 90 minutes
    accelerate launch -m surgery.train.pretrain base --corpus ... -o ./base                   # one GPU, minutes

A small share of the text is solved recall questions (`surgery.measure.recall`), so that a model of this size has
something that a broken cache can break. Training resumes from the last checkpoint in OUT/checkpoints when run again.
"""

from __future__ import annotations

import itertools
import json
import lzma
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from surgery.checkpoints.provenance import versions
from surgery.console import count, progress
from surgery.measure.recall import documents

END = "<|end|>"


@dataclass(frozen=True, kw_only=True)
class Size:
    """A reference model and what it is trained with."""

    dim: int
    layers: int
    heads: int
    head_dim: int
    mlp: int
    vocab: int
    context: int
    tokens: float
    batch: int
    """Windows per step."""
    lr: float


SIZES = {
    "small": Size(
        dim=192, layers=6, heads=8, head_dim=32, mlp=512, vocab=4096, context=512, tokens=7e6, batch=8, lr=3e-3
    ),
    "base": Size(
        dim=512, layers=8, heads=8, head_dim=64, mlp=1408, vocab=8192, context=1024, tokens=300e6, batch=64, lr=1.5e-3
    ),
}
RECALL_SHARE = 0.06
"""Share of the training tokens that are recall questions."""


def main(
    size: Annotated[str, typer.Argument(help=f"One of {', '.join(SIZES)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model, its card and its checkpoints.")],
    corpus: Annotated[Path, typer.Option(help="Folder with train.jsonl.xz, valid.jsonl.xz.")],
    tokens: Annotated[float | None, typer.Option(help="Training tokens; default: the size's own.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: the size's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, text order and questions.")] = 0,
) -> None:
    """Train tokenizer and model, measure the loss on held-out text, write model, tokenizer and card to OUT."""
    if size not in SIZES:
        raise typer.BadParameter(f"{size!r}: no such size. Use one of {', '.join(SIZES)}.")
    if not (corpus / "train.jsonl.xz").is_file():
        raise typer.BadParameter(f"{corpus / 'train.jsonl.xz'}: no such file.")
    shape = SIZES[size]
    budget = int(tokens or shape.tokens)
    tokenizer = _tokenizer(corpus, shape, out / "tokenizer")
    train = packed(corpus, ("train", "train-extra"), tokenizer, shape.context, budget, seed, RECALL_SHARE)
    valid = packed(corpus, ("valid",), tokenizer, shape.context, 128 * shape.context, seed, 0.0)
    recall = pack(map(str, itertools.islice(documents(seed + 1), 1000)), tokenizer, shape.context, 32 * shape.context)

    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(shape, tokenizer))
    checkpoints = out / "checkpoints"
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=len(train) // shape.batch,
        per_device_train_batch_size=shape.batch,
        per_device_eval_batch_size=shape.batch,
        learning_rate=lr or shape.lr,
        lr_scheduler_type="linear",
        warmup_steps=max(10, len(train) // shape.batch // 50),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=True,
        torch_compile=gpu,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        logging_steps=25,
        eval_strategy="steps",
        eval_steps=500,
        save_steps=250,
        save_total_limit=1,
        seed=seed,
        report_to="none",
        use_cache=True,  # Trainer writes it into the config
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=train, eval_dataset={"valid": valid, "recall": recall})
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")))
    losses = trainer.evaluate()

    if trainer.is_world_process_zero():
        torch.nn.Module.to(model, torch.bfloat16)  # transformers wraps its own `to` without its type
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        seconds = sum(entry.get("train_runtime", 0.0) for entry in trainer.state.log_history)
        record: dict[str, Any] = {
            "size": size,
            "parameters": model.num_parameters(),
            "tokens": len(train) * shape.context,
            "recall_share": RECALL_SHARE,
            "seed": seed,
            "learning_rate": lr or shape.lr,
            "steps": arguments.max_steps,
            "windows_per_step": shape.batch,
            "valid_nats_per_token": losses["eval_valid_loss"],
            "recall_nats_per_token": losses["eval_recall_loss"],
            "seconds": round(seconds),
            "device": torch.cuda.get_device_name() if gpu else "CPU",
            "versions": versions(),
            "log": [entry for entry in trainer.state.log_history if "eval_valid_loss" in entry or "loss" in entry],
        }
        (out / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "README.md").write_text(card(record, shape))


def _config(shape: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )


def _tokenizer(corpus: Path, shape: Size, kept: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `shape.vocab` entries, trained on a tenth of the corpus; read again where it was `kept`."""
    if (kept / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(kept)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tenth = itertools.islice(read_corpus(corpus / "train.jsonl.xz"), 0, None, 10)
    core.train_from_iterator(itertools.chain(tenth, itertools.islice(documents(0), 500)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, model_max_length=shape.context)
    tokenizer.save_pretrained(kept)
    return tokenizer


def read_corpus(path: Path) -> Iterator[str]:
    """Field `text` of every line of a `.jsonl.xz` file."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


class Packed(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of one stream of tokens, [W, T]."""

    def __init__(self, ids_WT: Tensor) -> None:
        self.ids_WT = ids_WT

    def __len__(self) -> int:
        return len(self.ids_WT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids_WT[index].long()
        return {"input_ids": ids, "labels": ids}


def packed(
    corpus: Path,
    parts: tuple[str, ...],
    tokenizer: PreTrainedTokenizerFast,
    context: int,
    budget: int,
    seed: int,
    recall_share: float,
) -> Packed:
    """`budget` tokens of the corpus files in random order, `recall_share` of them recall questions."""
    texts = [t for part in parts if (f := corpus / f"{part}.jsonl.xz").is_file() for t in read_corpus(f)]
    rng = random.Random(seed)
    rng.shuffle(texts)
    questions = documents(seed, words=(30, 200))

    def mixed() -> Iterator[str]:
        prose = asked = 0
        for text in texts:
            yield text
            prose += len(text)
            while asked < recall_share / (1 - recall_share) * prose:
                question = next(questions)
                yield question
                asked += len(question)

    return pack(mixed(), tokenizer, context, budget)


def pack(texts: Iterator[str], tokenizer: PreTrainedTokenizerFast, context: int, budget: int) -> Packed:
    """The first `budget` tokens of `texts`, each text closed by `END`, cut into windows."""
    pieces: list[Tensor] = []
    size = 0
    with progress(f"tokenising {count(budget)} tokens", budget) as advance:
        while size < budget and (some := list(itertools.islice(texts, 256))):
            for ids in tokenizer(some)["input_ids"]:
                pieces.append(torch.tensor([*ids, tokenizer.eos_token_id], dtype=torch.int16))
                size += len(pieces[-1])
                advance(len(pieces[-1]))
    stream = torch.cat(pieces)[:budget]
    return Packed(stream[: len(stream) // context * context].view(-1, context))


def card(record: dict[str, Any], shape: Size) -> str:
    """The model card."""
    name, device = record["size"], record["device"]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
language: en
license: cc-by-4.0
---

# surgery reference model `{name}`

A Llama-style decoder with full multi-head attention, for demonstrations and tests of KV-cache conversion: it is really
pretrained, and far too small to be useful for anything else.

| | |
|---|---|
| parameters | {record["parameters"]:,} ({shape.layers} layers, {shape.heads} query and {shape.heads} KV heads \
of {shape.head_dim}, tied embeddings) |
| context | {shape.context} tokens, byte-level BPE of {shape.vocab} |
| corpus | English prose: novels, textbooks, documentation (public domain, CC0, CC-BY; some Apache/MIT, GPL docs) |
| training | {record["tokens"]:,} tokens, of which {record["recall_share"]:.0%} generated recall questions; \
{record["steps"]} steps of {record["windows_per_step"]} windows, AdamW, peak learning rate {record["learning_rate"]:g} |
| hardware | {device}, {record["seconds"] / 60:.0f} minutes |
| loss | {record["valid_nats_per_token"]:.3f} nats/token on held-out prose, \
{record["recall_nats_per_token"]:.3f} on unseen recall questions |
| seed | {record["seed"]} |

Made by `python -m surgery.train.pretrain {name} --corpus CORPUS -o OUT`; every logged loss and the versions stand in
`pretraining.json`. The corpus is described, with the licence and commit of every source, in its own README.
"""


if __name__ == "__main__":
    typer.run(main)
