"""What a conversion cost and saved: quality, recall, memory and speed of a model beside its parent's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy.positions import max_positions
from ..calibration.outputs import check_speaks
from ..calibration.text import Windows, read_texts, read_windows, tokenizer_of
from ..checkpoints.provenance import versions
from ..errors import CheckpointError, RecipeError
from ..generate import generate, prompt_ids_1T
from ..report.data import GateRatios, Measured, Report
from .gates import gated, read_gates
from .lm_eval import CLOZE, check_known, check_prompts, run_tasks
from .memory import bytes_at, cache_size, max_batch, parse_bytes
from .recall import TASKS, answer_questions, check_tasks, compose_questions
from .scoring import Path, prompt_of, score_windows
from .speed import measure_speed
from .statistics import difference, quality

PATHS: dict[str, tuple[Path, ...]] = {"prefill": ("prefill",), "decode": ("decode",), "both": ("prefill", "decode")}
QUESTIONS = 8
"""Recall questions per task, length and depth."""
CONTINUED = 40
"""Tokens by which prompts are continued."""


def evaluate(
    model: PreTrainedModel,
    *,
    text: Any,
    baseline: PreTrainedModel | None = None,
    tokenizer: Any = None,
    path: Literal["prefill", "decode", "both"] = "both",
    length: int | None = None,
    samples: int | None = None,
    at_once: int | None = None,
    recall_tasks: Sequence[str] = (),
    recall_lengths: Sequence[int] | None = None,
    questions: int = QUESTIONS,
    speed: bool = False,
    lm_eval_tasks: Sequence[str] = (),
    memory: int | str = "80GiB",
    context: int | None = None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    names: tuple[str, str] | None = None,
) -> Report:
    """Measure `model`, and `baseline` beside it, on held-out text.

    Args:
        text: what `load_windows` takes: a file, strings, or token ids.
        tokenizer: defaults to the one beside the model; not needed for token ids without recall.
        path: `prefill` scores in one forward pass, which never reads the cache; `decode` token by token through it.
        length: tokens per window; the model's positions, at most 512, by default. Token ids are windows as they are
            where it is not given.
        samples: at most so many windows.
        at_once: tokens of each window that come at once before the others are decoded. Default: 1, and half of the
            window where slots leave behind prompts alone (`evict` by snapkv). Losses compare where it is the same.
        recall_tasks: of `surgery.measure.recall.TASKS`; `("all",)` for each of them.
        recall_lengths: tokens of context of the questions; default: a quarter, half and all of the model's.
        questions: per task, length and depth.
        speed: also time prefill and decoding, both models in turn.
        lm_eval_tasks: names that lm-eval knows, run on the models in memory; needs the extra `eval`. `surgery_cloze`
            asks about `text`.
        memory, context: for the largest batch of sequences of `context` tokens (default: the model's) in `memory`.
        prompts: texts that each model continues by `CONTINUED` tokens, for `Measured.continued`.
        seed: of questions and bootstrap.
        names: of model and baseline, for the tables.

    Returns:
        Numbers that are equal for equal seeds, but for `speed`. Where a model says NaN the numbers are NaN, with the
        place in `problems`.

    Raises:
        CheckpointError: text or tokenizer unusable, or the baseline reads other tokens. RecipeError: unknown path,
        task or size. UnsupportedModel: no cache to decode through, or a model that predicts no tokens.

    Examples:
        >>> import surgery
        >>> from surgery.bundled import SMALL
        >>> parent = surgery.load(SMALL)
        >>> child = surgery.convert(parent, "gqa-2x")
        >>> text = ["Once upon a time there was a girl, and her name was Lily. She had a dog. " * 20]
        >>> report = surgery.evaluate(child, baseline=parent, text=text, length=64, samples=2)
        >>> report.baseline.cache.bytes / report.model.cache.bytes
        2.0
    """
    if path not in PATHS:
        raise RecipeError(f"path: {path!r} is not known. Use one of {', '.join(PATHS)}.")
    tasks = tuple(TASKS) if "all" in recall_tasks else tuple(recall_tasks)
    check_tasks(tasks)
    if not tasks and (questions != QUESTIONS or recall_lengths is not None):
        name = "questions" if questions != QUESTIONS else "recall_lengths"
        raise RecipeError(
            f"{name}: is of recall questions, and no task is named. Name one, such as all, or leave it out."
        )
    limit = parse_bytes(memory)
    if lm_eval_tasks:
        check_known(lm_eval_tasks)
    for m in (model, baseline):
        if m is not None:
            check_speaks(m, "evaluate")
    config = model.config
    if tokenizer is None and (tasks or lm_eval_tasks or prompts or not isinstance(text, (Tensor, Windows))):
        tokenizer = tokenizer_of(config)
    if (tasks or lm_eval_tasks or prompts) and tokenizer is None:
        raise CheckpointError(
            "tasks and prompts: need a tokenizer. None lies beside the model: put its files there (tokenizer.json, "
            "tokenizer_config.json), or pass tokenizer=... in Python."
        )
    for prompt in prompts:
        prompt_ids_1T(config, prompt, tokenizer)  # refused before the work
    if lm_eval_tasks:
        check_prompts(tokenizer)
    if baseline is not None:
        _check_same_tokens(config, baseline.config)
    windows = read_windows(config, text, tokenizer, length=length, samples=samples, where="evaluation text")
    _check_at_once(at_once, path, windows.ids_BT.shape[1])
    is_text = CLOZE in lm_eval_tasks and not isinstance(text, (Tensor, Windows))
    texts = read_texts(text) if is_text else None
    asked = None
    if tasks:
        asked = compose_questions(
            config, tokenizer, tasks=tasks, lengths=recall_lengths, questions=questions, seed=seed
        )
    models = [model] if baseline is None else [model, baseline]
    modes = [(part, part.training) for m in models for part in m.modules()]
    for m in models:
        m.eval()  # dropout would be noise
    sums = {p: score_windows(model, baseline, windows, p, at_once) for p in PATHS[path]}
    rates = measure_speed(models) if speed else [None, None]
    names = names or (("model", "") if baseline is None else ("converted", "baseline"))
    first = windows.ids_BT[:1, : int(windows.mask_BT[0].sum())]

    def measured(i: int, m: PreTrainedModel) -> Measured:
        size = cache_size(m, first)
        held = sum(p.numel() * p.element_size() for p in m.parameters())
        tokens = context or max_positions(m.config) or windows.ids_BT.shape[1]
        return Measured(
            name=names[i],
            parameters=sum(p.numel() for p in m.parameters()),
            quality={p: quality(s, i, seed) for p, s in sums.items()},
            cache=size,
            max_batch=max_batch(limit, held, bytes_at(m, size, tokens)),
            context=tokens,
            recall=() if asked is None else answer_questions(m, asked),
            speed=rates[i],
            gates=_gates(m, windows),
            continued={
                p: generate(m, p, tokens=CONTINUED, tokenizer=tokenizer).removeprefix(p) for p in dict.fromkeys(prompts)
            },
        )

    report = Report(
        model=measured(0, model),
        baseline=None if baseline is None else measured(1, baseline),
        differences={} if baseline is None else {p: difference(s, seed) for p, s in sums.items()},
        tokens=int(windows.mask_BT[:, 1:].sum()),
        windows=len(windows),
        length=windows.ids_BT.shape[1],
        text_digest=windows.digest,
        memory_bytes=limit,
        seed=seed,
        problems=tuple(s.problem for s in sums.values() if s.problem),
        versions=versions(),
        device=str(model.device),
        window_start=windows.start,
        prompt=at_once or max(prompt_of(m, windows.ids_BT.shape[1]) for m in models),
        tasks={
            n: run_tasks(m, tokenizer, lm_eval_tasks, seed=seed, texts=texts)
            for n, m in zip(names, models, strict=False)
            if lm_eval_tasks
        },
    )
    for part, was in modes:
        part.training = was
    return report


def _gates(model: PreTrainedModel, windows: Windows) -> GateRatios | None:
    """What the gates keep, where there are any."""
    if not gated(model):
        return None
    found = read_gates(model, windows)
    return GateRatios(total=found.total, layers=tuple(found.ratio), by_head=tuple(found.ratio.values()))


def _check_at_once(at_once: int | None, path: str, length: int) -> None:
    if at_once is not None and path == "prefill":
        raise RecipeError("at_once: is of decoding, and path is prefill. Use decode or both, or leave it out.")
    if at_once is not None and not 1 <= at_once < length:
        raise RecipeError(f"at_once: {at_once} of windows of {length} tokens leaves none to decode. Give fewer.")


def _check_same_tokens(config: Any, other: Any) -> None:
    """Loss per token compares only where both models read the same tokens."""
    size, theirs_size = (c.get_text_config(decoder=True).vocab_size for c in (config, other))
    if size != theirs_size:
        raise CheckpointError(f"baseline knows {theirs_size} tokens, the model {size}: not parent and child.")
    try:
        mine, theirs = tokenizer_of(config), tokenizer_of(other)
    except CheckpointError:
        return  # what cannot be loaded reads nothing; where text is to be read, that is an error of its own
    if mine is not None and theirs is not None and (a := mine.get_vocab()) != (b := theirs.get_vocab()):
        token = min(set(a.items()) ^ set(b.items()))[0]
        raise CheckpointError(
            f"baseline reads text with another tokenizer: {token!r} is token {b.get(token)} there, {a.get(token)} "
            "here. Compare a model with its own parent."
        )
