"""Ask vLLM fixed prompts and write its answers: a script for an environment that has vLLM.

That environment needs this library only where a model runs by its plugin; the script itself imports nothing of it.

`python answers.py request.json result.json`, where the request is a list of cases:

    {"folder": ..., "prompts": [[token, ...], ...], "start": 8, "new_tokens": 24, "ends": [2], "tensor_parallel": 1,
     "options": {}}

`options` are further arguments of `vllm.LLM`.

The result has one entry per case: either `error`, or `tokens` (greedy, after the first `start` tokens of each prompt),
`logprobs` (of each prompt's own tokens but the first), `cache` and `version`. All cases run in this one process.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: seconds per model, not a minute


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Load one model, ask, and let it go."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform
    from vllm.version import __version__ as version

    options: dict[str, Any] = {}
    config = json.loads((Path(case["folder"]) / "config.json").read_text())
    if current_platform.is_cpu() and "kv_lora_rank" in config:
        # The rotary kernel of the CPU build turns only the first head of a three-dimensional query.
        options["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
        if case.get("dtype") != "bfloat16":
            # Where the processor has AMX, the attention that is chosen by default computes in bfloat16 alone.
            options["attention_config"] = {"backend": "CPU_MLA"}
    ranks = case.get("tensor_parallel", 1)
    if current_platform.is_cpu() and ranks > 1:  # it binds one rank to a NUMA node unless told otherwise
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, cores[r::ranks])) for r in range(ranks))
    prompts, start = case["prompts"], case["start"]
    longest = max(map(len, prompts))
    llm = LLM(
        case["folder"],
        skip_tokenizer_init=True,
        dtype=case.get("dtype", "auto"),
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=max(longest, start + case["new_tokens"]) + 1,
        tensor_parallel_size=ranks,
        **options,
        **case.get("options", {}),
    )
    try:
        greedy = SamplingParams(
            temperature=0, max_tokens=case["new_tokens"], ignore_eos=True, detokenize=False,
            logit_bias={end: -100.0 for end in case["ends"]},  # as transformers does below `min_new_tokens`
        )  # fmt: skip
        scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        continued = llm.generate([{"prompt_token_ids": p[:start]} for p in prompts], greedy, use_tqdm=False)
        whole = llm.generate([{"prompt_token_ids": p} for p in prompts], scored, use_tqdm=False)
        return {
            "tokens": [list(out.outputs[0].token_ids) for out in continued],
            "logprobs": [
                [found[token].logprob for token, found in zip(p[1:], out.prompt_logprobs[1:], strict=True)]
                for p, out in zip(prompts, whole, strict=True)
            ],
            "cache": _cache(llm, ranks),
            "version": version,
        }
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def _cache(llm: Any, ranks: int) -> dict[str, int | float]:
    """What the engine allocated, from its own accounts: of all ranks."""
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    tokens = config.num_blocks * llm.llm_engine.vllm_config.cache_config.block_size
    # Layers of several sizes are several entries, and each names the size of the one allocation that they lie in.
    size = ranks * max(tensor.size for tensor in config.kv_cache_tensors)
    return {"tokens": tokens, "bytes": size, "bytes_per_token": size / tokens}


def main() -> None:
    request, result = map(Path, sys.argv[1:])
    found = []
    for case in json.loads(request.read_text()):
        try:
            found.append(answer(case))
        except Exception as error:
            reasons = [line.strip() for line in str(error).splitlines() if line.strip()]
            found.append({"error": f"{type(error).__name__}: {reasons[0] if reasons else ''}"})
        result.write_text(json.dumps(found))


if __name__ == "__main__":  # worker processes import this file
    main()
