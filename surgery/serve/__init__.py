"""Converted models in serving engines. vLLM finds `register` by its entry point; nothing of vLLM is imported before."""

from __future__ import annotations

from .cache_format import CacheFormat
from .support import PLUGIN_PARENTS

_CLASS = "surgery.serve.vllm:SurgeryForCausalLM"


def register() -> None:
    """Make `Surgery<Parent>` checkpoints known to vLLM. Called in each of its processes, maybe more than once."""
    import transformers
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ..runtime.configuration import config_class

    for parent in PLUGIN_PARENTS:
        config = config_class(getattr(transformers, parent).config_class)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        if f"Surgery{parent}" not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(f"Surgery{parent}", _CLASS)
        MODELS_CONFIG_MAP[f"Surgery{parent}"] = CacheFormat
