#!/usr/bin/env bash
# transformers 5.24.0 with accelerate 1.15.0, torch 2.13.0 (CPU): `eval_loss` of `Trainer.evaluate`, texts of different lengths.
#
# Guess: it is the mean loss of a token over the evaluation set, a number of model and texts: `per_device_eval_batch_size` changes
#   speed and memory, and the loss by rounding. Training counts the tokens of all batches of a step (`num_items_in_batch`), so
#   that accumulation in any number of parts gives the same; `exp(eval_loss)` is the perplexity.
# Behaviour: each batch is averaged over its tokens, and these means over texts. A token in a batch of short texts weighs more than
#   one in a batch of long ones, and the size of batches decides which texts meet. One model evaluated with two sizes has two
#   losses, further apart than what many comparisons are about. No warning.
# Seen, one model, 12 texts of 5 to 64 tokens, in batches of 1, 2, 3, 6 and 12: 6.439, 6.613, 6.575, 6.616 and 6.619, the last of
#   which is the loss of a token. Each is, to rounding, the mean over texts of the means of their batches, computed by hand. Texts
#   of one length: 6.764 for all sizes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W error::UserWarning - "$dir" <<'PY'
import random
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, logging
from transformers.trainer_callback import PrinterCallback

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256,
    initializer_range=0.3, pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()


def texts(lengths):
    random.seed(0)
    return [{"input_ids": [random.randrange(3, 64) for _ in range(length)]} for length in lengths]


def batch(found):
    """Texts padded on the right, labels -100 there."""
    ids = [torch.tensor(text["input_ids"]) for text in found]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad(ids, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
    }


def by_trainer(found, size):
    arguments = TrainingArguments(
        output_dir=sys.argv[1], per_device_eval_batch_size=size, report_to=[], use_cpu=True, disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, eval_dataset=found, data_collator=batch)
    trainer.remove_callback(PrinterCallback)
    return trainer.evaluate()["eval_loss"]


@torch.no_grad()
def token_losses(text):
    ids = torch.tensor(text["input_ids"])
    return torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")


def by_hand(found, size):
    """Mean over texts of the mean of the tokens of their batch."""
    losses = [token_losses(text) for text in found]
    groups = [losses[i : i + size] for i in range(0, len(losses), size)]
    return sum(torch.cat(group).mean().item() * len(group) for group in groups) / len(losses)


logging.set_verbosity_error()
changed = False
for lengths in ([5, 60, 8, 50, 7, 64, 9, 40, 6, 55, 10, 30], [32] * 12):
    found = texts(lengths)
    token = torch.cat([token_losses(text) for text in found]).mean().item()
    seen = {size: by_trainer(found, size) for size in (1, 2, 3, 6, 12)}
    hand = {size: by_hand(found, size) for size in seen}
    print(f"lengths {min(lengths)} to {max(lengths)}: eval_loss {seen}, by hand {hand}, by token {token:.5f}")
    changed |= any(abs(seen[size] - hand[size]) > 1e-3 for size in seen) or abs(seen[12] - token) > 1e-3
    changed |= (max(seen.values()) - min(seen.values()) > 0.02) != (len(set(lengths)) > 1)
sys.exit(changed)
PY
echo "as described: the loss of an evaluation depends on the size of its batches"
