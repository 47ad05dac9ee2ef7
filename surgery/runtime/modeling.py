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
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .attention import SHARED_STATES, SurgeryAttention, SurgeryHeadNorm
from .calling import CallingConvention, check_caches, forget_calls, number_anew, record_calls
from .canonical import kept_weights, origin_of
from .configuration import config_class, converted_config
from .frequencies import at_rest
from .gated import SurgeryGatedHeadsAttention
from .gated_latent import SurgeryGatedLatentAttention
from .gates import gate_shapes
from .generation import SurgeryGeneration, check_given_cache
from .heads import SurgeryHeadsAttention
from .latent import SurgeryLatentAttention
from .layout import AttentionSite, Codec, LayerPlan
from .parallel import drop_plans
from .recording import prepare_recording, records_of, running_model
from .rehearsal import rehearse
from .separators import mark_separators

ATTENTIONS: dict[str, type[SurgeryAttention]] = {"heads": SurgeryHeadsAttention, "latent": SurgeryLatentAttention}
"""`kind` of a `Project` -> the module that runs a layer which keeps all tokens."""
GATED: dict[str, type[SurgeryAttention]] = {
    "heads": SurgeryGatedHeadsAttention,
    "latent": SurgeryGatedLatentAttention,
}
"""The same for layers whose tokens are averaged or leave."""
_MADE: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


class SurgeryMixin(SurgeryGeneration):
    """Before a `PreTrainedModel` in the bases: builds it, then swaps attention as `config.surgery` says."""

    shares_caches = False
    """Whether layers read the caches of others."""
    decoder_class: type[PreTrainedModel] | None = None
    """What `AutoModel` makes of the config: classes with the head of a task get their decoder from it."""
    _skip_keys_device_placement: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Wrappers that place arguments on devices copy a mapping, and readers would find the copy empty.
        cls._skip_keys_device_placement = _with_shared_key(cls._skip_keys_device_placement)

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if self.decoder_class is not None:
            # Not once for the class: code that travels is loaded once for the config, and once more for the model.
            AutoModel.register(type(config), self.decoder_class, exist_ok=True)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        layers = config.surgery["layers"]
        swap_attention(
            self,  # type: ignore[arg-type]
            [AttentionSite.from_dict(layer["site"]) for layer in layers],
            [LayerPlan.from_dict(layer["plan"]) for layer in layers],
            [CallingConvention.from_dict(layer["call"]) for layer in layers],
            [layer["shapes"] for layer in layers],
        )
        # The parent initialised what is gone now. This reaches new modules alone, and none on the meta device.
        self.init_weights()  # type: ignore[attr-defined]
        self.plans = tuple(LayerPlan.from_dict(layer["plan"]) for layer in layers)
        self.retains = any(plan.retain is not None for plan in self.plans)
        self.shares_caches = any(plan.lenders for plan in self.plans)
        drop_plans(self, [layer["site"]["module"] for layer in layers], self.shares_caches)  # type: ignore[arg-type]
        found = [(n, m) for n, m in self.named_modules() if isinstance(m, SurgeryAttention)]  # type: ignore[attr-defined]
        base: Any = running_model(self, found[0][0])  # type: ignore[arg-type]
        base.surgery_attentions = [attention for _, attention in found]
        base.register_forward_pre_hook(check_given_cache, with_kwargs=True)
        keys = {"attentions", *(key for _, attention in found for key, _ in attention.records)}
        base.register_forward_pre_hook(functools.partial(prepare_recording, keys=keys), with_kwargs=True)
        base.register_forward_pre_hook(forget_calls)
        base.register_forward_hook(check_caches)
        base.register_forward_hook(rehearse, with_kwargs=True)
        if any(attention.plan.asks_separators for _, attention in found):
            base.register_forward_pre_hook(mark_separators, with_kwargs=True)
        if self.shares_caches:
            base.register_forward_pre_hook(_hand_down_states, with_kwargs=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Number hooks anew: by the numbers of the process that pickled them, others would take their places."""
        super().__setstate__(state)  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            number_anew(module)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """transformers reads that from the source of the class; attention here is all ours, and follows the config."""
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As the parent: experts are its own, and must run as they run there."""
        parent: Any = next(base for base in cls.__mro__ if not issubclass(base, SurgeryGeneration))
        return bool(parent._can_set_experts_implementation())

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """As the parent's; every public switch ends here.

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

    def initialize_weights(self) -> None:
        """Initialise as the parent does, then our own modules, which the parent's sub-models know nothing of."""
        super().initialize_weights()  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, (SurgeryAttention, SurgeryHeadNorm)):
                module.reset()


def __getattr__(name: str) -> Any:
    """`Surgery<Parent>` by name: pickles name the class, and are read by processes that have made no such class yet."""
    made = next((cls for cls in _MADE.values() if cls.__name__ == name), None)
    parent = getattr(transformers, name.removeprefix("Surgery"), None) if name.startswith("Surgery") else None
    if made is None and isinstance(parent, type) and issubclass(parent, PreTrainedModel):
        made = surgery_class(parent)
    if made is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return made


def surgery_class(parent: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of models converted from `parent`, registered with transformers' Auto classes."""
    if parent in _MADE:
        return _MADE[parent]
    parent_config = parent.config_class
    if parent_config is None:
        raise ValueError(f"{parent.__name__} names no config class")
    config = config_class(parent_config)
    base = MODEL_MAPPING.get(parent_config, None)
    cls = type(
        f"Surgery{parent.__name__}",
        (SurgeryMixin, parent),
        {
            "__module__": __name__,
            "__doc__": f"{parent.__name__} with rewritten attention.",
            "config_class": config,
            "decoder_class": surgery_class(base) if isinstance(base, type) and base is not parent else None,
        },
    )
    AutoConfig.register(config.model_type, config, exist_ok=True)
    _MADE[parent] = cls
    for auto in auto_classes(parent):
        made = auto._model_mapping.get(parent_config, parent)
        kinds = made if isinstance(made, (tuple, list)) else (made,)
        if parent in kinds:
            auto.register(config, cls, exist_ok=True)
        else:  # a class of somebody's own, of the config of another: Auto classes go on to make that one
            surgery_class(kinds[0])
    return cls


def auto_classes(kind: type[PreTrainedModel]) -> list[Any]:
    """The Auto classes of transformers that make a `kind` of its config."""
    found = []
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and name != "AutoModelForPreTraining" and auto._model_mapping is not None:
            made = auto._model_mapping.get(kind.config_class, None)
            if kind in (made if isinstance(made, (tuple, list)) else (made,)):
                found.append(auto)
    return found or [AutoModelForCausalLM if kind.can_generate() else AutoModel]


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
        if not hasattr(model, name.partition(".")[0]):  # a base model: names there lack the prefix
            name = name.partition(".")[2]
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        replaced = getattr(owner, attribute)
        if isinstance(replaced, SurgeryAttention):
            continue  # a decoder of ours inside a model with a head
        config = getattr(replaced, "config", None)
        if not isinstance(config, PreTrainedConfig):
            config = model.config.get_text_config(decoder=True)
        form = (ATTENTIONS if plan.retain is None else GATED)[plan.project.kind]
        attention = form(config, site, plan, call.of_installed(replaced), {k: tuple(v) for k, v in sizes.items()})
        attention.has_readers = site.layer in lenders
        # Without a mask the tokens of a prefix see each other in PaliGemma; other parents are causal then.
        attention.is_causal = not site.sees_ahead or getattr(replaced, "is_causal", True)
        attention.records = records_of(model, name, replaced)
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
    config, replacing, origins = child_parts(model, sites, plans, provenance, weights)
    swapped = tuple(site.module + "." for site in sites)
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(swapped)}
    return rebuild(model, surgery_class(type(model)), config, kept | replacing, origins)


def child_parts(
    model: PreTrainedModel,
    sites: Sequence[AttentionSite],
    plans: Sequence[LayerPlan],
    provenance: dict[str, Any] | None = None,
    weights: dict[int, dict[str, Tensor]] | None = None,
) -> tuple[PreTrainedConfig, dict[str, Tensor], dict[str, str | None]]:
    """Of the converted model that `from_parent` builds: its config, the tensors of its attentions, and their origins.

    Args:
        weights: as for `from_parent`; of those on the meta device, shapes are all that is asked for.
    """
    if isinstance(model, SurgeryMixin):
        raise ValueError(f"{type(model).__name__} is converted already; convert its parent with all steps at once")
    tensors = dict(model.state_dict())
    calls = record_calls(model, sites)
    replacing: dict[str, Tensor] = {}
    origins: dict[str, str | None] = {}
    layers = []
    for site, plan, call in zip(sites, plans, calls, strict=True):
        canonical = (weights or {}).get(site.layer)
        if canonical is None:
            if plan.project.kind != "heads":
                raise ValueError(
                    f"layer {site.layer}: its plan is {plan.project.label()}, and no weights are given for it"
                )
            canonical = kept_weights(site, plan, tensors.__getitem__)
        _check_shapes(site, plan, canonical)
        shapes = {name: list(tensor.shape) for name, tensor in canonical.items()}
        layers.append({"site": site.to_dict(), "plan": plan.to_dict(), "call": call.to_dict(), "shapes": shapes})
        replacing |= {f"{site.module}.{name}": tensor for name, tensor in canonical.items()}
        origins |= {f"{site.module}.{name}": origin_of(site, name) for name in canonical}
    surgery = {
        "parent": {"model_type": model.config.model_type, "architecture": type(model).__name__},
        "layers": layers,
        "provenance": provenance or {},
    }
    return converted_config(model.config, _as_json(surgery)), replacing, origins


def rebuild(
    model: PreTrainedModel,
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    origins: dict[str, str | None] | None = None,
) -> PreTrainedModel:
    """A model of class `cls` with these tensors, and for the rest as `model` is: nothing is cast, moved or retied.

    What no state dict holds comes from `model`: buffers that are not saved, which parameters are one, which are
    trained, the training mode of each module, the generation config.

    Args:
        model: the parent; it is not changed.
        tensors: the state dict of the result; they are taken as they are, not copied.
        origins: parameters that `model` has under another name, or not at all (None); those train.

    Raises:
        ValueError: a parameter or buffer of the result would be without values.
    """
    with torch.device("meta"):
        made = cls(config)
    made.load_state_dict(tensors, assign=True)
    _copy_tensors(model, made)
    for module in made.modules():
        if isinstance(module, SurgeryAttention):
            module.build_tables(module.q_proj.weight.device)
    _share_parameters(model, made)
    left = [name for name, t in [*made.named_parameters(), *made.named_buffers()] if t.is_meta]
    if left:
        raise ValueError(f"{cls.__name__}: nothing fills {', '.join(left)}")
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in made.named_parameters():
        origin = (origins or {}).get(name, name)
        parameter.requires_grad_(parameter.is_floating_point() and (origin is None or flags.get(origin, True)))
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in made.named_modules():
        while name not in modes:  # inside a module that took the place of another
            name = name.rpartition(".")[0]
        module.training = modes[name]
    if model.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    return made


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
    wanted = plan.project.shapes(site, plan.owns_cache)
    wanted["q_proj.weight"] = (site.heads * site.head_dim, site.hidden_size)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted({name for name in {*wanted, *found} if name.split(".")[0] in _MAKES_KV}):
        absent = name.split(".")[0] in plan.absent
        known = name in wanted or not name.endswith(".bias")  # a bias is where the parent has one
        if not absent and known and wanted.get(name) != found.get(name):
            raise ValueError(f"{where}: {name} has shape {found.get(name)}, its plan asks for {wanted.get(name)}")
    beside: dict[str, tuple[int, ...]] = {}
    if plan.retain is not None and plan.owns_cache:
        shapes = gate_shapes(plan.retain, site.hidden_size, plan.decisions)
        beside |= {f"gate.{name}": shape for name, shape in shapes.items()}
    if isinstance(plan.store, Codec) and plan.owns_cache:
        beside |= {f"codec.{name}": shape for name, shape in plan.store.table_shapes(plan.entry()).items()}
    found = {name: shape for name, shape in found.items() if name.startswith(("gate.", "codec."))}
    for name in sorted({*beside, *found}):
        if beside.get(name) != found.get(name):
            raise ValueError(f"{where}: {name} has shape {found.get(name)}, its plan asks for {beside.get(name)}")


_MAKES_KV = ("kv_down", "k_up", "k_mean", "v_up", "q_rope", "rope_freq_bits", "q_proj", "k_proj", "v_proj")


def _copy_tensors(parent: nn.Module, made: nn.Module) -> None:
    """What modules hold beside their state dict: rotary tables, embedding scales."""
    modules = dict(parent.named_modules())
    for name, module in made.named_modules():
        if name not in modules or isinstance(module, SurgeryAttention):
            continue
        # Two names may share one tensor: Phi-3's frequencies and their originals.
        for key, buffer in modules[name].named_buffers(recurse=False, remove_duplicate=False):
            if key in module._buffers and key in module._non_persistent_buffers_set:
                module._buffers[key] = at_rest(modules[name], key, buffer).clone()
        for key, value in vars(modules[name]).items():
            if isinstance(value, Tensor) and isinstance(vars(module).get(key), Tensor):
                vars(module)[key] = value.clone()


def _share_parameters(parent: PreTrainedModel, made: PreTrainedModel) -> None:
    """Make those parameters one that are one in the parent. Its config does not decide: files may say otherwise."""
    first: dict[int, str] = {}
    known = {name for name, _ in made.named_parameters(remove_duplicate=False)}
    for name, parameter in parent.named_parameters(remove_duplicate=False):
        source = first.setdefault(id(parameter), name)
        if source == name or not {source, name} <= known:
            continue
        shared = made.get_parameter(source)
        other = made.get_parameter(name)
        if shared.data_ptr() == other.data_ptr() or (shared.shape == other.shape and shared.equal(other)):
            owner, _, attribute = name.rpartition(".")
            setattr(made.get_submodule(owner), attribute, shared)
    made.all_tied_weights_keys = dict(parent.all_tied_weights_keys)


def _as_json(value: Any) -> Any:
    """Tuples as lists: a config compares equal to itself after a round trip."""
    if isinstance(value, dict):
        return {key: _as_json(v) for key, v in value.items()}
    return [_as_json(v) for v in value] if isinstance(value, (list, tuple)) else value
