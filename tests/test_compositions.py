"""Every pair of methods: planned as the recipes' documentation says, and where it says yes, converted and run."""

import compositions
import pytest
import torch
from transformers import DynamicCache

import surgery
from surgery.measure.memory import tensor_bytes

TEXT = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
PROMPT = TEXT[:2, :20]
OFTEN = {
    ("gqa", "mla"),
    ("gqa", "lowrank"),
    ("gqa", "dms"),
    ("mla", "share"),
    ("lowrank", "share, latent"),
    ("dms", "dmc"),
}
"""Steps on different layers that stand for the others, which `-m slow` runs."""
YES = [
    pytest.param(a, b, apart, marks=pytest.mark.slow if apart and (a, b) not in OFTEN else ())
    for a, b in compositions.pairs()
    for apart in (False, True)
    if compositions.verdict(a, b, apart) == "yes"
]


def test_the_documentation_says_what_plans_say():
    text = compositions.README.read_text()
    assert compositions.BEGIN in text
    said = text.partition(compositions.BEGIN)[2].partition(compositions.END)[0].strip()
    assert said == compositions.table(), "run: python tests/compositions.py"


@pytest.mark.filterwarnings("ignore:.*calibration tokens to fit")
@pytest.mark.parametrize(("first", "second", "apart"), YES)
@torch.no_grad()
def test_both_steps_are_carried_out_and_the_result_runs(first, second, apart, tmp_path):
    recipe = compositions.recipe(first, second, apart)
    plan = surgery.plan(compositions.parent(), recipe)
    model = surgery.convert(compositions.parent(), recipe, calibration=TEXT).eval()
    layers = [layer.to_dict() for layer in plan.after]
    if not plan.native:
        assert [plan.to_dict() for plan in model.plans] == layers
    cache = DynamicCache(config=model.config)
    whole = model(PROMPT, past_key_values=cache, use_cache=True).logits
    assert tensor_bytes(cache) == len(PROMPT) * sum(layer.bytes_at(PROMPT.shape[1]) for layer in plan.after)
    assert torch.isfinite(whole).all()
    surgery.save(model, tmp_path / "child")
    loaded = surgery.load(tmp_path / "child").eval()
    cache, parts = DynamicCache(config=loaded.config), []
    for end in range(1, PROMPT.shape[1] + 1):
        parts.append(loaded(PROMPT[:, end - 1 : end], past_key_values=cache, use_cache=True).logits)
    if any(layer.store.kind != "dense" for layer in plan.after):  # tokens of one call see each other as they are
        assert 0 < (torch.cat(parts, 1) - whole).norm() < 0.03 * whole.norm()
        return
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
