"""examine() against what the config says, and its descriptions against what the real modules compute."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json

import pytest
import torch
import transformers as hf
from closeness import assert_close, relative_error
from families import FAMILIES, tiny_config, tiny_model
from transformers import AttentionInterface

from surgery.anatomy import Anatomy, attend, examine, known, project_qkv
from surgery.anatomy.capture import capture
from surgery.anatomy.walk import find_attentions
from surgery.errors import CheckpointError, UnsupportedModel
from surgery.runtime.layout import AttentionSite

TOKENS = 40
_KV_HEADS = {"falcon": 2, "falcon_alibi": 4, "falcon_mqa": 1, "dbrx": 2, "gpt_bigcode": 1}
_SITES = {"bamba": 1, "jamba": 1}


@functools.cache
def examined(name: str) -> tuple[hf.PreTrainedModel, Anatomy]:
    model = tiny_model(name)
    return model, examine(model)


def sites_of(name: str) -> tuple[AttentionSite, ...]:
    return examined(name)[1].sites


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> tuple[str, hf.PreTrainedModel, Anatomy]:
    return request.param, *examined(request.param)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """Every test reads for itself."""
    monkeypatch.setattr("surgery.anatomy.known._KNOWN", {})


def record(model: hf.PreTrainedModel, site: AttentionSite) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer's q projection reads and its output projection gives, in an ordinary forward."""
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = args[0] if name == "x" else output

        return hook

    hooks = [
        model.get_submodule(weight.rpartition(".")[0]).register_forward_hook(keep(name))
        for name, weight in (("x", site.q.weight), ("out", site.o.weight))
    ]
    ids = torch.randint(3, 128, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen["x"].reshape(2, TOKENS, -1), seen["out"].reshape(2, TOKENS, -1)


def test_every_attention_layer_is_found_with_the_heads_of_its_config(case):
    name, model, anatomy = case
    config = model.config
    count = _SITES.get(name, config.num_hidden_layers)
    assert len(anatomy.sites) == count
    assert len(anatomy.sites) + len(anatomy.other_layers) == anatomy.num_layers == config.num_hidden_layers
    assert anatomy.architecture == type(model).__name__
    assert anatomy.parameters == sum(p.numel() for p in model.parameters())
    heads = config.num_attention_heads
    kv_heads = _KV_HEADS.get(name, getattr(config, "num_key_value_heads", heads))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    for site in anatomy.sites:
        assert (site.heads, site.kv_heads, site.head_dim) == (heads, kv_heads, head_dim)
        assert site.value_dim == head_dim
        assert site.hidden_size == config.hidden_size


def test_description_alone_gives_what_the_real_attention_gives(case):
    _, model, anatomy = case
    params = dict(model.state_dict())
    for site in anatomy.sites:
        x, out = record(model, site)
        assert_close(attend(site, params, x), out, 1e-4)


def test_sites_survive_json(case):
    _, _, anatomy = case
    for site in anatomy.sites:
        assert AttentionSite.from_dict(json.loads(json.dumps(site.to_dict()))) == site
    json.dumps(anatomy.to_dict())


@pytest.mark.parametrize("name", ["llama_yarn", "phi3_longrope", "gpt2", "gptj", "gpt_neo", "falcon", "bloom", "bamba"])
def test_config_alone_gives_the_same_anatomy(name):
    model, anatomy = examined(name)
    from_config = examine(model.config)
    assert from_config.sites == anatomy.sites
    assert from_config.other_layers == anatomy.other_layers


@pytest.mark.parametrize("form", ["directory", "file", "string"])
def test_path_forms_read_only_the_config(tmp_path, form):
    FAMILIES["qwen3"]().save_pretrained(tmp_path)
    path = {"directory": tmp_path, "file": tmp_path / "config.json", "string": str(tmp_path)}[form]
    assert examine(path).sites == sites_of("qwen3")


def test_missing_config_says_where_it_looked(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        examine(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "falcon", "phi3_longrope", "llama_dynamic"])
def test_model_is_left_as_it_was(name):
    model = tiny_model(name).train()
    config = copy.deepcopy(model.config)
    before = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    implementation, rng = model.config._attn_implementation, torch.get_rng_state()
    rotary = {n: getattr(m, "rope_type", None) for n, m in model.named_modules()}
    examine(model)
    assert model.training
    assert model.config.to_dict() == config.to_dict()
    assert model.config._attn_implementation == implementation
    assert torch.equal(torch.get_rng_state(), rng)
    assert rotary == {n: getattr(m, "rope_type", None) for n, m in model.named_modules()}
    for n, t in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(before[n], t), n


def test_families_show_what_is_special_about_them():
    def first(name, layer=0):
        return sites_of(name)[layer]

    assert first("phi3").q.weight == first("phi3").k.weight == first("phi3").v.weight
    assert first("phi").rotary.dims == 8
    assert first("gpt2").q.transposed
    assert first("gpt2").rotary is None
    assert first("gptj").rotary.interleaved
    assert first("gptj").rotary.dims == 8
    assert first("cohere").rotary.interleaved
    assert not first("llama").rotary.interleaved
    assert [s.rotary is None for s in sites_of("smollm3")] == [False, False, False, True]
    assert [s.window for s in sites_of("gemma3")] == [8, 8, None]
    assert [s.window for s in sites_of("gpt_neo")] == [None, 8]
    assert first("gemma2").softcap == 50.0
    assert first("gemma3").q_norm.weight_offset == 1.0
    assert first("qwen3").q_norm.span == "head"
    assert first("olmo2").q_norm.span == "all"
    assert first("hunyuan").q_norm.after_rotary
    assert not first("qwen3").q_norm.after_rotary
    assert first("phi_qk_norm").q_norm.kind == "layer"
    assert first("phi_qk_norm").q_norm.bias.endswith("q_layernorm.bias")
    assert first("stablelm_qk_norm").q_norm.weight[3].endswith("q_layernorm.norms.3.weight")
    assert first("olmo").clip_qkv == 1.0
    assert first("gpt_oss").sinks == "model.layers.0.self_attn.sinks"
    assert first("opt").scale == pytest.approx(0.25)
    assert first("granite").scale == 0.1
    assert first("gpt2_inverse", 1).scale == pytest.approx(0.125)
    assert first("bloom").alibi_slopes == (0.25, 0.0625, 0.015625, 0.00390625)
    assert first("phi3_longrope").rotary.length_dependent
    assert first("llama_dynamic").rotary.length_dependent
    assert not first("llama_yarn").rotary.length_dependent
    assert first("llama_yarn").rotary.scaling == pytest.approx(1.1386294, rel=1e-6)
    assert [o.layer for o in examined("jamba")[1].other_layers] == [0, 2]


ALTERNATING = [
    "gemma3",
    "olmo3",
    "cohere2",
    "smollm3",
    "gpt_neo",
    "gpt_oss",
    "gpt2_inverse",
    "exaone4",
    "jamba",
    "bamba",
]


@pytest.mark.parametrize("name", [*ALTERNATING, "llama", "phi3_longrope", "stablelm_qk_norm", "olmo2", "mixtral"])
def test_leaving_out_equal_layers_changes_nothing(monkeypatch, name):
    _, short = examined(name)
    monkeypatch.setattr("surgery.anatomy.capture._find_alike", lambda *_: {})
    full = examine(FAMILIES[name]())
    assert (short.sites, short.other_layers, short.num_layers) == (full.sites, full.other_layers, full.num_layers)


class Uneven(hf.models.llama.modeling_llama.LlamaForCausalLM):
    """Twelve layers of three kinds: layer 5 has fewer KV heads, layer 7 scales its scores otherwise."""

    def __init__(self, config):
        super().__init__(config)
        fewer = copy.deepcopy(config)
        fewer.num_key_value_heads = 1
        layers = self.model.layers
        layers[5].self_attn = hf.models.llama.modeling_llama.LlamaAttention(fewer, layer_idx=5)
        layers[7].self_attn.scaling = 0.5


def test_deep_model_is_captured_once_per_kind_of_layer_and_read_layer_by_layer():
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 12
    source = Uneven(config)
    graph = capture(source)
    assert len(find_attentions(graph)) == 3
    assert set(graph.alike.values()) == {"model.layers.0"}
    sites = examine(source).sites
    assert [s.layer for s in sites] == list(range(12))
    assert [s.kv_heads for s in sites] == [1 if i == 5 else 2 for i in range(12)]
    assert [s.scale for s in sites] == [0.5 if i == 7 else 0.25 for i in range(12)]
    assert [s.q.weight for s in sites] == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(12)]


def test_a_model_is_read_once_while_class_config_buffers_and_code_are_the_same(monkeypatch):
    llama = hf.models.llama.modeling_llama
    read = []
    monkeypatch.setattr("surgery.anatomy.reader.capture", lambda source: read.append(source) or capture(source))

    def reads(source) -> int:
        read.clear()
        examine(source)
        return len(read)

    model = tiny_model("llama")
    first = examine(model)
    first.irreplaceable[0] = "a caller's own"
    copied = copy.deepcopy(model)
    assert reads(copied) == 0
    second = examine(copied)
    assert second.irreplaceable == {}
    assert second.sites == first.sites
    assert second.config is copied.config
    copied.model.rotary_emb.inv_freq *= 2
    assert reads(copied) == 1
    assert examine(copied).sites != first.sites
    config = FAMILIES["llama"]()
    assert reads(config) == 0
    config.architectures, config.dtype, config.use_cache = ["LlamaForCausalLM"], "bfloat16", False
    assert reads(config) == 0
    assert examine(config).dtype == "bfloat16"
    rotate = llama.apply_rotary_pos_emb
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", lambda *args, **kwargs: rotate(*args, **kwargs))
    assert reads(config) == 1
    config.rms_norm_eps = 3e-4
    assert reads(config) == 1
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 32, bias=False)
    with pytest.raises(UnsupportedModel, match="q_proj"):
        examine(model)


def test_norm_eps_is_read_to_the_digit():
    for eps in (1e-6, 1e-5, 3e-4):
        config = FAMILIES["qwen3"]()
        config.rms_norm_eps = eps
        assert examine(config).sites[0].q_norm.eps == eps


def test_a_window_longer_than_the_probe_is_read_exactly():
    config = FAMILIES["mistral"]()
    config.sliding_window = 4095
    assert {s.window for s in examine(config).sites} == {4095}


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "stablelm_qk_norm", "gpt_neo", "gemma2", "phi"])
def test_every_field_of_the_description_matters(name):
    """The truth check has teeth: a description that leaves something out gives something else."""
    model, anatomy = examined(name)
    site = anatomy.sites[1 if name == "gpt_neo" else 0]
    x, out = record(model, site)
    for field in ("q_norm", "k_norm", "rotary", "softcap", "window", "sinks"):
        if getattr(site, field) is not None:
            wrong = attend(dataclasses.replace(site, **{field: None}), dict(model.state_dict()), x)
            assert relative_error(wrong, out) > 1e-3, field


def test_project_qkv_takes_positions_of_each_row():
    model, anatomy = examined("llama")
    site = anatomy.sites[0]
    x = torch.randn(2, 5, 64)
    params = dict(model.state_dict())
    shifted = torch.stack([torch.arange(5), torch.arange(5) + 7])
    q, k, v = project_qkv(site, params, x, shifted)
    torch.testing.assert_close(q[:1], project_qkv(site, params, x[:1])[0])
    torch.testing.assert_close(k[1:], project_qkv(site, params, x[1:], torch.arange(5) + 7)[1])
    assert v.shape == (2, 2, 5, 16)


REFUSED = {
    "t5": (lambda: hf.T5Config(), "encoder-decoder"),
    "bart": (lambda: hf.BartConfig(), "encoder-decoder"),
    "mamba": (lambda: hf.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128), "no softmax attention"),
    "rwkv": (
        lambda: hf.RwkvConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128, attention_hidden_size=64),
        "RwkvConfig|no softmax attention|capture",
    ),
    "deepseek_v3": (
        lambda: tiny_config("DeepseekV3Config", num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2,
                     n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                     v_head_dim=16, first_k_dense_replace=1, moe_intermediate_size=32),
        r"layers\.0.*MLA",
    ),
    "ministral3": (
        lambda: tiny_config("Ministral3Config", max_position_embeddings=65536, head_dim=16), "change with the position"
    ),
    "bitnet": (lambda: tiny_config("BitNetConfig"), r"attn_sub_norm\.weight acts between"),
    "bert": (lambda: tiny_config("BertConfig"), "causal"),
    "vit": (lambda: hf.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4), "vit"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_described_are_refused_with_the_reason(name):
    make, reason = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=reason):
        examine(make())


@pytest.mark.parametrize("name", ["gptj", "codegen"])
def test_a_table_of_sines_that_a_cast_has_rounded_is_named_and_the_way_round_it_works(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"\.embed_positions is rounded to bfloat16.*dtype=torch\.bfloat16\)"):
        examine(model.to(torch.bfloat16))
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert examine(loaded).sites[0].rotary.dims == 8


def test_gated_output_is_noticed_and_not_passed_off_as_plain():
    model = hf.AutoModelForCausalLM.from_config(
        tiny_config("AfmoeConfig", num_experts=4, head_dim=16), dtype=torch.float32
    )
    site = examine(model).sites[0]
    assert site.gated_output
    q, k, _ = project_qkv(site, dict(model.state_dict()), torch.randn(1, 4, 64))
    assert (q.shape, k.shape) == ((1, 4, 4, 16), (1, 2, 4, 16))
    with pytest.raises(UnsupportedModel, match="gate"):
        attend(site, dict(model.state_dict()), torch.randn(1, 4, 64))


def test_edited_model_is_refused():
    model = tiny_model("llama")
    layer = model.model.layers[1].self_attn
    layer.q_proj = torch.nn.Linear(64, 32, bias=False)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.self_attn\.q_proj"):
        examine(model)


def test_unknown_things_between_projection_and_score_are_refused():
    class Odd(hf.models.llama.modeling_llama.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.self_attn.q_proj = torch.nn.Sequential(layer.self_attn.q_proj, torch.nn.GELU())

    config = FAMILIES["llama"]()
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn"):
        examine(Odd(config))


def test_the_probe_stays_out_of_other_peoples_way():
    examine(FAMILIES["llama"]())
    assert "surgery_anatomy" in AttentionInterface().valid_keys()
    model = tiny_model("llama")
    assert model.config._attn_implementation == "sdpa"


def test_a_capture_that_fails_at_first_leaves_no_hook_behind_and_prints_nothing(capsys, monkeypatch):
    """DBRX is captured at the second try: torch prints the graph so far, and 2.11 leaves a hook on all buffers."""
    monkeypatch.setattr(known, "_KNOWN", {})
    hooks = torch.nn.modules.module._global_buffer_registration_hooks
    before = list(hooks)
    examine(tiny_model("dbrx"))
    assert list(hooks) == before
    assert capsys.readouterr() == ("", "")
