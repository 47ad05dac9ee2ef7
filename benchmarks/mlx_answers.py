"""Ask mlx-lm fixed prompts and write its answers: a script for an environment that has mlx-lm.

That environment needs nothing of this library (Linux: `pip install 'mlx[cpu]' mlx-lm`).

`python mlx_answers.py request.json result.json`; the request is `{"folder", "prompts", "start", "new_tokens", "ends"}`.
The result has `tokens` (greedy, after the first `start` tokens of each prompt), `logprobs` of each prompt's own tokens
but the first, `bytes_per_token` by what its caches hold, and `version`; or `error`.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def answer(ask: dict[str, Any]) -> dict[str, Any]:
    model, _ = load_model(Path(ask["folder"]))
    tokens, logprobs = [], []
    for prompt in ask["prompts"]:
        logits = model(mx.array([prompt])).astype(mx.float32)
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        logprobs.append([scores[0, i, token].item() for i, token in enumerate(prompt[1:])])
        cache, found = make_prompt_cache(model), []
        last = model(mx.array([prompt[: ask["start"]]]), cache=cache)[0, -1]
        while len(found) < ask["new_tokens"]:
            last = mx.where(mx.array([i in ask["ends"] for i in range(last.shape[-1])]), -mx.inf, last)
            found.append(mx.argmax(last).item())
            last = model(mx.array([found[-1:]]), cache=cache)[0, -1]
        tokens.append(found)
    held = [x for layer in cache for x in layer.state if isinstance(x, mx.array)]  # [1, K, allocated tokens, H]
    return {
        "tokens": tokens,
        "logprobs": logprobs,
        "bytes_per_token": sum(x.nbytes / x.shape[2] for x in held),
        "version": importlib.metadata.version("mlx-lm"),
    }


def main() -> None:
    request, result = map(Path, sys.argv[1:])
    try:
        found = answer(json.loads(request.read_text()))
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
