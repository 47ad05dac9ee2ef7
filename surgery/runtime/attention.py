"""What every converted attention shares: norm, rotation and mask of an `AttentionSite`, calling convention, output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
import transformers.initialization as init
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .caches import has_own_layer, install_layers
from .calling import BIAS_NAMES, CallingConvention, once, take_cache
from .coded_layer import prepare
from .functions import (
    GATE_FUNCTIONS,
    LIKE_SDPA,
    angles_of,
    as_bits,
    complete_mask,
    eager_attention_forward,
    grouped_attention_forward,
    turn_halves,
)
from .layout import AttentionSite, HeadNorm, LayerPlan

Shapes = Mapping[str, tuple[int, ...]]
KVStates = MutableMapping[int, tuple[Tensor, Tensor]] | None
SHARED_STATES = "shared_kv_states"
"""Keyword argument that takes the caches of owners to their readers, through the parent's own layers."""


class Inputs(NamedTuple):
    """What one call gives an attention, whatever the parent names it."""

    hidden_BTD: Tensor
    mask: Tensor | None
    position_embeddings: Any
    position_ids: Tensor | None
    cache: Any
    shared: KVStates
    rest: dict[str, Any]
    """Arguments for the attention function."""


class SurgeryHeadNorm(nn.Module):
    """RMS or layer norm of [B, T, N, H], over each head or over all of them."""

    def __init__(self, norm: HeadNorm, weight: tuple[int, ...] | None, bias: tuple[int, ...] | None) -> None:
        super().__init__()
        self.norm = norm
        self.weight = None if weight is None else nn.Parameter(torch.full(weight, 1.0 - norm.weight_offset))
        self.bias = None if bias is None else nn.Parameter(torch.zeros(bias))

    def reset(self) -> None:
        """Initialise what no checkpoint has filled."""
        if self.weight is not None:
            init.constant_(self.weight, 1.0 - self.norm.weight_offset)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x_BTNH: Tensor) -> Tensor:
        heads, width = x_BTNH.shape[-2:]
        dims = (-2, -1) if self.norm.span == "all" else (-1,)
        x = x_BTNH.float()
        if self.norm.kind == "layer":
            x = x - x.mean(dims, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + self.norm.eps)
        if self.weight is not None:
            x = x * (self.norm.weight_offset + _per_head(self.weight, heads, width).float())
        if self.bias is not None:
            x = x + _per_head(self.bias, heads, width).float()
        return x.to(x_BTNH.dtype)

    def extra_repr(self) -> str:
        return f"{self.norm.kind}, span={self.norm.span}, eps={self.norm.eps}"


class CodecTables(nn.Module):
    """Tables of a codec that calibration text has decided, int32."""

    def forward(self) -> dict[str, Tensor]:
        """By name. A call, so that hooks of accelerate bring those that lie elsewhere."""
        return dict(self.named_buffers())


def equally_wide(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with zeros behind the narrower of keys and values, which change no score and no mean.

    For keys and values of one width sdpa goes block by block; for others it holds all scores at once, 4 to 5 times as
    long over 8192 tokens of a CPU.
    """
    missing = key.shape[-1] - value.shape[-1]
    if missing > 0:
        value = nn.functional.pad(value, (0, missing))
    elif missing < 0:
        query, key = (nn.functional.pad(x, (0, -missing)) for x in (query, key))
    return query, key, value


class SurgeryAttention(nn.Module):
    """Softmax attention of one converted layer, called and answering as the parent's module was.

    What every form of the cache shares: the calling convention, queries, masks, the attention function, the output.
    A subclass makes keys and values (`_query_key_value`) from the parameters that it names in `linears`, `norms` and
    `tensors`; those in `plan.absent` are not built.

    A reader (`plan.owner` is an earlier layer) attends to what its owner's cache gave in the same forward pass. That
    travels in `shared_kv_states`, a mapping which the model makes anew for each pass and hands to every layer: state
    kept in modules would be wrong as soon as activation checkpointing runs a layer again after another pass.

    Args:
        config: the config that carries `_attn_implementation`.
        site: what the parent computed there; names of parameters are not used.
        plan: what is cached and who reads it.
        call: arguments and result of the parent's module.
        shapes: shape of each parameter by name. Optional ones (biases, gains, `sinks`) exist where they are listed.

    Departs from parents in one thing: dropout on weights and output is kept, other dropout inside attention is not.
    """

    linears: tuple[str, ...]
    norms: tuple[str, ...]
    tensors: tuple[str, ...] = ("sinks",)
    q_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: SurgeryHeadNorm | None
    out_gate: nn.Linear | None
    sinks: nn.Parameter | None
    inv_freq_bits: Tensor
    slope_bits: Tensor
    num_key_value_groups: int
    all_plans: tuple[LayerPlan, ...] = ()
    """Of the whole model: its cache gets layers of ours for all of them at once. `swap_attention` sets it."""

    def __init__(
        self, config: Any, site: AttentionSite, plan: LayerPlan, call: CallingConvention, shapes: Shapes
    ) -> None:
        super().__init__()
        _check(site, plan)
        self.config, self.site, self.plan, self.call = config, site, plan, call
        self.layer_idx = site.layer
        self.is_causal = True
        self.head_dim = site.head_dim
        self.scaling = site.scale
        self.sliding_window = site.window
        self.num_key_value_groups = site.group_size
        self.owns_cache = plan.owner == plan.layer
        self.has_readers = False
        self.received_cache: bool | None = None
        self.received: tuple[str, ...] = ()
        """Whether the last call brought a cache, None before one in this pass; and the names of its other arguments."""
        self.records: tuple[tuple[str, int], ...] = ()
        self.recorded: list[tuple[str, int]] = []
        """Model outputs that the parent's module is recorded for, and those of them that this one gives by now: see
        `recording`."""

        for name in (name for name in self.linears if name not in plan.absent):
            rows, columns = shapes[f"{name}.weight"]
            setattr(self, name, nn.Linear(columns, rows, bias=f"{name}.bias" in shapes))
        self.out_gate = None
        if site.gate is not None:
            rows, columns = shapes["out_gate.weight"]
            self.out_gate = nn.Linear(columns, rows, bias="out_gate.bias" in shapes)
        for name in self.norms:
            norm: HeadNorm | None = None if name in plan.absent else getattr(site, name)
            module = SurgeryHeadNorm(norm, shapes.get(f"{name}.weight"), shapes.get(f"{name}.bias")) if norm else None
            setattr(self, name, module)
        self.codec = CodecTables()
        for name, shape in shapes.items():
            if name.startswith("codec."):
                self.codec.register_buffer(name.removeprefix("codec."), torch.zeros(shape, dtype=torch.int32))
        for name in self.tensors:
            self.register_parameter(name, nn.Parameter(torch.empty(shapes[name])) if name in shapes else None)

    def build_tables(self, device: torch.device | None = None) -> None:
        """Put the constants of the layer, which no state dict has, on `device`.

        Args:
            device: None: where tensors are made; parameters alone may be on the meta device (`init_empty_weights`).
        """
        device = torch.empty(0).device if device is None else device
        for name, value in self._tables().items():
            self.register_buffer(name, value.to(device), persistent=False)

    def _tables(self) -> dict[str, Tensor]:
        """Constants of the layer. Floats are kept as their bits: `.to(torch.bfloat16)` must not round them."""
        tables = {}
        if self.site.rotary is not None and self._needs_frequencies():
            tables["inv_freq_bits"] = as_bits(self.site.rotary.inv_freq)
        if self.site.alibi_slopes is not None:
            tables["slope_bits"] = as_bits(self.site.alibi_slopes)
        return tables

    def _needs_frequencies(self) -> bool:
        """Whether the layer computes cos and sin of the parent's rotation itself."""
        raise NotImplementedError

    def reset(self) -> None:
        """Fill the tables and initialise what no checkpoint has filled (projections are initialised by the parent)."""
        for name, value in self._tables().items():
            init.copy_(getattr(self, name), value)
        if self.sinks is not None:
            init.zeros_(self.sinks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = self.call.bind(args, kwargs)
        residual: Tensor | None = named.pop("residual", None)
        for name in BIAS_NAMES:
            named.pop(name, None)
        cache = take_cache(named)
        if not torch.compiler.is_compiling():
            self.received_cache, self.received = cache is not None, tuple(named)
        inputs = Inputs(
            hidden_BTD=named.pop("hidden_states"),
            mask=named.pop("attention_mask", None),
            position_embeddings=named.pop("position_embeddings", None),
            position_ids=named.get("position_ids"),
            cache=cache,
            shared=named.pop(SHARED_STATES, None),
            rest=named,
        )

        attn_output, attn_weights = self._attend(inputs)
        if self.out_gate is not None:
            assert self.site.gate is not None
            gate = self.out_gate(inputs.hidden_BTD).unflatten(-1, (self.site.heads, self.site.gate.width))
            gate = GATE_FUNCTIONS[self.site.gate.function](gate.float()).to(attn_output.dtype)
            attn_output = attn_output.reshape(*gate.shape[:-1], -1) * gate
        output = self.o_proj(attn_output.reshape(*inputs.hidden_BTD.shape[:-1], -1))
        if self.call.output_dropout:
            output = nn.functional.dropout(output, self.call.output_dropout, self.training)
        if self.call.adds_residual:
            output = output + residual
        if self.call.returns is None:
            return output
        if self.config._attn_implementation in LIKE_SDPA and not self.gives_weights(inputs.rest):
            attn_weights = None  # sdpa has none, as in the parent; layers that it cannot compute keep theirs
        answers = {"output": output, "weights": attn_weights, "cache": inputs.cache, "none": None}
        return (list if self.call.returns_list else tuple)(answers[place] for place in self.call.returns)

    def _attend(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """Head outputs [B, T, N, V], and weights where the attention function gives them."""
        query, key, value = self._query_key_value(inputs)
        attention_interface = self._attention_function(inputs.rest)
        implementation = self.config._attn_implementation
        absorbs = self._absorbs(inputs.hidden_BTD)
        if absorbs:
            attention_interface = grouped_attention_forward
        own = attention_interface in (eager_attention_forward, grouped_attention_forward)
        mask = inputs.mask
        if own or implementation in LIKE_SDPA:
            slopes = None if self.site.alibi_slopes is None else self.slope_bits
            mask = complete_mask(
                self.site, self.call, self.plan.owner, slopes, mask, query, key, inputs.cache, skippable=not own,
                is_causal=self.is_causal,
            )  # fmt: skip
        elif self.site.alibi_slopes is not None:
            raise ValueError(f"ALiBi runs with attn_implementation 'eager' or 'sdpa', not {implementation!r}")

        width = value.shape[-1]
        if not own and implementation in LIKE_SDPA and query.shape[2] > 1:
            query, key, value = equally_wide(query, key, value)
        found = self._call_attention(attention_interface, query, key, value, mask, inputs.rest)
        if found[0].shape[-1] != width:
            found = (found[0][..., :width], found[1])
        return (self._values(found[0]), found[1]) if absorbs else found

    def gives_weights(self, named: Mapping[str, Any]) -> bool:
        """Whether a call answers with its weights: eager does, and layers that take them themselves and ask for them.

        `named`: arguments of the call.
        """
        implementation = self.config._attn_implementation
        asked = not self.records and bool(named.get("output_attentions"))  # recorded modules do not leave sdpa for it
        return implementation == "eager" or (asked and implementation in LIKE_SDPA)

    def _attention_function(self, named: Mapping[str, Any]) -> Callable:
        """What `_attn_implementation` names, or eager where that cannot compute this layer or what is asked of it."""
        implementation = self.config._attn_implementation
        bare = self.site.softcap is None and self.sinks is None
        if implementation in LIKE_SDPA and (not bare or self.gives_weights(named)):
            return eager_attention_forward
        found: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return found

    def _call_attention(
        self,
        attention_interface: Callable,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        named: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """The attention function with everything that it may ask of this layer. `named`: arguments of the call."""
        named.pop("use_cache", None)
        if self.site.softcap is not None:
            named["softcap"] = self.site.softcap
        if self.sinks is not None:
            named["s_aux"] = self.sinks
        found: tuple[Tensor, Tensor | None] = attention_interface(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.call.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **named,
        )
        return found

    def _query_key_value(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """What the attention function takes, [B, N, T, .] and twice [B, K, S, .], after the cache was updated."""
        raise NotImplementedError

    def held(self, dtype: torch.dtype) -> tuple[int, int, int]:
        """Heads, width of keys and width of values that the layer has in a cache of its own which keeps every token."""
        return self.plan.entry(dtype.itemsize)

    def _store(self, key: Tensor, value: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Append to the layer's own cache; returns all that is to be seen, and leaves it to the readers."""
        if inputs.cache is not None:
            if has_own_layer(self.plan):
                install_layers(inputs.cache, self.all_plans)
                layer = inputs.cache.layers[self.layer_idx]
                prepare(layer, inputs.mask, self.call.mask_true_hides, self.codec())
            key, value = inputs.cache.update(key, value, self.layer_idx)
        key = self._as_read(key, inputs)
        if self.has_readers:
            assert inputs.shared is not None
            inputs.shared[self.layer_idx] = key, value
        return key, value

    def _as_read(self, key: Tensor, inputs: Inputs) -> Tensor:
        """Keys as attention reads them, of what the cache gave."""
        return key

    def _lent(self, lender: int, shared: KVStates) -> tuple[Tensor, Tensor]:
        """What another layer sees in its cache, in this forward pass."""
        if shared is None or lender not in shared:
            raise ValueError(
                f"layer {self.layer_idx} reads the cache of layer {lender}, which left none in `{SHARED_STATES}`: call "
                "the converted model as a whole"
            )
        return shared[lender]

    def _borrow(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What the owner of the cache sees.

        The layer's own place in the cache gets no heads, once: no bytes, but releases of transformers before 5.22
        cannot crop a place that nothing was ever written to.
        """
        key, value = self._lent(self.plan.owner, inputs.shared)
        cache = inputs.cache
        if cache is None:
            return key, value
        place = cache.layers[self.layer_idx] if len(cache.layers) > self.layer_idx else None
        begun = place is not None and place.is_initialized
        # Each update of an offloading cache fetches the layer behind; those that quantize need not crop, nor can they
        # quantize nothing.
        if (not begun or getattr(cache, "offloading", False)) and not hasattr(place, "_quantize"):
            nothing = key.new_empty(len(key), 0, inputs.hidden_BTD.shape[1], 0)
            cache.update(nothing, nothing, self.layer_idx)
        return key, value

    def _absorbs(self, hidden_states: Tensor) -> bool:
        """Whether scores and means are taken over the cached latents themselves; `_values` then maps the means up."""
        return False

    def _values(self, mean_BTNR: Tensor) -> Tensor:
        """Head outputs from averaged latents."""
        raise NotImplementedError

    def _queries(self, hidden_states: Tensor) -> Tensor:
        """[B, T, N, H], normed, before any rotation."""
        return norm_heads(self.q_norm, self._project(self.q_proj, hidden_states, self.site.head_dim), False)

    def _positions(self, inputs: Inputs) -> Tensor:
        """[B or 1, T]; counted through the cache where the parent passes none."""
        if inputs.position_ids is not None:
            return inputs.position_ids
        tokens, cache = inputs.hidden_BTD.shape[1], inputs.cache
        past = 0 if cache is None else cache.get_seq_length(self.plan.owner)
        writes_none = self.training and self.plan.retain is not None  # relaxed decisions are in no cache
        if not self.owns_cache and cache is not None and not writes_none:
            past = past - tokens  # the owner has appended them
        return past + torch.arange(tokens, device=inputs.hidden_BTD.device)[None]

    def _project(self, projection: nn.Module, hidden_states: Tensor, width: int) -> Tensor:
        x = projection(hidden_states)
        if self.site.clip_qkv is not None:
            x = x.clamp(-self.site.clip_qkv, self.site.clip_qkv)
        return x.unflatten(-1, (-1, width))

    def _cos_sin(self, position_embeddings: Any, positions: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of each rotary pair, [B, T, 1, dims/2]."""
        rotary = self.site.rotary
        assert rotary is not None
        if self.call.rotary_layout is not None:
            cos, sin = (once(t, self.call.rotary_layout, rotary) for t in position_embeddings)
        else:
            assert positions is not None
            cos, sin = angles_of(positions, self.inv_freq_bits, rotary.scaling, dtype)
        return cos.unsqueeze(2), sin.unsqueeze(2)

    def _turn(self, x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Multiply rotary pair (a, b), read as a + ib, by cos + i sin."""
        rotary = self.site.rotary
        assert rotary is not None
        end = rotary.start + rotary.dims
        before, turning, after = x_BTNH[..., : rotary.start], x_BTNH[..., rotary.start : end], x_BTNH[..., end:]
        if rotary.interleaved:
            a, b = turning[..., 0::2], turning[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        else:
            turned = turn_halves(turning, cos, sin)
        turned = turned.to(x_BTNH.dtype)
        return turned if turned.shape == x_BTNH.shape else torch.cat((before, turned, after), dim=-1)


def _check(site: AttentionSite, plan: LayerPlan) -> None:
    where = f"{site.module} (layer {site.layer})"
    if site.alibi_slopes is not None and site.window is not None:
        raise ValueError(f"{where}: has ALiBi and a window; the positions in a sliding cache are not known here")
    if site.gated_output and site.gate is None:
        raise ValueError(f"{where}: gates its head outputs in a way that its description does not hold")
    if plan.layer != site.layer:
        raise ValueError(f"{where}: was given the plan of layer {plan.layer}")
    if any(lender >= plan.layer for lender in plan.lenders):
        raise ValueError(f"{where}: reads the cache of layer {plan.lenders[0]}, which is not there yet when it runs")
    if plan.window not in (None, site.window):
        raise ValueError(f"{where}: keeps {plan.window} tokens where its attention sees {site.window}")


def _per_head(weight: Tensor, heads: int, width: int) -> Tensor:
    return weight if weight.shape == (width,) else weight.view(heads, width)


def norm_heads(norm: SurgeryHeadNorm | None, x_BTNH: Tensor, after_rotary: bool) -> Tensor:
    """`norm` where there is one and this is its place."""
    return x_BTNH if norm is None or norm.norm.after_rotary is not after_rotary else norm(x_BTNH)
