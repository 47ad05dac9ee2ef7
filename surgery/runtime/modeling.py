"""Model classes `Surgery<Parent>`: the parent's model with the attention instances replaced that its config names."""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.generation import GenerationMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .attention import SHARED_STATES, SurgeryAttention, SurgeryHeadNorm, canonical_weights
from .calling import CallingConvention, record_calls
from .configuration import config_class, converted_config
from .gates import gate_shapes
from .heads import SurgeryHeadsAttention
from .latent import SurgeryLatentAttention, latent_shapes
from .layout import AttentionSite, Latent, LayerPlan
from .merged import SurgeryMergedAttention
from .ragged_cache import make_ragged

_MADE: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


class SurgeryMixin:
    """Before a `PreTrainedModel` in the bases: builds it, then swaps attention as `config.surgery` says."""

    shares_caches = False
    """Whether layers read the caches of others."""
    plans: tuple[LayerPlan, ...] = ()
    retains = False
    """Whether tokens merge or leave in some layer."""
    _skip_keys_device_placement: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Wrappers that place arguments on devices copy a mapping, and readers would find the copy empty.
        cls._skip_keys_device_placement = _with_shared_key(cls._skip_keys_device_placement)

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        layers = config.surgery["layers"]
        swap_attention(
            self,  # type: ignore[arg-type]
            [AttentionSite.from_dict(layer["site"]) for layer in layers],
            [LayerPlan.from_dict(layer["plan"]) for layer in layers],
            [CallingConvention.from_dict(layer["call"]) for layer in layers],
            [layer["shapes"] for layer in layers],
        )
        self.plans = tuple(LayerPlan.from_dict(layer["plan"]) for layer in layers)
        self.retains = any(plan.retain is not None for plan in self.plans)
        self.shares_caches = any(plan.lenders for plan in self.plans)
        if self.shares_caches:
            self.base_model.register_forward_pre_hook(_hand_down_states, with_kwargs=True)  # type: ignore[attr-defined]

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """As the parent's, behind every public switch.

        Raises:
            ValueError: reentrant checkpointing where layers share caches: the gradients that readers have for the
                caches of their owners would be dropped.
        """
        functions = [a for a in (*args, *kwargs.values()) if isinstance(a, functools.partial)]
        if self.shares_caches and any(f.keywords.get("use_reentrant") for f in functions):
            raise ValueError(
                f"{type(self).__name__}: layers share caches, and reentrant checkpointing loses their gradients. "
                "Use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        super()._set_gradient_checkpointing(*args, **kwargs)  # type: ignore[misc]

    def static_cache(self, max_cache_len: int, *, ratio: float | None = None) -> StaticCache:
        """An empty cache that is allocated at once; pass it as `past_key_values`.

        Args:
            max_cache_len: tokens at most, the prompt included.
            ratio: tokens per slot to have room for where tokens merge or leave; None: what the plan aims at.
        """
        cache = StaticCache(config=self.config, max_cache_len=max_cache_len)  # type: ignore[attr-defined]
        if self.retains:
            make_ragged(cache, self.plans, ratio)
        return cache

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As the parent's; caches of merged attention become what they will be before anybody asks what they can do.

        Raises:
            ValueError: assisted decoding of merged attention, or a form of cache that it cannot have.
        """
        if self.retains and generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                f"{type(self).__name__} merges or drops tokens, which cannot be undone when candidates are rejected. "
                "Generate without an assistant: leave out assistant_model and prompt_lookup_num_tokens."
            )
        done = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, *args, **kwargs
        )
        if self.retains and model_kwargs.get("past_key_values") is not None:
            make_ragged(model_kwargs["past_key_values"], self.plans)
        return done

    def initialize_weights(self) -> None:
        """Initialise as the parent does, then our own modules, which the parent's sub-models know nothing of."""
        super().initialize_weights()  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, (SurgeryAttention, SurgeryHeadNorm)):
                module.reset()

    def _get_static_cache_init_shape(self) -> None:
        """Shapes of a static cache come from its first keys and values, not from the parent's head count."""
        return None


def surgery_class(parent: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of models converted from `parent`, registered with transformers' Auto classes."""
    if parent in _MADE:
        return _MADE[parent]
    parent_config = parent.config_class
    if parent_config is None:
        raise ValueError(f"{parent.__name__} names no config class")
    config = config_class(parent_config)
    cls = type(
        f"Surgery{parent.__name__}",
        (SurgeryMixin, parent),
        {
            "__module__": __name__,
            "__doc__": f"{parent.__name__} with rewritten attention.",
            "config_class": config,
        },
    )
    AutoConfig.register(config.model_type, config, exist_ok=True)
    auto = AutoModelForCausalLM if parent.can_generate() else AutoModel
    auto.register(config, cls, exist_ok=True)
    _MADE[parent] = cls
    return cls


def _hand_down_states(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give each forward pass a fresh mapping for the caches of owners.

    A UserDict: wrappers of modules (FSDP) rebuild a plain dict on its way to each layer, and readers would find the
    copy empty.
    """
    return args, {SHARED_STATES: collections.UserDict(), **kwargs}


def _with_shared_key(names: Any) -> list[str]:
    found = [names] if isinstance(names, str) else list(names or ())
    return found if SHARED_STATES in found else [*found, SHARED_STATES]


def swap_attention(
    model: PreTrainedModel,
    sites: Sequence[AttentionSite],
    plans: Sequence[LayerPlan],
    calls: Sequence[CallingConvention],
    shapes: Sequence[dict[str, Sequence[int]]],
) -> None:
    """Put a `SurgeryAttention` in the place of each site's module, in this model instance only."""
    lenders = {lender for plan in plans for lender in plan.lenders}
    for site, plan, call, sizes in zip(sites, plans, calls, shapes, strict=True):
        name = site.module
        if not hasattr(model, model.base_model_prefix):  # a base model: names there lack the prefix
            name = name.removeprefix(model.base_model_prefix + ".")
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        replaced = getattr(owner, attribute)
        config = getattr(replaced, "config", None)
        if not isinstance(config, PreTrainedConfig):
            config = model.config.get_text_config(decoder=True)
        form: type[SurgeryAttention] = (
            SurgeryLatentAttention if isinstance(plan.project, Latent) else SurgeryHeadsAttention
        )
        if plan.retain is not None:
            form = SurgeryMergedAttention
        attention = form(config, site, plan, call, {k: tuple(v) for k, v in sizes.items()})
        attention.has_readers = site.layer in lenders
        if isinstance(attention, SurgeryMergedAttention):
            attention.all_plans = tuple(plans)
        parameter = next(replaced.parameters())
        attention.to(dtype=parameter.dtype)
        setattr(owner, attribute, attention.train(replaced.training))


def from_parent(
    model: PreTrainedModel,
    sites: Sequence[AttentionSite],
    plans: Sequence[LayerPlan],
    provenance: dict[str, Any] | None = None,
    weights: dict[int, dict[str, Tensor]] | None = None,
) -> PreTrainedModel:
    """Build the converted model from its parent in memory.

    Args:
        model: the parent; it is not changed. The result shares the tensors of all parameters that are not attention's
            with it: copy the parent first where it must stay a fixed teacher.
        sites: attentions to replace.
        plans: one per site.
        provenance: JSON about the conversion, kept in `config.surgery["provenance"]`.
        weights: canonical weights (see `canonical_weights`) by layer; layers not named keep the parent's.

    Raises:
        ValueError: the model is a converted one, a plan and its weights do not fit, or the model does not call its
            attention as the sites say.
    """
    if isinstance(model, SurgeryMixin):
        raise ValueError(f"{type(model).__name__} is converted already; convert its parent with all steps at once")
    tensors = dict(model.state_dict())
    calls = record_calls(model, sites)
    replacing: dict[str, Tensor] = {}
    layers = []
    for site, plan, call in zip(sites, plans, calls, strict=True):
        canonical = (weights or {}).get(site.layer)
        if canonical is None:
            if isinstance(plan.project, Latent):
                raise ValueError(f"layer {site.layer}: its plan is a latent, and no weights are given for it")
            canonical = canonical_weights(site, tensors.__getitem__)
            canonical = {name: t for name, t in canonical.items() if name.split(".")[0] not in plan.absent}
        _check_shapes(site, plan, canonical)
        shapes = {name: list(tensor.shape) for name, tensor in canonical.items()}
        layers.append({"site": site.to_dict(), "plan": plan.to_dict(), "call": call.to_dict(), "shapes": shapes})
        replacing |= {f"{site.module}.{name}": tensor for name, tensor in canonical.items()}
    surgery = {
        "parent": {"model_type": model.config.model_type, "architecture": type(model).__name__},
        "layers": layers,
        "provenance": provenance or {},
    }
    config = converted_config(model.config, _as_json(surgery))
    with torch.device("meta"):
        converted = surgery_class(type(model))(config)
    swapped = tuple(site.module + "." for site in sites)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(swapped)}
    converted.load_state_dict(kept | replacing, assign=True)
    converted.tie_weights()
    _copy_buffers(model, converted)
    for module in converted.modules():
        if isinstance(module, SurgeryAttention):
            module.build_tables(module.q_proj.weight.device)
    left = [name for name, t in [*converted.named_parameters(), *converted.named_buffers()] if t.is_meta]
    if left:
        raise ValueError(f"{type(converted).__name__}: nothing fills {', '.join(left)}")
    flags = dict(model.named_parameters())
    for name, parameter in converted.named_parameters():
        parameter.requires_grad_(flags[name].requires_grad if name in flags else True)
    if model.can_generate():
        converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.train(model.training)


def load_converted(path: str, **kwargs: Any) -> PreTrainedModel:
    """Load what `save_pretrained` of a converted model wrote; `kwargs` go to `from_pretrained`.

    Raises:
        ValueError: there is no converted model at `path`.
    """
    return converted_class(path).from_pretrained(path, **kwargs)


def converted_class(path: str) -> type[PreTrainedModel]:
    """The class of the converted model at `path`.

    Raises:
        ValueError: there is none.
    """
    fields, _ = PreTrainedConfig.get_config_dict(path)
    surgery = fields.get("surgery")
    if not surgery:
        raise ValueError(f"{path}: config.json has no 'surgery' section; load it with transformers")
    parent = surgery["parent"]
    architecture = getattr(transformers, parent["architecture"], None)
    if architecture is None or parent["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"{path}: transformers {transformers.__version__} has no {parent['architecture']}")
    return surgery_class(architecture)


def _check_shapes(site: AttentionSite, plan: LayerPlan, weights: dict[str, Tensor]) -> None:
    where = f"layer {site.layer}"
    surplus = [name for name in weights if name.split(".")[0] in plan.absent]
    if surplus:
        raise ValueError(f"{where}: reads the cache of layer {plan.lenders[0]} and has {surplus[0]} of its own")
    if isinstance(plan.project, Latent):
        wanted = latent_shapes(site, plan.project, plan.owner == plan.layer)
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        for name in sorted({name for name in {*wanted, *found} if name.split(".")[0] in _LATENT}):
            if name != "kv_down.bias" and wanted.get(name) != found.get(name):
                raise ValueError(f"{where}: {name} has shape {found.get(name)}, its plan asks for {wanted.get(name)}")
        return
    heads = plan.project
    rows = {
        "q_proj": site.heads * site.head_dim,
        "k_proj": heads.kv_heads * site.head_dim,
        "v_proj": heads.kv_heads * site.value_dim,
    }
    for name, count in rows.items():
        if name in plan.absent:
            continue
        rows_found = weights[f"{name}.weight"].shape[0]
        if rows_found != count:
            raise ValueError(
                f"{where}: {name}.weight has {rows_found} rows, its plan asks for {count} ({heads.kv_heads} KV heads)"
            )
    wanted_gate: dict[str, tuple[int, ...]] = {}
    if plan.retain is not None and plan.owner == plan.layer:
        wanted_gate = gate_shapes(plan.retain, weights["q_proj.weight"].shape[1], heads.kv_heads)
    gate = {name.removeprefix("gate."): tuple(t.shape) for name, t in weights.items() if name.startswith("gate.")}
    for name in sorted({*wanted_gate, *gate}):
        if wanted_gate.get(name) != gate.get(name):
            raise ValueError(
                f"{where}: gate.{name} has shape {gate.get(name)}, its plan asks for {wanted_gate.get(name)}"
            )


_LATENT = ("kv_down", "k_up", "k_mean", "v_up", "q_rope", "rope_freq_bits", "k_proj", "v_proj", "v_norm")


def _copy_buffers(parent: nn.Module, converted: nn.Module) -> None:
    """Non-persistent buffers (rotary tables, embedding scales) are in no state dict."""
    modules = dict(parent.named_modules())
    for name, module in converted.named_modules():
        if name not in modules or isinstance(module, SurgeryAttention):
            continue
        # Two names may share one tensor: Phi-3's frequencies and their originals.
        for key, buffer in modules[name].named_buffers(recurse=False, remove_duplicate=False):
            if key in module._buffers and key in module._non_persistent_buffers_set:
                module._buffers[key] = buffer.clone()


def _as_json(value: Any) -> Any:
    """Tuples as lists: a config compares equal to itself after a round trip."""
    if isinstance(value, dict):
        return {key: _as_json(v) for key, v in value.items()}
    return [_as_json(v) for v in value] if isinstance(value, (list, tuple)) else value
