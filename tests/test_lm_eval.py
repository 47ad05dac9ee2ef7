"""lm-eval on models in memory: our recall tasks, unknown names, a package that is not there."""

import copy
import importlib
import importlib.util

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM, PreTrainedTokenizerFast

from surgery.bundled import SMALL
from surgery.calibration.text import encode, load_tokenizer
from surgery.checkpoints.storage import load
from surgery.convert import convert
from surgery.errors import CheckpointError, RecipeError
from surgery.measure.cloze import cloze_questions
from surgery.measure.lm_eval import OURS, _language_model, check_known, cloze_task, recall_task, run_tasks

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'kv-surgery[eval]'"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, and an end; no padding token, as many have none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "</s>"])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def tiny_llama(context=384):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=256,
    )
    return LlamaForCausalLM(config).eval()


@needs_lm_eval
def test_recall_tasks_run_through_lm_eval_and_a_random_model_remembers_nothing(tokenizer):
    model = tiny_llama().train()
    scores = run_tasks(model, tokenizer, list(OURS), limit=4)
    assert scores == {f"{task} exact_match": 0.0 for task in OURS}
    assert model.training
    assert tokenizer.pad_token is None


@needs_lm_eval
def test_a_model_that_knows_the_answer_scores_one(tokenizer, monkeypatch):
    model = tiny_llama()
    answers = {d["text"]: d["answer"] for d in recall_task("surgery_passkey", model, tokenizer).test_docs()}
    through = []

    def generate(input_ids, attention_mask, **options):
        through.append(options["use_cache"])
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            word = tokenizer(" " + answers[tokenizer.decode(ids[mask.bool()])] + ". And")["input_ids"]
            rows.append(torch.cat([ids, torch.tensor(word + [256] * (20 - len(word)))]))
        return torch.stack(rows)

    monkeypatch.setattr(model, "generate", generate)
    assert run_tasks(model, tokenizer, ["surgery_passkey"]) == {"surgery_passkey exact_match": 1.0}
    assert through and all(through)


@needs_lm_eval
def test_questions_fit_the_context_and_differ_by_seed(tokenizer):
    model = tiny_llama()
    first, again, other = (
        list(recall_task("surgery_associative", model, tokenizer, seed).test_docs()) for seed in (0, 0, 1)
    )
    assert first == again != other
    longest = max(len(tokenizer(f"{d['text']} {d['answer']}.")["input_ids"]) for d in first)
    assert longest <= 384
    assert all(d["answer"] in d["text"] for d in first)


@needs_lm_eval
def test_a_context_too_short_for_any_question_is_refused(tokenizer):
    with pytest.raises(CheckpointError, match="no question of surgery_multi_key fits"):
        run_tasks(tiny_llama(context=48), tokenizer, ["surgery_multi_key"])


@needs_lm_eval
def test_unknown_names_are_refused_with_the_nearest_ones(tokenizer):
    with pytest.raises(RecipeError, match=r"no task 'helaswag'.*hellaswag"):
        run_tasks(tiny_llama(), tokenizer, ["surgery_passkey", "helaswag"])
    with pytest.raises(RecipeError, match=r"surgery_pass_key.*surgery_passkey"):
        check_known(["surgery_pass_key"])
    with pytest.raises(RecipeError, match="none named"):
        check_known([])


@needs_lm_eval
def test_a_padding_token_without_an_embedding_is_not_looked_up(tokenizer):
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert padded.pad_token_id == 257
    wanted = run_tasks(tiny_llama(), tokenizer, ["surgery_passkey"], limit=4)
    assert run_tasks(tiny_llama(), padded, ["surgery_passkey"], limit=4) == wanted


@needs_lm_eval
def test_tasks_with_ids_that_the_model_does_not_know_are_refused_by_name(tokenizer):
    started = copy.deepcopy(tokenizer)
    started.add_special_tokens({"bos_token": "<s>"})
    started.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    with pytest.raises(CheckpointError, match=r"tasks: token id 257 \('<s>'\), but the model knows 257"):
        run_tasks(tiny_llama(), started, ["surgery_passkey"], limit=2)


@needs_lm_eval
def test_a_tokenizer_that_ends_every_prompt_is_refused(tokenizer):
    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 256)])
    with pytest.raises(CheckpointError, match="puts </s> after every text"):
        run_tasks(tiny_llama(), ending, ["surgery_passkey"], limit=2)


@needs_lm_eval
def test_contexts_are_the_models_positions_whatever_they_are_called(tokenizer):
    assert _language_model(tiny_llama(), tokenizer, 2).max_length == 384
    config = MptConfig(vocab_size=257, d_model=32, n_heads=2, n_layers=1, max_seq_len=96, expansion_ratio=1)
    model = MptForCausalLM(config).eval()
    assert _language_model(model, tokenizer, 2).max_length == 96
    documents = recall_task("surgery_passkey", model, tokenizer).test_docs()
    assert max(len(tokenizer(f"{d['text']} {d['answer']}.")["input_ids"]) for d in documents) <= 96


@needs_lm_eval
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_likelihood_is_the_sum_of_its_tokens_whatever_is_asked_beside_it(dtype):
    """One text parted at four places, in one call."""
    from lm_eval.api.instance import Instance

    model = load(SMALL).to(dtype).eval()
    tokenizer = load_tokenizer(SMALL)
    words = "Once upon a time there was a little girl who liked to play with her dog in the park every day"
    words = words.split()
    pairs = [(" ".join(words[:n]), " " + " ".join(words[n:])) for n in (4, 9, 14, 18)]
    lm = _language_model(model, tokenizer, 4)
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]
    wanted = []
    for context, continuation in pairs:
        ids, whole = lm.tok_encode(context), lm.tok_encode(context + continuation)
        with torch.no_grad():
            scores = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        wanted.append(sum(float(scores[i - 1, whole[i]]) for i in range(len(ids), len(whole))))
    assert found == pytest.approx(wanted, rel=1e-5 if dtype == torch.float32 else 2e-3)


@needs_lm_eval
def test_data_that_cannot_be_fetched_is_one_sentence(tokenizer, monkeypatch):
    import datasets

    def offline(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(CheckpointError, match="data of arc_easy cannot be had"):
        run_tasks(tiny_llama(), tokenizer, ["arc_easy"])


def test_without_lm_eval_the_error_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'kv-surgery\[eval\]'"):
        run_tasks(tiny_llama(), tokenizer, ["surgery_passkey"])


THINGS = ("castle", "garden", "bridge", "market", "temple", "forest")
SENTENCES = [
    " ".join(f"On day {i} of that year the people of the {place} went to see the {thing}." for thing in THINGS)
    for i, place in enumerate(("town", "village", "harbour", "valley"))
]


def test_cloze_questions_ask_for_last_words_with_others_of_the_same_text_in_balance():
    made = cloze_questions(SENTENCES, lambda text: len(text.split()), context=40)
    assert len(made) == 24
    for question in made:
        right = question.choices[question.label]
        [source] = [text for text in SENTENCES if f"{question.text} {right}." in text]
        assert len(set(question.choices)) == 4 and set(question.choices) <= set(THINGS)
        assert not set(question.choices) & set(question.text.split())
        assert len(question.text.split()) <= 40 and source
    assert [question.label for question in made] == [0, 1, 2, 3] * 6
    assert made == cloze_questions(SENTENCES, lambda text: len(text.split()), context=40)
    assert made != cloze_questions(SENTENCES, lambda text: len(text.split()), context=40, seed=1)
    with pytest.raises(CheckpointError, match="found no sentence of 8 to 40 words"):
        cloze_questions(["Too short. No word!"], len)


@needs_lm_eval
def test_cloze_scores_parent_and_child_in_one_table_through_the_cache():
    parent = load(SMALL, dtype=torch.float32)
    steps = [{"rewriter": "gqa", "kv_heads": 1, "init": "mean"}]
    child = convert(parent, {"steps": steps})
    # The likeliest choice by one forward pass over each whole text: what a cache that loses nothing must give.
    tokenizer = load_tokenizer(SMALL)
    documents = list(cloze_task(parent, tokenizer, seed=3).test_docs())[:4]
    right = 0
    for document in documents:
        nats = []
        prompt = encode(tokenizer, document["text"])
        for choice in document["choices"]:
            ids = torch.tensor([encode(tokenizer, f"{document['text']} {choice}")])
            with torch.no_grad():
                logp = parent(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            nats.append(float(logp.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()))
        right += max(range(4), key=nats.__getitem__) == document["label"]
    lengths = []
    for model in (parent, child):
        model.register_forward_pre_hook(lambda _, __, k: lengths.append(k["input_ids"].shape[1]), with_kwargs=True)
    scores = {name: run_tasks(m, tokenizer, ["surgery_cloze"], limit=4, seed=3) for name, m in
              (("parent", parent), ("child", child))}  # fmt: skip
    assert scores["parent"] == {"surgery_cloze acc": right / 4}
    assert scores["child"].keys() == scores["parent"].keys()
    assert set(lengths) == {1}


def test_an_evaluation_asks_cloze_questions_about_its_own_text(tokenizer, monkeypatch):
    module, asked = importlib.import_module("surgery.measure.evaluate"), []
    monkeypatch.setattr(module, "check_known", lambda _: None)
    monkeypatch.setattr(
        module, "run_tasks", lambda *_, texts, **__: asked.append(texts) or {"surgery_cloze acc": len(asked) / 4}
    )
    report = module.evaluate(
        tiny_llama(), baseline=tiny_llama(), text=SENTENCES, tokenizer=tokenizer, path="prefill", samples=1,
        lm_eval_tasks=["surgery_cloze"],
    )  # fmt: skip
    assert asked == [SENTENCES, SENTENCES]
    assert report.tasks == {"converted": {"surgery_cloze acc": 0.25}, "baseline": {"surgery_cloze acc": 0.5}}
    [row] = [line for line in report.to_markdown().splitlines() if "surgery_cloze acc" in line]
    assert "0.25" in row and "0.5" in row
