#!/usr/bin/env bash
# safetensors 0.8.0 with numpy 2.4.6 (and safetensors 0.7.0, for comparison): saving a numpy array that is not in C order.
#
# Guess: `safetensors.numpy.save_file({"w": w.T}, ...)` stores the values that `w.T` shows, as `numpy.save` does and as 0.7.0
#   did, or refuses it, as `safetensors.torch` refuses a tensor that is not contiguous. "Contiguous and dense", which the
#   docstring asks for, a transposed matrix is: numpy calls it F-contiguous.
# Behaviour: 0.8.0 takes the address of the array and its number of bytes. The file gets the memory as it lies, under the
#   shape of the view: the numbers of a transposed matrix are all there and stand in other places, and those of a block of
#   columns are others. Shape, dtype and reading back are as they should be; no error, no warning. So go the weights of
#   every converter that transposes (GPT-2's Conv1D to a linear layer), `vh.T` of an SVD, and arrays that `numpy.load`
#   read from a file of Fortran order. `np.ascontiguousarray` before saving helps.
# Seen, values of a 4 x 6 matrix that come back in their places: 0.8.0: itself 24 of 24, transposed 2 of 24, its first four
#   columns 4 of 16, loaded from a .npy of Fortran order 2 of 24; 0.7.0: all of each. By bytes: [[0, 3], [1, 4], [2, 5]]
#   lies in the file as 0 1 2 3 4 5, which every reader takes for [[0, 1], [2, 3], [4, 5]].
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat >"$dir/save.py" <<'PY'
import json
import pathlib
import sys
import warnings

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

warnings.simplefilter("error")
folder = sys.argv[1]
w = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
np.save(f"{folder}/w.npy", w.T)
arrays = {"itself": w, "transposed": w.T, "columns": w[:, :4], "from .npy": np.load(f"{folder}/w.npy")}
kept = {}
for name, array in arrays.items():
    save_file({"w": array}, f"{folder}/w.safetensors")
    back = load_file(f"{folder}/w.safetensors")["w"]
    assert (back.shape, back.dtype) == (array.shape, array.dtype)
    kept[name] = int((back == array).sum()), array.size

small = np.arange(6, dtype=np.uint8).reshape(2, 3)
save_file({"w": small.T}, f"{folder}/w.safetensors")
content = pathlib.Path(f"{folder}/w.safetensors").read_bytes()
header = int.from_bytes(content[:8], "little")
assert json.loads(content[8 : 8 + header])["w"]["shape"] == [3, 2]
lies = list(content[8 + header :])
print("safetensors", safetensors.__version__, "in their places:", kept, "bytes of the file:", lies)
if sys.argv[2] == "others":
    fits = kept == {"itself": (24, 24), "transposed": (2, 24), "columns": (4, 16), "from .npy": (2, 24)}
    sys.exit(not (fits and lies == [0, 1, 2, 3, 4, 5]))
sys.exit(any(a != b for a, b in kept.values()) or lies != [0, 3, 1, 4, 2, 5])
PY
python3 -m venv "$dir/venv"
for pair in 0.7.0=same 0.8.0=others; do
    "$dir/venv/bin/pip" install -q numpy==2.4.6 "safetensors==${pair%=*}"
    "$dir/venv/bin/python" "$dir/save.py" "$dir" "${pair#*=}"
done
echo "as described: arrays that are not in C order are saved with their values in other places"
