"""llama.cpp with quantised caches: scores of a GGUF export under each type of cache, beside transformers'.

    SURGERY_XLLAMACPP_PYTHON=.venv-llama/bin/python python benchmarks/llama_cache_types.py EXPORT --source NATIVE

EXPORT is what `surgery export --to gguf` wrote, NATIVE the stock class that it was made from. The environment has
xllamacpp (`pip install numpy xllamacpp`), whose server answers in process. After each of some prefixes of a text it
is asked for the most likely next tokens; KL is over those and the rest as one, of transformers in float32 to llama.cpp,
so that the row f16 says what is not the cache's (f32 is the same row: flash attention reads it as f16). llama.cpp turns
keys and values (Hadamard) before it quantises them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import common
import torch

import surgery
from surgery.calibration.text import load_tokenizer

PYTHON = "SURGERY_XLLAMACPP_PYTHON"
SEED = 0
TYPES = (("f32", "f32"), ("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q8_0", "q4_0"))
"""Of keys and of values."""
TOKENS, EVERY, TOP = 448, 16, 400


def ask(file: Path, types: tuple[str, str], tokens: list[int], ends: list[int]) -> dict[str, Any]:
    """What llama.cpp answers, or its error."""
    with tempfile.TemporaryDirectory() as scratch:
        request, result = Path(scratch, "request.json"), Path(scratch, "result.json")
        fields = {"types": types, "tokens": tokens, "ends": ends, "context": 2 * TOKENS, "top": TOP}
        fields["file"] = str(file.resolve())
        request.write_text(json.dumps(fields))
        script = Path(__file__).resolve().with_name("llama_server_answers.py")
        command = [os.path.abspath(os.environ[PYTHON]), "-P", str(script), str(request), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        if not result.is_file():
            said = [line for line in done.stderr.splitlines() if "error" in line.lower() or "require" in line.lower()]
            return {"error": (said or [f"exit code {done.returncode}"])[0]}
        return json.loads(result.read_text())


def kl(want_V: torch.Tensor, got: list[tuple[int, float]]) -> float:
    """Of the tokens that were named, and of all others as one."""
    named = torch.tensor([token for token, _ in got])
    p, q = want_V.exp()[named].double(), torch.tensor([score for _, score in got], dtype=torch.float64).exp()
    rest_p, rest_q = (1 - p.sum()).clamp_min(1e-12), (1 - q.sum()).clamp_min(1e-12)
    found = (p * (p / q).log()).sum() + rest_p * (rest_p / rest_q).log()
    return float(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--source", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    model = surgery.load(arguments.source, dtype=torch.float32)
    text = " ".join((common.ROOT / name).read_text() for name in ("README.md", "docs/faq.md"))
    tokens = load_tokenizer(arguments.source)(text)["input_ids"][:TOKENS]
    ends = list(range(EVERY, TOKENS, EVERY))
    with torch.no_grad():
        scores = model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    rows: dict[str, Any] = {}
    version = None
    for types in TYPES:
        found = ask(arguments.export / "model.gguf", types, tokens, ends)
        if "error" in found:
            rows[f"K {types[0]}, V {types[1]}"] = found
            continue
        want = scores[[end - 1 for end in ends]]
        each = [kl(row, got) for row, got in zip(want, found["answers"], strict=True)]
        same = sum(int(row.argmax()) == got[0][0] for row, got in zip(want, found["answers"], strict=True))
        version = found["version"]
        rows[f"K {types[0]}, V {types[1]}"] = {"kl": sum(each) / len(each), "largest_kl": max(each), "same_first": same}
        print(types, rows[f"K {types[0]}, V {types[1]}"], flush=True)  # noqa: T201
    data = {
        "environment": common.environment(SEED), "engine": f"xllamacpp {version}",
        "architecture": json.loads((arguments.export / "export.json").read_text())["architecture"],
        "prefixes": len(ends), "tokens": TOKENS, "rows": rows,
    }  # fmt: skip
    common.write("llama_cache_types", data)


if __name__ == "__main__":
    main()
