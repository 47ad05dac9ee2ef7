"""A folder for the Hugging Face Hub: weights, the code that runs them, and their card.

`Surgery<Parent>` travels with its code (`remote_code.py`), and runs where only torch and transformers are installed. A
model of the parent's own class needs none. A source on disk is copied shard by shard: no model is held in memory, and
the parity check of a large one reads its layers from disk as they run.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

from .. import runtime
from ..anatomy.positions import max_positions
from ..checkpoints.files import Checkpoint, check_model, read_json
from ..checkpoints.storage import check_whole
from ..checkpoints.writing import copy_weights
from ..console import human_bytes
from ..errors import CheckpointError, PlanError
from ..planning.targets import NATIVE, REMOTE, Refusal, Subject, Way, refused_as_native
from ..runtime.budgets import BUDGETS
from ..runtime.layout import Codec
from ..runtime.modeling import load_converted
from ..runtime.rankers import RANKERS
from ..runtime.scorers import SCORERS
from .parity import Ask, Parity, answers_alone, answers_of, compare
from .remote_code import MIN_TRANSFORMERS, RemoteCode, digests
from .target import Source, Written, in_transformers

LARGE = 2_000_000_000
"""Bytes of weights above which the parity check takes the layers from disk one by one, and asks for fewer tokens."""
_FEW_TOKENS = 4
SAME = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest logit difference over the largest logit. The arithmetic is the same: equal to the last bit is the rule."""


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A folder that transformers runs alone, with the code for it inside."""

    engine: ClassVar[str] = "transformers"

    link: bool = field(
        default=False,
        metadata={
            "help": "hard links in the place of copies of the weights: no disk, but writing into one folder changes "
            "the other."
        },
    )

    def judge(self, subject: Subject) -> Way | Refusal:
        """Say whether transformers runs the result: the parent's class as it is, any other by the code that is written.

        That code is the runtime, which runs every plan that this version makes.
        """
        if subject.native:
            return refused_as_native(subject) or Way(by=NATIVE)
        for plan in subject.plans:
            scorers: dict[str, Any] = {**SCORERS, **RANKERS}
            budget = BUDGETS.get(getattr(plan.retain, "budget", ""))
            scorer = scorers.get(getattr(plan.retain, "scorer", ""))
            forms = plan.store.forms() if isinstance(plan.store, Codec) else ()
            inner = [getattr(form, "inner", None) for form in forms]
            for value in (plan.project, plan.retain, plan.store, scorer, budget, *forms, *inner):
                if value is not None and not type(value).__module__.startswith(runtime.__name__):
                    return Refusal(
                        reason=f"layer {plan.layer} has a {type(value).__name__}, whose code is not part of "
                        "surgery and does not travel",
                        way_out="Load it with surgery, where that is registered.",
                    )
        try:
            RemoteCode.of({"parent": {"architecture": subject.architecture, "model_type": subject.config.model_type}})
        except PlanError as error:
            return Refusal(reason=str(error).rstrip("."), way_out="Load it with surgery.")
        return Way(by=REMOTE)

    def check(self, source: Source) -> None:
        """Refuse what is no conversion, and a folder that is damaged."""
        if not source.provenance and not source.is_own_class:
            raise PlanError(
                f"{source.architecture} was not converted by surgery; there is nothing to export. Upload it as it is."
            )
        if source.folder is not None:
            check_whole(Checkpoint(source.folder))
        else:
            check_model(source.model)

    def write(self, source: Source, folder: Path) -> Written:
        """Write weights, config, code and companions."""
        if source.folder is None:
            source.model.save_pretrained(folder)
        else:
            copy_weights(source.folder, folder, link=self.link)
            shutil.copyfile(source.folder / "config.json", folder / "config.json")
        source.write_companions(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        config = read_json(folder / "config.json")
        named = config.pop("auto_map", {})  # code of the parent's tokenizer or processor
        architecture = source.architecture
        if source.is_own_class:
            code = RemoteCode.of(source.config.surgery)
            code.write(folder)
            architecture = code.architecture
            named |= code.auto_map
            config["architectures"] = [architecture]
            config["surgery"]["min_transformers"] = MIN_TRANSFORMERS
        config |= {"auto_map": named} if named else {}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        found = digests(folder)
        says = f"{len(found)} code files, digests in export.json" if found else "no code: stock class"
        needs = (
            f"torch and transformers {MIN_TRANSFORMERS} or later"
            if source.is_own_class
            else "any version with its class"
        )
        own = 'import surgery\n\nmodel = surgery.load("FOLDER_OR_ID")'
        return Written(
            architecture=architecture,
            facts={"weight_bytes": size, "code": found, "transformers": transformers.__version__},
            lines=(f"{human_bytes(size)} of weights, {says}",),
            loading=(
                in_transformers(source, needs, trust=source.is_own_class),
                ("surgery (`pip install kv-surgery`)", own),
            ),
        )

    def parity(self, source: Source, folder: Path) -> Parity:
        """Ask the export in a process that cannot import surgery; the logits must be the same."""
        large = source.folder is not None and _weight_bytes(source.folder) > LARGE
        config = source.config.get_text_config()
        ask = Ask.of_vocabulary(
            config.vocab_size, max_positions(config), **({"new_tokens": _FEW_TOKENS} if large else {})
        )
        kwargs: dict[str, Any] = {"device_map": {"": "disk"}} if large else {}
        if large and source.is_own_class:
            model = load_converted(str(source.folder), dtype="auto", **kwargs)
        elif large:
            model = source.kind.from_pretrained(str(source.folder), dtype="auto", **kwargs)
        else:
            model = source.model
        attention = model.config._attn_implementation
        if attention != "surgery" and source.folder is None:
            kwargs["attn_implementation"] = attention
        if not large and model.device.type != "cpu":  # another device rounds otherwise
            kwargs["device_map"] = {"": str(model.device)}
        ask, want = _with_static(ask, model)
        dtype = model.dtype
        del model
        got, said = answers_alone(folder, ask, auto=source.auto, trust_remote_code=source.is_own_class, **kwargs)
        if said["class"] != source.architecture:
            raise CheckpointError(f"the export loads as {said['class']}, not as {source.architecture}.")
        return compare(want, got, f"transformers {said['transformers']} without surgery").require(SAME[dtype])


def _with_static(ask: Ask, model: Any) -> tuple[Ask, dict[str, torch.Tensor]]:
    """Ask through a static cache too, where the source generates with one."""
    both = Ask(prompts_BT=ask.prompts_BT, start=ask.start, new_tokens=ask.new_tokens, caches=("dynamic", "static"))
    try:
        return both, answers_of(model, both)
    except (ValueError, RuntimeError):  # what transformers raises where a class has no static cache, or a broken one
        return ask, answers_of(model, ask)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
