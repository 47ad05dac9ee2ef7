"""Ask a model of transformers fixed prompts and write its answers: a script for a process that cannot import `surgery`.

It imports torch and transformers only. `surgery` calls `answers` on the source, so that both sides are asked alike.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@torch.no_grad()
def answers(model: Any, prompts_BT: Tensor, start: int, new_tokens: int, caches: list[str]) -> dict[str, Tensor]:
    """Logits of whole prompts, and greedy continuations through caches where the model can generate.

    Args:
        prompts_BT: token ids without padding.
        start: tokens of each prompt that are continued.
        new_tokens: by how many; an end token does not stop it.
        caches: `dynamic`, `static`: what `cache_implementation` of `generate` takes.

    Returns:
        `logits` [B, T, vocabulary] float32 (what another model puts out, in one row per prompt), and [B, new_tokens]
        under each cache's name; on the CPU.
    """
    model.eval()
    if model.device.type != "meta":  # where layers come from disk as they run, they run on the CPU
        prompts_BT = prompts_BT.to(model.device)
    if not model.can_generate():
        # One by one: some heads take several texts with a padding token only.
        rows = [model(input_ids=prompt[None], return_dict=True).values() for prompt in prompts_BT]
        flat = [torch.cat([x.flatten() for x in row if isinstance(x, Tensor)]) for row in rows]
        return {"logits": torch.stack(flat).float().cpu().contiguous()}
    given = prompts_BT[:, :start]
    found = {"logits": model(input_ids=prompts_BT, use_cache=False).logits.float().cpu().contiguous()}
    for cache in caches:
        tokens = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, num_beams=1, cache_implementation=cache,
        )  # fmt: skip
        found[cache] = tokens[:, start:].cpu().contiguous()
    return found


def load(folder: str, auto: str, **kwargs: Any) -> Any:
    """The model in `folder`, by the Auto class called `auto`, in the dtype that its files have."""
    import transformers

    return getattr(transformers, auto).from_pretrained(folder, dtype="auto", **kwargs)


def main() -> None:
    """Read a request, load its model, ask it, and write the answers.

    The arguments of the script are two files: a JSON request with `folder`, `auto`, `kwargs` for loading and `ask`, the
    arguments of `answers`; and the safetensors file to write.
    """
    request = json.loads(Path(sys.argv[1]).read_text())
    model = load(request["folder"], request["auto"], **request["kwargs"])
    ask = request["ask"]
    found = answers(model, torch.tensor(ask.pop("prompts")), **ask)
    import transformers

    assert not any(name.split(".")[0] == "surgery" for name, module in sys.modules.items() if module is not None)
    said = {"class": type(model).__name__, "transformers": transformers.__version__, "torch": torch.__version__}
    save_file(found, sys.argv[2], metadata=said)


if __name__ == "__main__":
    sys.modules["surgery"] = None  # type: ignore[assignment]  # importing it fails from here on
    main()
