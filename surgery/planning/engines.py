"""Which engine runs which cache, and by what: the README's table and `Plan.engines` say it in these words."""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime.layout import Heads, Latent, LayerPlan

PLUGIN_PARENTS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Decoders that differ in nothing but their attention: what the vLLM plugin builds."""
NATIVE, REMOTE, PLUGIN, REPEATED, DEEPSEEK, NONE = (
    "native", "remote code", "plugin", "native, heads repeated", "native, as DeepSeek-V3", "refused",
)  # fmt: skip
ENGINES = ("transformers", "vLLM", "llama.cpp")


def ways(architecture: str, plans: Sequence[LayerPlan], native: bool) -> dict[str, str]:
    """Engine -> by what it runs a conversion of `architecture`.

    What decides beside this (the parent's rope for latents, its biases, the tokenizer for GGUF) is judged by
    `surgery export`.
    """
    if native:
        return dict.fromkeys(ENGINES, NATIVE)
    known = architecture in PLUGIN_PARENTS
    found = {"transformers": REMOTE, "vLLM": NONE, "llama.cpp": NONE}
    if any(plan.retain is not None or plan.value_owner is not None for plan in plans):
        return found
    if all(isinstance(plan.project, Heads) for plan in plans):
        if known:
            found["vLLM"] = PLUGIN
        if not any(plan.lenders for plan in plans):
            found["llama.cpp"] = REPEATED
    elif known and not any(plan.lenders or not _is_mla(plan) for plan in plans):
        found |= {"vLLM": DEEPSEEK, "llama.cpp": DEEPSEEK}
    return found


def sentence(architecture: str, plans: Sequence[LayerPlan], native: bool) -> str:
    """The same for a terminal."""
    if native:
        return f"everything that loads the parent (stock {architecture})"
    found = ways(architecture, plans, native)
    others = [f"{engine} ({way})" for engine, way in found.items() if engine != "transformers" and way != NONE]
    return ", ".join(["transformers (with surgery, or remote code)", *others])


def _is_mla(plan: LayerPlan) -> bool:
    """Without a mean of V: that would be a bias of o, which these engines leave out."""
    return isinstance(plan.project, Latent) and not plan.project.rotate_on_read and not plan.project.means
