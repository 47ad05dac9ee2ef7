#!/usr/bin/env bash
# torch 2.13.0 (CPU): weights that change while one `torch.autocast` block is open, without gradients.
#
# Guess: autocast keeps the 16-bit copy of a weight to save casting it twice, and makes a new one when the weight was written to:
#   autograd counts writes to each tensor (`_version`) to find such cases. So one block around a loop that compares checkpoints,
#   or measures what each layer loses when it is rounded, gives the numbers of each. That the forward pass alone belongs into the
#   block is said of training.
# Behaviour: the copy stays to the end of the outermost block. `load_state_dict`, `copy_`, `mul_` and an optimizer's step change the
#   weight, and every later forward in the block computes with the first one, under `no_grad` as well: all losses agree, and
#   "rounding this layer costs nothing". A new `Parameter`, or weights that need no gradient, are seen. No error, no warning.
#   `cache_enabled=False`, or a block for each forward, helps.
# Seen: after `load_state_dict` of other weights the output is that of the first ones to the bit, though `_version` has moved and
#   the weights are the new ones. In a new block, with `cache_enabled=False`, and with `requires_grad_(False)` it is the new one's.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W error - <<'PY'
import sys

import torch


def layer(seed):
    torch.manual_seed(seed)
    return torch.nn.Linear(16, 16)


x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
block = {"device_type": "cpu", "dtype": torch.bfloat16}
with torch.no_grad():
    with torch.autocast(**block):
        first = layer(1)(x)
    with torch.autocast(**block):
        second = layer(2)(x)
    by_hand = torch.nn.functional.linear(x.bfloat16(), layer(2).weight.bfloat16(), layer(2).bias.bfloat16())
assert torch.equal(second, by_hand) and not torch.equal(first, second)

changes = {
    "load_state_dict": lambda model: model.load_state_dict(layer(2).state_dict()),
    "copy_": lambda model: [p.copy_(q) for p, q in zip(model.parameters(), layer(2).parameters())],
    "new Parameter": lambda model: [setattr(model, name, torch.nn.Parameter(p)) for name, p in layer(2).named_parameters()],
}


@torch.no_grad()
def after(change, trained=True, **more):
    model = layer(1).requires_grad_(trained)
    with torch.autocast(**block, **more):
        before = model(x)
        writes = model.weight._version
        changes[change](model)
        out = model(x)
    assert torch.equal(before, first) and torch.equal(model.weight, layer(2).weight)
    name = "first" if torch.equal(out, first) else "second" if torch.equal(out, second) else "neither"
    print(f"{change}, {'' if trained else 'no '}gradient wanted {more}: weights are the second, version {writes} -> "
          f"{model.weight._version}, output that of the {name}")
    return name


found = [
    after("load_state_dict"), after("copy_"), after("new Parameter"), after("load_state_dict", trained=False),
    after("load_state_dict", cache_enabled=False),
]
sys.exit(found != ["first", "first", "second", "second", "second"])
PY
echo "as described: a changed weight is not seen before its autocast block ends"
