#!/usr/bin/env bash
# torch 2.13.0 (CPU): `cross_entropy` of bfloat16 and float16 logits, with its default reduction, the mean.
#
# Guess: sums run in float32 inside, as `sum` and `mean` of 16-bit tensors do, and the result is rounded once: the loss of a text is
#   that of float32 to half a step of bfloat16 (0.016 between 4 and 8), whatever the number of tokens, and equals the mean of
#   `reduction="none"`. 20,000 tokens are nothing to float16 where each loss is about 7.
# Behaviour: the losses are added up in the dtype of the logits. In bfloat16 the mean is off by several steps, differently for each
#   number of tokens, so that differences of hundredths of a nat between two models, or two lengths of text, are those of
#   rounding. In float16 the sum passes 65504 at some eight thousand tokens and the mean is infinite, then nan. `nll_loss` is
#   the same. Nothing is said. `reduction="none"` with `.mean()`, or `logits.float()`, give what one expects.
# Seen, all logits 0 and 64 classes, so that every token's loss is 4.15625 in bfloat16: mean of 100 tokens 4.1875, of 300 4.25, of
#   1000 and 50000 4.21875; `reduction="none"`, then mean: 4.15625 for each. Random logits, 200 to 2100 tokens: up to 0.047 off,
#   the mean of single losses up to 0.016. float16: 20000 tokens inf, 70000 nan, the mean of single losses right to 0.002.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W error - <<'PY'
import sys

import torch
from torch.nn.functional import cross_entropy, log_softmax, nll_loss

CLASSES = 64
changed = False
for tokens, seen in ((100, 4.1875), (300, 4.25), (1000, 4.21875), (50000, 4.21875)):
    logits = torch.zeros(tokens, CLASSES, dtype=torch.bfloat16)
    labels = torch.zeros(tokens, dtype=torch.long)
    mean = cross_entropy(logits, labels).item()
    losses = cross_entropy(logits, labels, reduction="none")
    apart = nll_loss(log_softmax(logits, -1), labels).item()
    print(f"bfloat16, equal logits, {tokens} tokens: mean {mean}, nll_loss {apart}, every loss {losses[0].item()}, "
          f"mean of these {losses.mean().item()}, in float32 {cross_entropy(logits.float(), labels).item():.5f}")
    changed |= mean != seen or apart != seen or losses.unique().tolist() != [4.15625] or losses.mean().item() != 4.15625

torch.manual_seed(0)
far = []
for tokens in range(200, 2200, 100):
    logits, labels = torch.randn(tokens, CLASSES).bfloat16(), torch.randint(CLASSES, (tokens,))
    right = cross_entropy(logits.float(), labels).item()
    single = cross_entropy(logits, labels, reduction="none").mean().item()
    far.append((abs(cross_entropy(logits, labels).item() - right), abs(single - right)))
worst, worst_single = (max(column) for column in zip(*far))
print(f"bfloat16, random logits, 200 to 2100 tokens: at most {worst:.4f} off, mean of single losses {worst_single:.4f}")
changed |= worst < 0.03 or worst_single > 0.018

for tokens in (1000, 20000, 70000):
    logits, labels = 3 * torch.randn(tokens, CLASSES).half(), torch.randint(CLASSES, (tokens,))
    mean, right = cross_entropy(logits, labels), cross_entropy(logits.float(), labels)
    single = cross_entropy(logits, labels, reduction="none").mean()
    print(f"float16, {tokens} tokens: mean {mean.item():.4f}, of single losses {single.item():.4f}, float32 {right.item():.4f}")
    changed |= mean.isfinite().item() != (tokens == 1000) or (single.float() - right).abs().item() > 0.01
sys.exit(changed)
PY
echo "as described: the mean of 16-bit losses is taken in 16 bits"
