"""Which engine runs which cache: each variant of one small Llama is exported to each engine and answered there.

    SURGERY_VLLM_PYTHON=.venv-vllm/bin/python SURGERY_LLAMA_PYTHON=.venv-llama/bin/python \
        SURGERY_MLX_PYTHON=.venv-mlx/bin/python python benchmarks/engines.py
    python benchmarks/engines.py --engine mlx-lm   # one engine; what was measured of the others stays

Weights are random (four layers, eight heads of 64), float32, so that tokens must be the same. The table of
`docs/how-to/serve.md` is what this writes: how the engine runs the variant, and the KV bytes per token by its own
account. There is no export for mlx-lm: it loads what other exports write of stock classes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import surgery
from surgery.errors import PlanError
from surgery.export import ExportReport, export
from surgery.export.parity import TOLERANCE, Ask, answers_of
from surgery.export.vllm import case_of, compare_scores
from surgery.measure.memory import cache_bytes
from surgery.planning.targets import NONE, Subject, Way, engines, ways

SEED = 0
PAGE = "docs/how-to/serve.md"
MLX = "mlx-lm"
MLX_PYTHON = "SURGERY_MLX_PYTHON"
"""Environment variable: interpreter of the environment that has mlx-lm."""
EXPORTS = {"transformers": "hub", "vLLM": "vllm", "llama.cpp": "gguf"}
BEGIN, END = "<!-- engines: written by benchmarks/engines.py --page -->", "<!-- end of engines -->"
BARE = {"refit_queries": False, "refit_output": False}
SHARE = {"rewriter": "share", "layout": "cla2", "gain_fit": False, **BARE}
MLA = {"rewriter": "mla", "rank": 448, "rope_dims": 64, "selector": "top", **BARE}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "GQA (`gqa-2x`)": [{"rewriter": "gqa", "kv_heads": 4, "init": "mean"}],
    "GQA, heads by layer": [{"rewriter": "gqa", "kv_heads": 4, "init": "mean", "layers": "1-2"}],
    "caches shared (`cla2`)": [{**SHARE, "init": "replace"}],
    "both (`cla2-gqa-2x`)": [
        {"rewriter": "gqa", "kv_heads": 4, "init": "mean"}, {**SHARE, "init": "replace"}
    ],
    "V shared (`svformer`)": [{**SHARE, "init": "replace", "layout": "svformer"}],
    "latents (`mla`)": [MLA],
    "latents, keys turned at read (`lowrank`)": [{"rewriter": "lowrank", "keep": 0.5, **BARE}],
    "latents shared (`cla2-latent`)": [{**SHARE, "init": "latent"}],
    "merged tokens (`dmc`, gates not trained)": [{"rewriter": "dmc"}],
    "codes (`fp8`)": [{"rewriter": "quantise", "codec": "fp8", "sinks": 0, "recent": 0}],
    "evicted tokens (`dms`, gates not trained)": [{"rewriter": "dms", "window": 16}],
}  # fmt: skip


def parent() -> PreTrainedModel:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=512, initializer_range=0.06, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def text() -> torch.Tensor:
    return torch.randint(3, 512, (64, 128), generator=torch.Generator().manual_seed(SEED))


def words(plan: surgery.Plan) -> dict[str, str]:
    """Engine -> by what it runs what `plan` makes, in the words of plans."""
    return {engine: way.by if isinstance(way, Way) else NONE for engine, way in ways(Subject.of_plan(plan)).items()}


def run(variant: str, model: PreTrainedModel, only: str | None, row: dict[str, Any]) -> dict[str, Any]:
    """One row: engine -> what happened there; of engines other than `only` what `row` says."""
    steps = VARIANTS[variant]
    plan = surgery.plan(model, {"steps": steps})
    said = words(plan)
    asks = any(step["rewriter"] in ("mla", "lowrank") or step.get("init") == "latent" for step in steps)
    child = surgery.convert(model, {"steps": steps}, calibration=text() if asks else None)
    row = {"engines": dict(row.get("engines", {}))}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        surgery.save(child, place / "child")
        for engine in (*EXPORTS, MLX):
            if only not in (None, engine):
                continue
            if engine == MLX:
                found = _in_mlx(child, place, said["llama.cpp"])
            else:
                found = _export(child, place, engine, EXPORTS[engine], said[engine])
            row["engines"][engine] = found
            print(variant, engine, found, flush=True)  # noqa: T201
    return row


def _export(child: PreTrainedModel, place: Path, engine: str, target: str, way: str) -> dict[str, Any]:
    source: Any = place / "child"
    if way.startswith("native,"):
        export(source, place / "native", to="native", overwrite=True, **_native_options(way))
        source = place / "native"
    try:
        report = export(source, place / engine, to=target)
    except PlanError as error:
        if way != NONE:
            raise
        return {"reason": str(error)}
    if way == NONE:
        raise SystemExit(f"{engine} ran what was to be refused")
    found = report.parity.to_dict()
    found["bytes_per_token"] = _bytes(report) if target != "hub" else _own_bytes(child)
    return found


def _in_mlx(child: PreTrainedModel, place: Path, way: str) -> dict[str, Any]:
    """What mlx-lm answers to the stock class that llama.cpp's file is made from, where there is one."""
    python = os.environ.get(MLX_PYTHON)
    if way == NONE:
        return {"reason": "no stock class says it"}
    if python is None:
        return {"reason": f"not installed: {MLX_PYTHON} names no interpreter that has mlx-lm"}
    folder = place / "child"
    if way.startswith("native,"):
        folder = place / "native"
        export(place / "child", folder, to="native", overwrite=True, **_native_options(way))
    source = surgery.load(folder)
    ask = Ask.of_vocabulary(source.config.vocab_size, source.config.max_position_embeddings)
    request, result = place / "request.json", place / "result.json"
    request.write_text(json.dumps(case_of(folder, ask, source)))
    script = Path(__file__).with_name("mlx_answers.py")
    subprocess.run([os.path.abspath(python), "-P", str(script), str(request), str(result)], check=True, cwd=place)
    got = json.loads(result.read_text())
    if "error" in got:
        raise SystemExit(f"mlx-lm: {got['error']}")
    engine = f"mlx-lm {got['version']}"
    parity = compare_scores(answers_of(source, ask), {**got, "cache": got}, ask, engine)
    parity.require(TOLERANCE[source.dtype], same_tokens=True)
    by = way.replace("its own codes", "dense")  # codes are an option of its generate
    return {**parity.to_dict(), "by": by, "bytes_per_token": got["bytes_per_token"]}


def _native_options(way: str) -> dict[str, Any]:
    # Without a bias, the norm on the latent is an approximation: that of the export, which both sides then have.
    return {"norm": "calibrated", "text": text(), "pad": True} if "DeepSeek" in way else {}


def _bytes(report: ExportReport) -> float:
    found = re.search(r"([\d.]+) KV bytes per token", report.parity.engine)
    if found is None:
        raise SystemExit(f"{report.parity.engine}: says no bytes")
    return float(found[1])


def _own_bytes(child: PreTrainedModel) -> float:
    """transformers allocates what the runtime's cache holds."""
    ids = torch.randint(3, 512, (1, 128), generator=torch.Generator().manual_seed(SEED))
    return cache_bytes(child, ids) / ids.shape[1]


def table(rows: dict[str, Any]) -> str:
    """The table of the page: what plans say of each variant, beside the bytes that the engines were measured with."""
    model, names = parent(), [*engines(), MLX]
    lines = [f"| What is cached | {' | '.join(names)} | planned |", "|---" * (len(names) + 2) + "|"]
    for variant, steps in VARIANTS.items():
        plan = surgery.plan(model, {"steps": steps})
        measured, cells = rows.get(variant, {}).get("engines", {}), []
        for engine, word in {**words(plan), MLX: measured.get(MLX, {}).get("by", NONE)}.items():
            found = measured.get(engine, {})
            size = f", {found['bytes_per_token'] / 1024:.3g} KiB" if "bytes_per_token" in found else ""
            cells.append(f"{word}{size}")
        lines.append(f"| {variant} | {' | '.join(cells)} | {plan.bytes_per_token / 1024:.3g} KiB |")
    return "\n".join(lines)


def write_page(rows: dict[str, Any]) -> None:
    """Write the table between its marks."""
    path = common.ROOT / PAGE
    before, rest = path.read_text().split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="part of a variant's name; others stay as they were")
    parser.add_argument("--engine", choices=[*EXPORTS, MLX], help="ask this engine alone; others stay as they were")
    parser.add_argument("--page", action="store_true", help="only write the table of the page, from the last results")
    arguments = parser.parse_args()
    only = arguments.only
    path = common.ROOT / "benchmarks" / "results" / "engines.json"
    keep = only or arguments.engine or arguments.page
    old = json.loads(path.read_text()) if keep and path.is_file() else {}
    rows = old.get("rows", {})
    if arguments.page:
        return write_page(rows)
    model = parent()
    for variant in VARIANTS:
        if only is None or only in variant:
            rows[variant] = run(variant, model, arguments.engine, rows.get(variant, {}))
            here = {"environment": common.environment(SEED)}
            if arguments.engine:  # measured in another run than the rest
                here = {**old, "engine_environments": {**old.get("engine_environments", {}), arguments.engine: here}}
            data = {**here, "parent_bytes_per_token": 16384}
            common.write("engines", {**data, "rows": {name: rows[name] for name in VARIANTS if name in rows}})
    write_page({name: rows[name] for name in VARIANTS if name in rows})


if __name__ == "__main__":
    main()
