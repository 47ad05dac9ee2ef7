#!/usr/bin/env bash
# torch 2.13.0: what a program sees of a torch.export.export that fails on a branch over data, and that it catches.
#
# Guess: the error has the reason, and the log at most a line more. Whoever tries one form after another (strict, not
#   strict, a module left out) in try/except and with the loggers of torch silenced sees and prints nothing.
# Behaviour: beside raising, torch.export writes the whole graph traced so far to standard error, with print. No logger,
#   no level and no filter of warnings keeps it away; only redirecting sys.stderr does. A mixture of experts of two layers
#   prints hundreds of lines, and programs whose standard error is read (tests, JSON lines) break.
# Seen: GuardOnDataDependentSymNode caught, all loggers of torch off; 40 layers before the branch put 102 lines on
#   standard error, 80 layers 182.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$dir/fails.py" <<'PY'
import logging
import sys
import warnings
import torch

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")


class Routed(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x if x.sum().item() > 0 else -x


try:
    torch.export.export(Routed(int(sys.argv[1])), (torch.ones(1, 4),), strict=False)
except Exception as error:
    print(f"caught: {type(error).__name__}")
PY
few=$("$dir/venv/bin/python" "$dir/fails.py" 40 2>&1 >"$dir/out" | wc -l)
many=$("$dir/venv/bin/python" "$dir/fails.py" 80 2>&1 >>"$dir/out" | wc -l)
cat "$dir/out"
echo "lines on standard error: $few with 40 layers, $many with 80"
[ "$(grep -c '^caught: GuardOnDataDependentSymNode' "$dir/out")" = 2 ]
[ "$few" -gt 80 ] && [ "$many" -ge $((few + 80)) ]
echo "as described: a failed export prints its graph, whoever catches the error"
