"""What vLLM asks about a `Surgery<Parent>` before it allocates caches: their format, which the plan decides."""

from __future__ import annotations

from typing import Any

from .support import cache_dtype, served_layers


class CacheFormat:
    """A value of vLLM's `MODELS_CONFIG_MAP`: `vllm serve` needs no `--kv-cache-dtype`."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Put the plan's format in the place of `auto`; another one that was asked for stays, and is refused later."""
        surgery = vllm_config.model_config.hf_config.surgery
        if vllm_config.cache_config.cache_dtype == "auto":
            vllm_config.cache_config.cache_dtype = cache_dtype([plan for _, plan, _ in served_layers(surgery)])

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing: it is as the checkpoint says."""
