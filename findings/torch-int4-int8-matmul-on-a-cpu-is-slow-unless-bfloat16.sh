#!/usr/bin/env bash
# torch 2.13.0 (CPU, x86): the operators that multiply by packed weights, `_weight_int4pack_mm_for_cpu` and
# `_weight_int8pack_mm`, which weight-only quantisation calls, and caches of packed keys could.
#
# Guess: one token in float32 is faster than with dense float32 weights, because an eighth or a quarter of the bytes are
#   read; bfloat16 is a little slower or faster than that, for a CPU without bfloat16 instructions widens it to float32.
# Behaviour: only bfloat16 has kernels with vector instructions. float32 and float16 are taken without a word and give
#   the same numbers, many times slower than bfloat16, and several times slower than dense weights: packing a float32 or
#   float16 model makes it slower, and the more so the more tokens come at once.
# Seen, weights 2048 x 2048, one core with AVX2, milliseconds for 1 and for 4 tokens: int4 in bfloat16 0.73 and 0.86, in
#   float16 9.6 and 38, in float32 9.3 and 37; int8 in bfloat16 0.60 and 0.99, in float16 4.8 and 18, in float32 4.6 and
#   18; dense float32 1.2 and 3.4.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy
"$dir/venv/bin/python" - <<'PY'
import sys
import time

import torch

torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
N, K, GROUP = 2048, 2048, 64
codes4 = torch.randint(0, 16, (N, K), dtype=torch.int32, generator=g)
scales4 = torch.rand(K // GROUP, N, 2, generator=g) * 0.01
codes8 = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=g)
scales8 = torch.rand(N, generator=g) * 0.01
packed4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes4, 1)
dense = torch.randn(N, K, generator=g)


def milliseconds(call):
    call()
    seen = []
    for _ in range(15):
        begin = time.process_time()
        call()
        seen.append(time.process_time() - begin)
    return 1e3 * min(seen)


print("vector instructions:", torch.backends.cpu.get_cpu_capability())
ok = True
for tokens in (1, 4):
    x = torch.randn(tokens, K, generator=g)
    plain = milliseconds(lambda: x @ dense.T)
    print(f"{tokens} tokens, dense float32: {plain:.2f} ms")
    for name, call in {
        "int4": lambda t: torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(t), packed4, GROUP, scales4.to(t)),
        "int8": lambda t: torch.ops.aten._weight_int8pack_mm(x.to(t), codes8, scales8.to(t)),
    }.items():
        took = {t: milliseconds(lambda: call(t)) for t in (torch.bfloat16, torch.float16, torch.float32)}
        print(f"{tokens} tokens, {name}:", {str(t): round(ms, 2) for t, ms in took.items()})
        same = torch.allclose(call(torch.bfloat16).float(), call(torch.float32), rtol=0.05, atol=0.5)
        ok &= same and min(took[torch.float16], took[torch.float32]) > 3 * max(took[torch.bfloat16], plain / 2)
sys.exit(not ok)
PY
echo "as described: packed weights are slow on a CPU unless activations are bfloat16"
