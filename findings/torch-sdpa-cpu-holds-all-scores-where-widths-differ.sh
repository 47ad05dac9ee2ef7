#!/usr/bin/env bash
# torch 2.13.0 (CPU): scaled_dot_product_attention where values are narrower than keys, as in multi-head latent attention.
#
# Guess: keys of 192 and values of 128 channels go block by block, as equal widths do: nothing in the algorithm asks that
#   both be equal, the documentation writes Ev apart from E, and on CUDA the memory-efficient kernel takes them. So memory
#   grows with the number of tokens, and padding the values to the keys' width would only cost time.
# Behaviour: on a CPU unequal widths go through the plain formula, which holds the scores of all pairs of tokens: memory
#   grows with the square. Nothing is said. Values padded with zeros to the keys' width take the kernel that goes block by
#   block, give the same numbers, and are faster although they multiply more.
# Seen, 4 heads, 4096 tokens, causal, float32: kernels `_scaled_dot_product_flash_attention_for_cpu` for equal widths and
#   padded values, `_scaled_dot_product_attention_math` for unequal ones; peak memory above the inputs 13 MB, 25 MB and
#   683 MB (the scores of all pairs take 268 MB).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy
"$dir/venv/bin/python" - <<'PY'
import resource
import subprocess
import sys

CHILD = """
import resource, sys
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
q, k = (torch.randn(1, 4, 4096, 192, generator=g) for _ in range(2))
v = torch.randn(1, 4, 4096, 192 if sys.argv[1] == "equal" else 128, generator=g)


def attend(q, k, v):
    if sys.argv[1] == "padded":
        return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 64)), is_causal=True)[..., :128]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


with profile(activities=[ProfilerActivity.CPU]) as seen:  # few tokens: which kernel, and all that loads on first use
    attend(q[:, :, :64], k[:, :, :64], v[:, :, :64])
names = {e.key.removeprefix("aten::") for e in seen.key_averages()}
kernels = [n for n in names if n in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math")]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = attend(q, k, v)
print(kernels[0], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1000)
torch.save(out[..., :128].clone(), sys.argv[2])
"""

import tempfile
import torch

found, outs = {}, {}
for kind in ("equal", "unequal", "padded"):
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        said = subprocess.run([sys.executable, "-c", CHILD, kind, file.name], capture_output=True, text=True, check=True)
        kernel, megabytes = said.stdout.split()
        outs[kind] = torch.load(file.name)
    found[kind] = kernel, int(megabytes)
    print(f"{kind}: {kernel}, {megabytes} MB above the inputs")
blocks, plain = "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"
same = torch.allclose(outs["unequal"], outs["padded"], atol=1e-5)
ok = found["equal"][0] == found["padded"][0] == blocks and found["unequal"][0] == plain and same
sys.exit(not (ok and found["unequal"][1] > 250 > 100 > max(found["equal"][1], found["padded"][1])))
PY
echo "as described: unequal widths hold all scores on a CPU"
