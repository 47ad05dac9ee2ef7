"""Ask llama.cpp fixed prompts and write its answers: a script for an environment that has llama-cpp-python.

That environment needs nothing of this library.

`python llama_answers.py request.json result.npz`; the request is `{"file", "prompts", "start", "new_tokens", "ends",
"context"}`.
The result has `logits` [B, T, vocabulary] of whole prompts and `tokens` [B, new_tokens]; llama.cpp logs the size
of its cache to stderr.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    import llama_cpp

    ask: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    float32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        model_path=ask["file"], n_ctx=ask["context"], n_batch=256, n_threads=1, logits_all=True, verbose=True,
        type_k=float32, type_v=float32,
    )  # fmt: skip
    logits, tokens = [], []
    for prompt in ask["prompts"]:
        model.reset()
        model.eval(prompt)
        logits.append(np.array(model.scores[: len(prompt)], dtype=np.float32))
        model.reset()
        model.eval(prompt[: ask["start"]])
        found: list[int] = []
        while len(found) < ask["new_tokens"]:
            last = np.array(model.scores[model.n_tokens - 1])
            last[ask["ends"]] = -np.inf
            found.append(int(last.argmax()))
            model.eval(found[-1:])
        tokens.append(found)
    np.savez(sys.argv[2], logits=np.stack(logits), tokens=np.array(tokens), version=llama_cpp.__version__)


if __name__ == "__main__":
    main()
