"""lm-eval's tasks, and our recall questions as lm-eval tasks, on a model in memory. Needs the extra `eval`.

Likelihood tasks of lm-eval score in one forward pass, which never reads the cache; `surgery_*` tasks generate, or
score token by token through the cache (`surgery_cloze`), so they do.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy.positions import max_positions
from ..calibration.text import check_known_ids, special_tokens
from ..errors import CheckpointError, RecipeError
from .cloze import CONTEXT, cloze_questions
from .recall import FILLER, TASKS, Reader, compose
from .scoring import log_probabilities, prompt_of, rows_of

OURS = {f"surgery_{name}": name for name in TASKS}
"""Name among lm-eval's tasks -> name in `measure.recall.TASKS`."""
CLOZE = "surgery_cloze"
NAMES = (*OURS, CLOZE)
"""All tasks of ours."""
DEPTHS = (0.0, 0.5, 1.0)
QUESTIONS = 8
"""Per length and depth."""


def check_known(tasks: Sequence[str]) -> None:
    """Refuse what `run_tasks` would refuse, before any work.

    Raises:
        RecipeError: lm-eval is not installed, or has no task, group or tag of that name.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("tasks: lm-eval is not installed. Run: pip install 'kv-surgery[eval]'")
    if not tasks:
        raise RecipeError(f"tasks: none named. Ours are {', '.join(NAMES)}; `lm-eval ls tasks` lists lm-eval's.")
    for name in tasks:
        if name not in NAMES and name not in _manager().all_tasks:
            near = difflib.get_close_matches(name, [*NAMES, *_manager().all_tasks], 3)
            raise RecipeError(
                f"tasks: lm-eval has no task {name!r}. "
                + (f"Nearest: {', '.join(near)}." if near else "`lm-eval ls tasks` lists them.")
            )


def check_prompts(tokenizer: Any) -> None:
    """Refuse a tokenizer that ends what is to be continued: lm-eval takes a prompt as it tokenises it.

    Raises:
        CheckpointError: names the tokens.
    """
    _, end = special_tokens(tokenizer, FILLER)
    if end:
        raise CheckpointError(
            f"tasks: the tokenizer puts {' '.join(tokenizer.convert_ids_to_tokens(end))} after every text, so every "
            "question would end before its answer. Load it with add_eos_token=False."
        )


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    texts: Sequence[str] | None = None,
) -> dict[str, float]:
    """Run tasks of lm-eval on `model`.

    Args:
        tasks: names of tasks, groups or tags of lm-eval, or of `NAMES`. lm-eval fetches its data from the Hub; ours
            are generated.
        limit: at most so many questions of each task.
        seed: of our questions and of few-shot examples. lm-eval seeds the generators of the process with it.
        texts: what `surgery_cloze` asks about; by default the topics of Python's `help()`.

    Returns:
        `task metric` -> score, with lm-eval's filter after it where it has one. Of a group, its own scores where
        lm-eval sums it up, else those of its tasks.

    Raises:
        RecipeError: as `check_known`; the package that a task wants is missing.
        CheckpointError: a task's data cannot be had, our questions do not fit into the model's context, a text has
        tokens that the model does not know, or the tokenizer ends every text.
    """
    check_known(tasks)
    check_prompts(tokenizer)
    from lm_eval import simple_evaluate

    training = model.training
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of what is meant here: a model in memory, a data set made by a function
    try:
        found: dict[str, dict[str, Any]] = {}
        for through_cache in (False, True):
            names = [name for name in dict.fromkeys(tasks) if (name == CLOZE) == through_cache]
            if not names:
                continue
            results = simple_evaluate(
                model=_language_model(model, tokenizer, rows_of(model) if through_cache else batch_size, through_cache),
                tasks=[item for name in names for item in _load(name, model, tokenizer, seed, texts)],
                # Without lm-eval's own: building the index of them reads thousands of files, and ours are loaded.
                task_manager=_manager(defaults=False),
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
            if results is None:  # lm-eval gives results to the first process only
                return {}
            found |= results["results"]
    finally:
        log.setLevel(level)
        model.train(training)
    return _flat(found, tasks)


def _language_model(model: PreTrainedModel, tokenizer: Any, batch_size: int, through_cache: bool = False) -> Any:
    """lm-eval's door to a model, which refuses token ids that the model does not know.

    Args:
        through_cache: likelihoods come from decoding token by token, not from one forward pass.
    """
    from lm_eval.models.huggingface import HFLM

    vocab_size = model.config.get_text_config(decoder=True).vocab_size

    class Checked(HFLM):
        def tok_encode(self, *args: Any, **kwargs: Any) -> list[int]:
            ids: list[int] = super().tok_encode(*args, **kwargs)
            check_known_ids(ids, vocab_size, "tasks", self.tokenizer)
            return ids

        def tok_batch_encode(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            ids, mask = super().tok_batch_encode(*args, **kwargs)
            check_known_ids(ids[mask.bool()], vocab_size, "tasks", self.tokenizer)
            return ids, mask

        def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not through_cache:
                logits: Tensor = super()._model_call(inps, *args, **kwargs)
                return logits
            with torch.inference_mode():
                # Rows are padded on the right, which no earlier token sees.
                found = log_probabilities(model, inps, "decode", prompt_of(model, inps.shape[1]))
                return torch.cat([logp for _, logp in found], 1).to(inps.device)

    # A copy: HFLM gives a tokenizer without padding token one. Its cache of logits scores requests that part one text
    # at different places from the wrong ones, and 16-bit models are summed in 16 bits unless told otherwise.
    lm = Checked(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size,
        max_length=max_positions(model.config), logits_cache=False, softmax_dtype=torch.float32,
    )  # fmt: skip
    if lm.tokenizer.pad_token_id >= vocab_size:  # masked, but looked up
        lm.tokenizer.pad_token = lm.tokenizer.convert_ids_to_tokens(0)
    return lm


@lru_cache(maxsize=2)
def _manager(defaults: bool = True) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _load(
    name: str, model: PreTrainedModel, tokenizer: Any, seed: int, texts: Sequence[str] | None = None
) -> list[Any]:
    """The task or group of that name, or the tasks of a tag, with their data."""
    if name == CLOZE:
        return [cloze_task(model, tokenizer, texts, seed)]
    if name in OURS:
        return [recall_task(name, model, tokenizer, seed)]
    from datasets.exceptions import DatasetsError

    try:
        found = _manager().load([name])
    except ImportError as error:
        raise RecipeError(f"tasks: {name} wants a package that is not installed ({error}).") from None
    except (OSError, DatasetsError) as error:
        raise CheckpointError(
            f"tasks: the data of {name} cannot be had ({_first_line(error)}). lm-eval fetches it from the Hub; "
            f"{', '.join(NAMES)} need no download."
        ) from None
    groups = found.get("groups", {})
    return [groups[name]] if name in groups else list(found["tasks"].values())


def recall_task(name: str, model: PreTrainedModel, tokenizer: Any, seed: int = 0) -> Any:
    """One of `OURS` as a task of lm-eval: questions at three lengths and depths, answered by greedy generation.

    An answer is right where its first word is the word asked for.

    Raises:
        CheckpointError: the tokenizer does not cover plain English, or no question fits into the model's context.
    """
    documents, answer_tokens = _questions(OURS[name], model, tokenizer, seed)
    return _task(
        name,
        documents,
        output_type="generate_until",
        doc_to_target="answer",
        generation_kwargs={"until": [".", ",", "\n"], "max_gen_toks": answer_tokens, "do_sample": False},
        process_results=lambda doc, results: {"exact_match": float(_first_word(results[0]) == doc["answer"])},
        metric="exact_match",
    )


def cloze_task(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str] | None = None, seed: int = 0) -> Any:
    """`surgery_cloze` as a task of lm-eval: the likeliest of four words at the end of a sentence.

    Args:
        texts: what is asked about; by default the topics of Python's `help()`.

    Raises:
        CheckpointError: the texts give no question, or the tokenizer does not cover plain English.
    """
    if texts is None:
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
    reader = Reader(tokenizer)
    spell = str.lower if reader.lower else str
    room = (max_positions(model.config) or CONTEXT) - len(reader.start) - 16  # the choices
    questions = cloze_questions(texts, reader.length, seed=seed, context=min(CONTEXT, room))
    documents = [{**asdict(q), "text": spell(q.text), "choices": list(map(spell, q.choices))} for q in questions]
    return _task(
        CLOZE,
        documents,
        output_type="multiple_choice",
        doc_to_choice="choices",
        doc_to_target="label",
        metric="acc",
    )


def _task(name: str, documents: list[dict[str, Any]], *, metric: str, **more: Any) -> Any:
    """A task of lm-eval on documents of ours, which have their question under `text`."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "test_split": "test",
        "doc_to_text": "text",
        "num_fewshot": 0,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    return ConfigurableTask(config=config | more)


def _questions(task: str, model: PreTrainedModel, tokenizer: Any, seed: int) -> tuple[list[dict[str, str]], int]:
    """Documents with `text` and `answer`, and how many tokens an answer may take."""
    reader = Reader(tokenizer)
    spell = str.lower if reader.lower else str
    context = min(max_positions(model.config) or 2048, 2048)
    rng = random.Random(f"{seed} {task}")
    # One token more than the longest: the stop after the word.
    room = 1 + max(reader.length(TASKS[task](rng).answer) for _ in range(100))
    documents = []
    # All lengths and depths among the first few, so that `limit` keeps a mixture.
    for _, length, depth in product(range(QUESTIONS), (context // 4, context // 2, context - room), DEPTHS):
        question = TASKS[task](rng)
        slack = 2 * (len(question.facts) + len(question.others)) + len(reader.start)
        facts = sum(map(reader.length, (*question.facts, *question.others, question.ask)))
        if facts + slack <= length:
            text = compose(question, depth, reader.length, length - slack, rng)
            documents.append({"text": spell(text), "answer": spell(question.answer)})
    if not documents:
        raise CheckpointError(f"tasks: no question of surgery_{task} fits into a context of {context} tokens.")
    return documents, room


def _first_word(text: str) -> str:
    return text.split()[0].strip(".,;:!?\"'") if text.split() else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _flat(results: dict[str, dict[str, Any]], tasks: Sequence[str]) -> dict[str, float]:
    """lm-eval's `{task: {"metric,filter": value}}` without standard errors."""
    scores: dict[str, float] = {}
    for task in tasks if all(_scores(results.get(name, {})) for name in tasks) else results:
        for key, value in _scores(results[task]).items():
            metric, _, filtered = key.partition(",")
            scores[f"{task} {metric}" + (f" {filtered}" if filtered not in ("", "none") else "")] = value
    return scores


def _scores(result: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in result.items()
        if isinstance(value, (int, float)) and "," in key and not key.partition(",")[0].endswith("_stderr")
    }
