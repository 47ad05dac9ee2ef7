"""README.md of an export: what was done to which parent, what it costs and saves, how to load it, its limits.

Generated between two marks. What people write outside of them, and the metadata that they set, stays when the export is
made again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..console import count, spans
from ..errors import CheckpointError
from ..recipe import Recipe
from ..report.data import Report
from ..report.page import check_comparable, markdown_page, told_apart
from ..runtime.layout import LayerPlan
from .parity import Parity
from .target import Source, Written, is_hub_id

BEGIN = "<!-- surgery: generated from here; text outside of the two marks stays when the export is made again -->"
END = "<!-- surgery: generated up to here -->"
CARD = "README.md"
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Metadata of the parent's card that hold for the export as well."""
_TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What a card says beyond what the model itself knows."""

    results: Sequence[Report] = ()
    """Evaluations of the model, beside its parent on the same text."""
    base_model: str | None = None
    """Hub id of the parent, where its path does not say it."""
    license: str | None = None
    """Where the parent's card does not say it."""

    @classmethod
    def of(cls, results: Any = (), base_model: str | None = None, license: str | None = None) -> CardOptions:
        """Take one report or several, as `Report` or as files that `surgery eval --json` wrote.

        Raises:
            CheckpointError: a file is no report, the reports do not compare, or `base_model` is no Hub id.
        """
        if base_model is not None and not is_hub_id(base_model):
            raise CheckpointError(f"base model {base_model!r} is no Hub id. Give owner/name.")
        several = [results] if isinstance(results, (Report, str, Path)) else list(results or ())
        reports = [r if isinstance(r, Report) else Report.load(r) for r in several]
        if reports:
            check_comparable(reports)
        return cls(results=tuple(told_apart(reports)), base_model=base_model, license=license)


def write_card(
    folder: Path, name: str, source: Source, written: Written, parity: Parity, options: CardOptions, old: str = ""
) -> None:
    """Write README.md and `plots/` into an export.

    Args:
        folder: of the export.
        name: the heading.
        old: an earlier card, whose hand-written parts are kept.
    """
    pictures: dict[str, bytes] = {}
    loading = ["## How to load", *_loading(written, name)]
    body = [BEGIN, f"# {name}", _lead(source, written, options.results), *loading]
    body += ["## What was done", *_done(source, written)]
    if options.results:
        page, pictures = markdown_page(options.results)
        body += [page, _all_numbers(options.results)]
    else:
        body += [
            "## Quality",
            "Not measured for this export. `surgery eval` measures loss, KL and recall through the cache beside the "
            "parent, and `surgery export --results result.json` puts them here.",
        ]
    body += [
        "## Checked",
        parity.line() + ".",
        "## Limits",
        _limits(source, bool(written.facts.get("code"))),
    ]
    body.append(END)
    for file, png in pictures.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(png)
    metadata, before, after = _taken_apart(old)
    fields = {**_metadata(source, options, bool(written.facts.get("code"))), **metadata}
    fields["tags"] = sorted({*_tags(written), *_listed(metadata.get("tags"))})
    front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    text = f"---\n{front}---\n\n{before}" + "\n\n".join(body) + f"\n{after}"
    (folder / CARD).write_text(text, encoding="utf-8")


def _lead(source: Source, written: Written, results: Sequence[Report]) -> str:
    plan = source.provenance.get("plan") or {}
    parent = _parent_link(source)
    saved = ""
    if plan.get("parent_bytes_per_token"):
        before, after = plan["parent_bytes_per_token"], written.bytes_per_token or source.bytes_per_token
        saved = (
            f" Its KV cache takes **{after:,.0f} bytes per token** in the place of {before:,.0f} "
            f"({before / after:.2f}x)."
        )
    return (
        f"{parent} with its attention rewritten by [surgery](https://pypi.org/project/kv-surgery) so that the KV cache "
        f"gets small.{saved}{_measured(results)}"
    )


def _measured(results: Sequence[Report]) -> str:
    """One sentence on one evaluation beside the parent."""
    report = results[0] if len(results) == 1 else None
    if report is None or report.baseline is None or report.gap is None or not math.isfinite(report.gap):
        return ""
    change = report.gap / max(report.baseline.nats_per_token, 1e-9)
    return (
        f" On the text of the evaluation below its loss changes by **{change:+.1%}**, at a KL of {report.kl:.4f} nats "
        "per token to the parent."
    )


def _parent_link(source: Source) -> str:
    if source.parent_id is None:
        return f"`{source.parent or source.architecture.removeprefix('Surgery')}`"
    revision = source.provenance.get("parent_revision") or source.parent.partition("@")[2]
    at = f" at revision `{revision}`" if revision else ""
    return f"[{source.parent_id}](https://huggingface.co/{source.parent_id}){at}"


def _done(source: Source, written: Written) -> list[str]:
    origin = source.provenance
    plan = origin.get("plan") or {}
    layers = [LayerPlan.from_dict(layer) for layer in plan.get("layers") or [e["plan"] for e in source.layers]]
    rows: dict[tuple[str, str], list[int]] = {}
    for layer in layers:
        reads = f", {'V ' if layer.owner == layer.layer else ''}of layer {layer.lenders[0]}" if layer.lenders else ""
        keeps = f", {layer.retain.label()}" if layer.retain else ""
        cells = layer.project.label() + reads + keeps, f"{layer.bytes_per_token:,.0f}"
        rows.setdefault(cells, []).append(layer.layer)
    table = ["| layers | KV heads or latent | KV bytes/token |", "|---|---|---:|"]
    table += [f"| {spans(numbers)} | {form} | {size} |" for (form, size), numbers in rows.items()]
    parts = ["\n".join(table)]
    if plan:
        parts.append(f"Parameters: {count(plan['parent_parameters'])} → {count(plan['parameters'])}.")
    if "recipe" in origin:
        parts.append(f"Recipe (`recipe.yaml`):\n\n```yaml\n{Recipe.load(origin['recipe']).to_yaml().rstrip()}\n```")
    text = origin.get("calibration")
    said = []
    if "recipe" in origin:
        fitted = "none"
        if text:
            start = "".join(text.get("start") or ())
            each = f", each starting with `{start}`" if start else ""
            fitted = f"{text['tokens']:,} tokens in {text['windows']:,} windows{each}, digest `{text['digest']}`"
        said.append(f"Calibration text: {fitted}. Seed {origin.get('seed')}.")
    for run in origin.get("uptrained") or ():
        said.append(f"Trained afterwards on {run['tokens']:,} tokens of `{run['data']['source']}`.")
    if origin.get("versions"):
        said.append("Made with " + ", ".join(f"{k} {v}" for k, v in origin["versions"].items()) + ".")
    parts += [" ".join(said)] * bool(said)
    if written.lines:
        parts.append(f"Exported as `{written.architecture}`: {'; '.join(written.lines)}.")
    return parts


def _all_numbers(reports: Sequence[Report]) -> str:
    """Everything that was measured, for machines and for those who ask."""
    data = [report.to_dict() for report in reports]
    text = json.dumps(data if len(data) > 1 else data[0], indent=1)
    summary = "Every number of the evaluation (JSON)"
    return f"<details>\n<summary>{summary}</summary>\n\n```json\n{text}\n```\n\n</details>"


def _loading(written: Written, name: str) -> list[str]:
    parts = []
    for engine, code in written.loading:
        language = "bash" if code.startswith(("vllm ", "llama", "surgery ", "pip ")) else "python"
        parts.append(f"{engine}:\n\n```{language}\n{code.replace('FOLDER_OR_ID', './' + name)}\n```")
    return parts


def _limits(source: Source, has_code: bool) -> str:
    lines = ["What limits the parent limits this model; its licence holds here too."]
    if not source.provenance.get("uptrained"):
        lines.append("It was not trained after the conversion; `surgery train` brings quality back.")
    if has_code:
        lines.append(
            "It runs code of its own in transformers. That code is listed in `export.json` with sha256 digests; "
            "`surgery verify` compares them. Read it before you trust it."
        )
        lines.append(
            "Engines have models of their own: `surgery export --to native`, `vllm` or `gguf` writes what they run, or "
            "says why they cannot."
        )
        lines.append(
            'Plain torch decodes it. The kernels need kv-surgery installed and `attn_implementation="surgery"`.'
        )
    return "\n".join(f"- {line}" for line in lines)


def _metadata(source: Source, options: CardOptions, has_code: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": _TASKS.get(source.auto, "text-generation"),
    }
    fields |= {k: v for k, v in _parents_metadata(source, options.base_model).items() if k in INHERITED}
    if options.license:
        for name in ("license_name", "license_link"):
            fields.pop(name, None)
        fields["license"] = options.license
    parent = options.base_model or source.parent_id
    if parent:
        fields["base_model"] = parent
    return fields


def _tags(written: Written) -> list[str]:
    return ["kv-cache", "surgery", *(["custom_code"] if written.facts.get("code") else [])]


def _parents_metadata(source: Source, base_model: str | None) -> dict[str, Any]:
    """Front matter of the parent's card: beside its weights, or on the Hub; empty where neither is to be had."""
    parent = source.provenance.get("parent") or ""
    if parent and (Path(parent) / CARD).is_file():
        return _taken_apart((Path(parent) / CARD).read_text(encoding="utf-8"))[0]
    repo = base_model or source.parent_id
    if not repo:
        return {}
    try:
        file = hf_hub_download(repo, CARD, etag_timeout=5)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return {}
    return _taken_apart(Path(file).read_text(encoding="utf-8"))[0]


def _taken_apart(text: str) -> tuple[dict[str, Any], str, str]:
    """Front matter, and what stands before and after the generated part of a card; all of it where there is none.

    Raises:
        CheckpointError: the front matter is no YAML.
    """
    fields: dict[str, Any] = {}
    if text.startswith("---\n") and "\n---" in text[3:]:
        front, _, text = text[4:].partition("\n---")
        try:
            fields = yaml.safe_load(front) or {}
        except yaml.YAMLError as error:
            raise CheckpointError(f"{CARD}: its front matter is no YAML ({error}). Mend or remove it.") from None
        text = text.partition("\n")[2].lstrip("\n")
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{CARD}: its front matter is no mapping. Mend or remove it.")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return dict(fields), "", f"\n{text}" if text else ""
    return dict(fields), before, after.removeprefix("\n")


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
