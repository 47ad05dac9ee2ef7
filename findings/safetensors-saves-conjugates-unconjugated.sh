#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0: saving a complex tensor that was conjugated.
#
# Guess: `save_file({"x": t.conj()}, ...)` stores the values that `t.conj()` shows, or refuses a view that it cannot store,
#   as it refuses tensors that share memory or are not contiguous.
# Behaviour: torch conjugates lazily: the result shares the memory of `t` and carries a bit that says so. safetensors
#   writes the memory and drops the bit, so the file holds `t` itself: every imaginary part has the wrong sign. No error,
#   no warning.
# Seen: [1-2j, 3+4j] comes back as [1+2j, 3-4j]; after `resolve_conj()` it comes back as it was.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 safetensors==0.8.0 numpy
"$dir/venv/bin/python" - "$dir/x.safetensors" <<'PY'
import sys, warnings
import safetensors, torch
from safetensors.torch import load_file, save_file

warnings.simplefilter("error")
t = torch.tensor([1 + 2j, 3 - 4j])
print("safetensors", safetensors.__version__, "torch", torch.__version__)
same = []
for name, x in {"t.conj()": t.conj(), "t.conj().resolve_conj()": t.conj().resolve_conj()}.items():
    save_file({"x": x}, sys.argv[1])
    back = load_file(sys.argv[1])["x"]
    same.append(torch.equal(back, x))
    print(f"  {name}: saved {x.resolve_conj().flatten().tolist()}, loaded {back.flatten().tolist()}")
sys.exit(same != [False, True])
PY
echo "as described: conjugates are stored without their conjugation"
