"""Write converted models in forms that other software loads without this library."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..checkpoints.writing import check_output, new_folder
from ..console import stage
from ..errors import PlanError
from ..planning.targets import TARGETS, Refusal, target_class
from .card import CARD, CardOptions, write_card
from .target import ExportReport, Source, Target, hide_paths

__all__ = ["TARGETS", "ExportReport", "Source", "Target", "check", "export", "target_for"]

REPORT_FILE = "export.json"


def export(
    model_or_path: PreTrainedModel | str | Path,
    out: str | Path,
    *,
    to: str,
    tokenizer: Any = None,
    overwrite: bool = False,
    results: Any = (),
    base_model: str | None = None,
    license: str | None = None,
    **options: Any,
) -> ExportReport:
    """Write a converted model for other software, load it there, and compare its answers with the source's.

    Args:
        model_or_path: a converted model, its folder or Hub id.
        out: folder to write; appears complete, or not at all.
        to: one of `TARGETS`.
        tokenizer: written beside a model that is in memory; a folder brings its own.
        overwrite: replace a folder that is not empty. Of its README.md, what people wrote themselves is kept.
        results: evaluations for the model card: one or several, `Report` or files of `surgery eval --json`.
        base_model: Hub id of the parent, where its path does not say it.
        license: the parent's, where its card does not say it.
        options: fields of the target's class.

    Returns:
        The report, also written as `export.json` beside the weights.

    Raises:
        PlanError: no such target or option, or the target cannot say the model; names the part.
        CheckpointError: `out` cannot be written, or the result answers otherwise than the source.

    Examples:
        >>> import surgery, tempfile
        >>> from surgery.bundled import SMALL
        >>> from transformers import AutoModelForCausalLM
        >>> child, out = surgery.convert(SMALL, "kv-int8"), tempfile.mkdtemp() + "/child"
        >>> report = surgery.export(child, out, to="hub")
        >>> type(AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)).__name__
        'SurgeryLlamaForCausalLM'
    """
    target = target_for(to, **options)
    card = CardOptions.of(results, base_model, license)
    out = Path(out).absolute()
    check_output(out, overwrite)
    source = Source(model_or_path, tokenizer)
    check(target, source)
    old_card = (out / CARD).read_text(encoding="utf-8") if (out / CARD).is_file() else ""
    with new_folder(out, overwrite) as folder:
        with stage(f"export to {to}: writing the files"):
            written = target.write(source, folder)
            hide_paths(folder)
        with stage(f"export to {to}: loading the result there, and comparing its answers with the source's"):
            parity = target.parity(source, folder)
        report = ExportReport(
            target=to, architecture=written.architecture, parity=parity, facts=written.facts, notes=written.lines
        )
        write_card(folder, out.name, source, written, report.parity, card, old_card)
        (folder / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def check(target: Target, source: Source) -> None:
    """Refuse what `target` cannot run, or not as it is: first by its judgement, which plans show, then by the weights.

    Raises:
        PlanError: names the part and the way out.
    """
    verdict = target.judge(source.subject)
    refused = verdict if isinstance(verdict, Refusal) else verdict.before
    if refused is not None:
        engine = getattr(target, "engine", "")
        raise PlanError(f"{engine}: {refused}" if engine else str(refused))
    target.check(source)


def target_for(name: str, **options: Any) -> Target:
    """The target called `name` with `options`.

    Raises:
        PlanError: there is none of that name, or it has no such option.
    """
    kind = target_class(name)
    known = [f.name for f in dataclasses.fields(kind)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        has = f"It has {', '.join(known)}." if known else "It has none."
        raise PlanError(f"export: target {name} has no option {unknown[0]!r}. {has}")
    target: Target = kind(**options)
    return target
