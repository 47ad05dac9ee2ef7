"""Ask llama.cpp's server, in process, for the most likely tokens after prefixes: for an environment with xllamacpp.

That environment needs nothing of this library.

`python llama_server_answers.py request.json result.json`; the request is `{"file", "types", "tokens", "ends",
"context", "top"}`: `types` of the cache of keys and of values, `ends` the lengths of the prefixes. The result has
`answers`, for each prefix `top` pairs of a token and its log-probability, and `version`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def answers(request: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["file"]
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = request["context"], 1, False
    kinds = {name: getattr(xllamacpp.ggml_type, f"GGML_TYPE_{name.upper()}") for name in request["types"]}
    parameters.cache_type_k, parameters.cache_type_v = (kinds[name] for name in request["types"])
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    answers = []
    for end in request["ends"]:
        asked = {
            "prompt": request["tokens"][:end],
            "n_predict": 1,
            "temperature": 0,
            "n_probs": request["top"],
            "cache_prompt": True,
        }
        answer = server.handle_completions(asked)
        [place] = answer["choices"][0]["logprobs"]["content"]
        answers.append([(one["id"], one["logprob"]) for one in place["top_logprobs"]])
    return {"answers": answers, "version": xllamacpp.__version__}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answers(json.loads(Path(sys.argv[1]).read_text()))))
