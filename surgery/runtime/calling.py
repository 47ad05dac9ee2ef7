"""How a parent's decoder layer calls its attention module, and what it expects back.

Decoder layers differ in argument names, in what they return, in the meaning of a boolean mask, in whether the
attention adds the residual. None of that is looked up by family: `record_calls` runs the first layers of the parent
once on three tokens, watches, and writes down a `CallingConvention` that `config.surgery` keeps.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from .layout import AttentionSite, Rotary

CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value")
"""Names under which releases of transformers hand a cache to a model or its attention, newest first: 5.24 renamed
`past_key_values` to `cache`."""
BIAS_NAMES = ("alibi", "position_bias")
"""Arguments that carry the parent's own ALiBi; ours comes from the slopes of the site."""


@dataclass(frozen=True, kw_only=True)
class CallingConvention:
    """What a decoder layer passes to its attention module and reads from the result."""

    arguments: tuple[str, ...]
    """Parameter names of the parent's attention forward, in order; the first one is the layer's input."""
    returns: tuple[str, ...] | None = ("output", "weights")
    """One of `output`, `weights`, `cache`, `none` per place of the returned tuple; None for a bare tensor."""
    returns_list: bool = False
    """True where these places are of a list, to which the layer adds lists (GPT)."""
    adds_residual: bool = False
    mask_true_hides: bool = False
    """True where a boolean mask marks what is hidden (MPT), not what is visible."""
    alibi_skips_padding: bool = False
    """True where the parent's ALiBi counts the tokens that its mask shows (BLOOM), not places in the cache (MPT)."""
    rotary_layout: str | None = None
    """How `position_embeddings` repeat the angle of pair j: `halves` (at j and j + dims/2), `pairs` (at 2j and
    2j + 1), `once`; None where cos and sin are not passed and are computed from the site."""
    attention_dropout: float = 0.0
    output_dropout: float = 0.0

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of one call by name, with the layer's input under `hidden_states`."""
        named = dict(zip(self.arguments, args, strict=False)) | kwargs
        named["hidden_states"] = named.pop(self.arguments[0])
        return named

    def of_installed(self, replaced: nn.Module) -> CallingConvention:
        """This convention with the argument names of `replaced`, the attention of the release that is installed.

        A checkpoint may have been written under another release, which named or ordered the arguments otherwise.
        """
        return dataclasses.replace(self, arguments=_positional(replaced))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CallingConvention:
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        return cls(**fields)


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward pass by their names, those that were given by their place as well."""
    names = list(inspect.signature(model.forward).parameters) if args else []
    return dict(zip(names, args, strict=False)) | kwargs


def take_cache(named: dict[str, Any]) -> Any:
    """Remove the cache from the arguments of a call, whatever it is called there, and return it; None without one.

    A cache is known by its type, so that a release may rename the argument; objects that merely act as one are known
    by the names in use so far.
    """
    names = [name for name, value in named.items() if name in CACHE_NAMES or isinstance(value, Cache)]
    return next((cache for cache in [named.pop(name) for name in names] if cache is not None), None)


def cache_argument(model: nn.Module) -> str:
    """The name under which `model` takes a cache: `cache` from transformers 5.24 on, `past_key_values` before.

    Raises:
        ValueError: its forward names no such argument.
    """
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in CACHE_NAMES if name in parameters), None)
    if name is None:
        raise ValueError(
            f"{type(model).__name__}: its forward takes {', '.join(parameters)}, none of which is known to be a cache "
            f"({', '.join(CACHE_NAMES)}; transformers {transformers.__version__})"
        )
    return name


def going_on(model: nn.Module, ids_BT: Tensor, cache: Any, past: int) -> dict[str, Any]:
    """Arguments by which `model` reads tokens behind the `past` ones that `cache` holds, without padding.

    Positions are named, as `generate` names them: some parents count from 0 in every call (Bamba).
    """
    named: dict[str, Any] = {"input_ids": ids_BT, "use_cache": True, cache_argument(model): cache}
    if "position_ids" in inspect.signature(model.forward).parameters:
        places = torch.arange(past, past + ids_BT.shape[1], device=ids_BT.device)
        named["position_ids"] = places.expand(len(ids_BT), -1)
    return named


def cache_of(output: Any) -> Any:
    """The cache among the results of a forward pass, a `ModelOutput` or a tuple; None without one."""
    if isinstance(output, Mapping):
        found = next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)
        return next((value for value in output.values() if isinstance(value, Cache)), found)
    places = output if isinstance(output, (tuple, list)) else ()
    return next((value for value in places if isinstance(value, Cache)), None)


def record_calls(model: nn.Module, sites: Sequence[AttentionSite]) -> list[CallingConvention]:
    """Run `model` on a few tokens and write down how it calls the attention of each site.

    Hooks are global, not the model's own, and the run stops after the last kind of attention has been seen: two
    modules of one class, both with or both without rotary embedding, are called alike.

    Raises:
        ValueError: the model is on the meta device, or an attention's output is not that of its output projection.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("cannot record how attention is called on the meta device: load the parent's weights first")
    modules = dict(model.named_modules())
    kinds = called_kinds(model, sites)
    projections = {id(modules[site.o.weight.rpartition(".")[0]]): site.module for site in kinds.values()}
    attentions = {id(modules[site.module]): (kind, site) for kind, site in kinds.items()}
    outputs: dict[str, Any] = {}
    found: dict[tuple[type, bool], CallingConvention] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if id(module) in projections:
            outputs[projections[id(module)]] = output
        if id(module) in attentions:
            kind, site = attentions[id(module)]
            if site.module not in outputs:
                raise ValueError(f"{site.module}: does not call its output projection {site.o.weight} itself")
            found[kind] = _read_call(module, site, args, kwargs, output, outputs[site.module])
            if len(found) == len(kinds):
                raise _Seen

    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    tokens = torch.ones(2, 3, dtype=torch.long, device=device)
    # One padded row, so that no mask function may leave the mask out.
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]], device=device)
    handle = nn.modules.module.register_module_forward_hook(watch, with_kwargs=True)
    try:
        model.eval()
        with torch.no_grad():
            model(input_ids=tokens, attention_mask=mask, use_cache=False)
    except _Seen:
        pass
    finally:
        handle.remove()
        # torch leaves the mark, and hooks of a model that was pickled may have this number.
        nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)
        for module, flag in training.items():
            module.training = flag
    missing = [site.module for kind, site in kinds.items() if kind not in found]
    if missing:
        raise ValueError(f"{', '.join(missing)}: not called in a forward pass of {type(model).__name__}")
    return [found[_kind(modules[site.module], site)] for site in sites]


def called_kinds(model: nn.Module, sites: Sequence[AttentionSite]) -> dict[tuple[type, bool], AttentionSite]:
    """The kinds of attention modules that a model may call differently, each with its first site."""
    return {_kind(model.get_submodule(site.module), site): site for site in reversed(sites)}


class _Seen(Exception):
    """Ends the recorded run early."""


def _kind(module: nn.Module, site: AttentionSite) -> tuple[type, bool]:
    return type(module), site.rotary is None


def _read_call(
    module: nn.Module,
    site: AttentionSite,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    projected: Tensor,
) -> CallingConvention:
    names = _positional(module)
    named = CallingConvention(arguments=names).bind(args, kwargs)
    places = output if isinstance(output, (tuple, list)) else (output,)
    residual = named.get("residual")
    returns, adds_residual = [], False
    for value in places:
        if isinstance(value, Tensor) and value.numel() == projected.numel() and "output" not in returns:
            adds_residual = _same(value, projected, residual)
            returns.append("output")
        elif isinstance(value, Cache):
            returns.append("cache")
        elif "output" in returns and "weights" not in returns:
            returns.append("weights")
        else:
            returns.append("none")
    if "output" not in returns:
        raise ValueError(f"{site.module}: returns no tensor of the shape of its output projection {site.o.weight}")
    mask = named.get("attention_mask")
    boolean = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 4
    return CallingConvention(
        arguments=names,
        returns=tuple(returns) if isinstance(output, (tuple, list)) else None,
        returns_list=isinstance(output, list),
        adds_residual=adds_residual,
        # The first query of the unpadded row must not see the last key.
        mask_true_hides=mask is not None and boolean and bool(mask[-1, 0, 0, -1]),
        alibi_skips_padding=_skips_padding(site, named),
        rotary_layout=_rotary_layout(site.rotary, named.get("position_embeddings")),
        attention_dropout=_dropout(module, "attention_dropout", "attn_dropout", "attn_dropout_p", "attn_pdrop"),
        output_dropout=_dropout(module, "resid_dropout", *(["hidden_dropout"] if adds_residual else [])),
    )


def _positional(module: nn.Module) -> tuple[str, ...]:
    """Parameter names of the module's forward that may be given by position, in order."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _skips_padding(site: AttentionSite, named: dict[str, Any]) -> bool:
    """Whether ALiBi differs between the two recorded rows, of which the first is padded."""
    bias = next((named[name] for name in BIAS_NAMES if isinstance(named.get(name), Tensor)), None)
    if bias is None or bias.numel() != 2 * site.heads * 3:
        return False
    padded, whole = bias.flatten().chunk(2)
    return not torch.equal(padded, whole)


def _same(value: Tensor, projected: Tensor, residual: Tensor | None) -> bool:
    """Whether `value` is the projection's output with the residual (True) or without (False)."""
    value, projected = value.flatten().float(), projected.flatten().float()
    if torch.allclose(value, projected, rtol=1e-3, atol=1e-5):
        return False
    if residual is not None and torch.allclose(value, projected + residual.flatten(), rtol=1e-2, atol=1e-3):
        return True
    raise ValueError("the attention's output is neither its output projection's nor that plus the residual")


def _rotary_layout(rotary: Rotary | None, position_embeddings: Any) -> str | None:
    if rotary is None or not isinstance(position_embeddings, (tuple, list)) or len(position_embeddings) != 2:
        return None
    cos, sin = position_embeddings
    if not isinstance(cos, Tensor) or cos.is_complex() or cos.ndim != (3 if rotary.axes is None else cos.ndim):
        return None
    angles = torch.arange(cos.shape[-2], device=cos.device)[:, None] * torch.tensor(rotary.inv_freq, device=cos.device)
    for layout in ("halves", "pairs", "once"):
        if (cos.shape[-1] == len(rotary.inv_freq)) != (layout == "once"):
            continue
        got = [once(t, layout, rotary)[-1].float() for t in (cos, sin)]
        want = [angles.cos() * rotary.scaling, angles.sin() * rotary.scaling]
        if all(g.shape == w.shape and torch.allclose(g, w, atol=2e-2) for g, w in zip(got, want, strict=True)):
            return layout
    return None


def once(table: Tensor, layout: str, rotary: Rotary) -> Tensor:
    """[B, T, pairs] out of a cos or sin that repeats every angle, or has it for every axis of the positions."""
    pairs = len(rotary.inv_freq)
    table = table[..., ::2][..., :pairs] if layout == "pairs" else table[..., :pairs]
    if table.ndim == 4 and rotary.axes is not None:  # [axes, B, T, pairs]; releases differ in who chooses the axis
        table = torch.stack([table[axis, ..., pair] for pair, axis in enumerate(rotary.axes)], dim=-1)
    return table


def _dropout(module: nn.Module, *names: str) -> float:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, nn.Dropout):
            return value.p
        if isinstance(value, (int, float)):
            return float(value)
    return 0.0


def forget_calls(base_model: nn.Module, _: tuple[Any, ...]) -> None:
    """Layers need not all run: a draft by early exit runs the first ones, a stage of a pipeline its own."""
    if not torch.compiler.is_compiling():
        for attention in base_model.surgery_attentions:  # type: ignore[union-attr]
            attention.received_cache = None


def check_caches(base_model: nn.Module, _: tuple[Any, ...], output: Any) -> None:
    """Refuse a forward pass that gave back a cache which converted attentions were not handed.

    Raises:
        RuntimeError: the cache would stay empty, and the model would go on as if there were no earlier tokens. Training
            is left alone: activation checkpointing takes the cache from the layers on purpose.
    """
    if base_model.training or torch.compiler.is_compiling() or cache_of(output) is None:
        return
    for attention in base_model.surgery_attentions:  # type: ignore[union-attr]
        if attention.received_cache is False:
            raise RuntimeError(
                f"layer {attention.layer_idx}: the model was asked to use a cache, and its attention received none. "
                f"transformers {transformers.__version__} calls it with {', '.join(attention.received)}; none of these "
                "is a cache. This release is newer than the code of the converted attention: use an older one, or "
                "convert the model again with a newer version of surgery."
            )


def number_anew(module: nn.Module) -> None:
    """Give the hooks of a module numbers that no hook of this process has."""
    held = vars(module)
    after = [held.get(f"_forward_hooks_{mark}", {}) for mark in ("with_kwargs", "always_called")]
    both = (module._forward_pre_hooks, [held.get("_forward_pre_hooks_with_kwargs", {})]), (module._forward_hooks, after)
    for hooks, marks in both:
        found = [(hook, [number in mark for mark in marks]) for number, hook in hooks.items()]
        for numbered in (hooks, *marks):
            numbered.clear()
        for hook, marked in found:
            number = RemovableHandle(hooks).id
            hooks[number] = hook
            for mark, is_marked in zip(marks, marked, strict=True):
                if is_marked:
                    mark[number] = True
