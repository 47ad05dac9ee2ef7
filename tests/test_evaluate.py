"""An evaluation that cannot be fooled: what a cache breaks, the decode path and recall see, and prefill does not."""

import json
import math
import random
import sys

import pytest
import torch
from families import tiny_model
from tokenizers.processors import TemplateProcessing
from tokenizing import said, word_tokenizer
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

import surgery
from surgery import evaluate
from surgery.bundled import SMALL
from surgery.calibration.text import load_tokenizer, load_windows
from surgery.checkpoints.provenance import provenance_of
from surgery.errors import CheckpointError, RecipeError, UnsupportedModel
from surgery.export.card import _done
from surgery.export.target import Source, Written
from surgery.measure.memory import cache_bytes, max_batch, parse_bytes
from surgery.measure.recall import TASKS, Reader, answer_questions, compose_questions
from surgery.measure.scoring import DECODE_BATCH, rows_of, score_windows
from surgery.measure.statistics import bootstrap

IDS = torch.randint(0, 120, (6, 48), generator=torch.Generator().manual_seed(0))


class LateLayer(DynamicLayer):
    """Counts one token too many: whatever is decoded stands one position late."""

    def get_seq_length(self):
        return super().get_seq_length() + (self.is_initialized and self.keys.shape[-2] > 0)

    def get_mask_sizes(self, query_length):
        return super().get_seq_length() + query_length, 0


class ForgetfulLayer(DynamicLayer):
    """Loses one token of every three that are decoded."""

    seen = 0

    def update(self, keys, values, *args, **kwargs):
        self.seen += keys.shape[-2]
        if keys.shape[-2] == 1 and self.seen % 3 == 0:
            self.keys, self.values = self.keys[:, :, :-1], self.values[:, :, :-1]
        return super().update(keys, values, *args, **kwargs)

    def get_seq_length(self):
        return self.seen

    def get_mask_sizes(self, query_length):
        return super().get_seq_length() + query_length, 0


class SwappedLayer(DynamicLayer):
    """Writes decoded keys under each other's heads."""

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.flip(1) if keys.shape[-2] == 1 else keys, values, *args, **kwargs)


class StaleLayer(DynamicLayer):
    """A decoded value lands in its slot one step late; until then the slot holds the value before it."""

    def update(self, keys, values, *args, **kwargs):
        if values.shape[-2] == 1:
            self.late, values = values, getattr(self, "late", values)
        return super().update(keys, values, *args, **kwargs)


FAULTS = [LateLayer, ForgetfulLayer, SwappedLayer, StaleLayer]


def broken(model, layer_class):
    """The same weights with a cache of `layer_class` layers."""

    class Broken(LlamaForCausalLM):
        def forward(self, *args, past_key_values=None, use_cache=None, **kwargs):
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache()
                past_key_values.layers = [layer_class() for _ in range(self.config.num_hidden_layers)]
            return super().forward(*args, past_key_values=past_key_values, use_cache=use_cache, **kwargs)

    child = Broken(model.config)
    child.load_state_dict(model.state_dict())
    return child.eval()


@pytest.fixture(scope="module")
def small():
    return surgery.load(SMALL, dtype=torch.float32)


@pytest.fixture(scope="module")
def prose():
    """Windows of the bundled card and of this project's own README."""
    texts = [(SMALL / "README.md").read_text(), (SMALL.parents[2] / "README.md").read_text()]
    tokenizer = load_tokenizer(SMALL)
    return load_windows(texts, tokenizer, vocab_size=4096, length=64, every_window=True, samples=16)


def loss(model, windows, path):
    return evaluate(model, text=windows, path=path).model.nats_per_token


@pytest.fixture(scope="module")
def questions(small):
    asked = ("associative", "multi_key")
    return compose_questions(small.config, load_tokenizer(SMALL), tasks=asked, lengths=(128,), questions=8)


def nats(model, questions):
    cells = answer_questions(model, questions)
    return sum(cell.nats for cell in cells) / len(cells)


@pytest.fixture(scope="module")
def sound(small, prose, questions):
    """Of the whole model: what prefill says of the prose, and the nats of its answers."""
    return loss(small, prose, "prefill"), nats(small, questions)


def test_decoding_through_a_sound_cache_equals_prefill(small, prose):
    assert abs(evaluate(small, text=prose).model.cache_gap) < 1e-5


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_cache_is_seen_by_the_decode_path_and_by_recall_but_not_by_prefill(
    small, prose, questions, sound, fault
):
    child = broken(small, fault)
    assert loss(child, prose, "prefill") == sound[0]
    report = evaluate(child, text=prose)
    assert abs(report.model.cache_gap) > 1e-4
    assert "reading the cache costs" in str(report)
    assert nats(child, questions) > sound[1] + 0.003  # equal to the last digit where the cache is sound


def test_two_runs_with_one_seed_give_the_same_json(small, prose):
    def once():
        recall = {"recall_tasks": ("passkey",), "recall_lengths": (128,), "questions": 2}
        report = evaluate(small, baseline=small, text=prose, samples=4, seed=3, prompts=["Once upon"], **recall)
        assert report.model.recall
        (said,) = report.model.continued.values()
        assert said and surgery.generate(small, "Once upon", tokens=40) == "Once upon" + said
        assert report.baseline.continued == report.model.continued and said.split()[0] in str(report)
        return json.dumps(report.to_dict())

    assert once() == once()


def test_a_model_beside_itself_has_no_gap(small, prose):
    report = evaluate(small, baseline=small, text=prose, samples=4)
    assert report.gap == 0 and report.kl < 1e-9 and report.agreement == 1
    assert report.model.cache.bytes == report.model.cache.predicted_bytes


def test_the_interval_of_a_gap_covers_it_and_shrinks_with_more_windows(small, prose):
    parent = tiny_model("llama")
    child = surgery.convert(parent, {"steps": [{"rewriter": "gqa", "kv_heads": 1, "init": "mean"}]})
    few, many = (evaluate(child, baseline=parent, text=IDS.repeat(n, 1), path="prefill") for n in (1, 8))
    for report in (few, many):
        gap = report.difference.gap
        assert gap.low <= gap.value <= gap.high
    width = [r.difference.gap.high - r.difference.gap.low for r in (few, many)]
    assert width[1] < width[0]


def test_bootstrap_weighs_windows_by_their_tokens():
    sums, tokens = torch.tensor([[10.0], [1.0]]), torch.tensor([[10.0], [90.0]])
    assert bootstrap(sums, tokens, seed=0).value == pytest.approx(0.11)
    assert math.isnan(bootstrap(sums[:1], tokens[:1], seed=0).low)


def test_padding_does_not_count():
    model = tiny_model("llama")
    windows = load_windows(IDS, vocab_size=128, length=48)
    cut = windows.mask_BT.clone()
    cut[:, 20:] = False
    whole = score_windows(model, None, load_windows(IDS[:, :20], vocab_size=128, length=20), "prefill")
    for path in ("prefill", "decode"):
        padded = score_windows(model, None, type(windows)(windows.ids_BT, cut, "x"), path)
        assert padded.tokens.sum() == whole.tokens.sum()
        assert padded.nll.sum().item() == pytest.approx(whole.nll.sum().item(), abs=1e-3)


def test_nan_is_a_row_with_its_reason_and_never_a_mean():
    model = tiny_model("llama")
    model.lm_head.weight.data[5] = float("nan")
    report = evaluate(model, text=IDS)
    assert math.isnan(report.model.nats_per_token)
    assert "window 0, position 0" in report.problems[0]
    assert "nan" in str(report) and "not finite" in str(report)
    assert report.to_dict()["model"]["quality"]["decode"]["nats_per_token"]["value"] is None


def test_a_model_without_a_cache_is_refused_on_the_decode_path_only():
    class Cacheless(LlamaForCausalLM):
        def forward(self, *args, use_cache=None, **kwargs):
            return super().forward(*args, use_cache=False, **kwargs)

    model = Cacheless(tiny_model("llama").config).eval()
    with pytest.raises(UnsupportedModel, match="returns no cache"):
        evaluate(model, text=IDS)
    assert evaluate(model, text=IDS, path="prefill").model.cache.bytes == 0


def test_a_baseline_that_reads_other_tokens_is_refused(small, tmp_path):
    other = tiny_model("llama")
    with pytest.raises(CheckpointError, match="not parent and child"):
        evaluate(small, baseline=other, text=IDS)
    data = json.loads((SMALL / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    small.save_pretrained(tmp_path)
    for file in SMALL.glob("tokenizer*"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="another tokenizer: 'a' is token"):
        evaluate(small, baseline=surgery.load(tmp_path), text=IDS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": "prefil"}, RecipeError, "Use one of prefill, decode, both"),
        ({"recall_tasks": ("pass",)}, RecipeError, "Known: associative"),
        ({"recall_tasks": ("passkey",)}, CheckpointError, "need a tokenizer"),
        ({"prompts": ["a"]}, CheckpointError, "need a tokenizer"),
        ({"prompts": [""], "tokenizer": load_tokenizer(SMALL)}, CheckpointError, "prompt: holds no token"),
        ({"memory": "much"}, RecipeError, "Write it as 80GiB"),
        ({"text": ["a b c"], "tokenizer": load_tokenizer(SMALL)}, CheckpointError, "shorter than one sequence"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, error, message):
    with pytest.raises(error, match=message):
        evaluate(tiny_model("llama"), **{"text": IDS, **options})


def test_recall_needs_a_tokenizer_that_covers_plain_words():
    with pytest.raises(CheckpointError, match="does not cover plain English"):
        compose_questions(tiny_model("llama").config, lambda_tokenizer())


def lambda_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")


@pytest.mark.parametrize("task", TASKS)
def test_every_question_has_exactly_the_length_asked_for_and_holds_its_answer(task):
    reader, rng = Reader(load_tokenizer(SMALL)), random.Random(0)
    for depth in (0.0, 0.5, 1.0):
        question = TASKS[task](rng)
        asked = reader.ask(question, depth, 200, rng)
        assert len(asked.ids) - asked.answer == 200
        text = reader.tokenizer.decode(asked.ids)
        assert text.endswith(f"{question.ask} {question.answer}")
        assert question.facts[-1] in text


def test_a_long_text_is_scored_with_every_window_started_as_the_tokenizer_starts_a_text():
    model = tiny_model("llama")
    words = torch.randint(8, 128, (30,), generator=torch.Generator().manual_seed(0))
    report = evaluate(model, text=[said(*words.tolist())], tokenizer=word_tokenizer(), length=11)
    ids = torch.cat([torch.ones(3, 1, dtype=torch.long), words.view(3, 10)], 1)
    with torch.inference_mode():
        logp = model(ids).logits.log_softmax(-1)[:, :-1]
    wanted = -float(logp.gather(-1, ids[:, 1:, None]).mean())
    assert report.model.quality["prefill"].nats_per_token.value == pytest.approx(wanted, abs=1e-5)
    assert report.model.quality["decode"].nats_per_token.value == pytest.approx(wanted, abs=1e-5)
    assert report.tokens == 30 and report.windows == 3
    assert report.to_dict()["window_start"] == ["<s>"]
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))).window_start == ("<s>",)
    assert "every window starts with <s>" in str(report)
    assert "starts with no special token" in str(
        evaluate(model, text=[said(*words.tolist())], tokenizer=word_tokenizer(start=()), length=10, path="prefill")
    )


def test_calibration_text_is_cut_the_same_way_and_recorded():
    words = torch.randint(8, 128, (10,), generator=torch.Generator().manual_seed(0))
    recipe = {"steps": [{"rewriter": "gqa", "kv_heads": 1, "layers": "1"}]}
    child = surgery.convert(
        tiny_model("llama"), recipe, calibration=[said(*words.tolist())], tokenizer=word_tokenizer(), length=6
    )
    ids = torch.cat([torch.ones(2, 1, dtype=torch.long), words.view(2, 5)], 1)
    digest = load_windows(ids, vocab_size=128, length=6).digest
    found = provenance_of(child)["calibration"]
    assert "12 tokens in 2 windows, each starting with `<s>`, digest" in "".join(
        _done(Source(child), Written(architecture="x"))
    )
    assert found.pop("held_out_kl") > 0
    assert found == {"windows": 2, "tokens": 12, "digest": digest, "start": ["<s>"]}


@pytest.mark.parametrize(("scorer", "rows"), [("snapkv", 1), ("h2o", DECODE_BATCH)])
def test_texts_are_decoded_alone_where_their_length_says_what_is_a_prompt(scorer, rows):
    step = {"rewriter": "evict", "scorer": scorer, "ratio": 2, "recent": 4} | ({"observe": 4} if rows == 1 else {})
    assert rows_of(surgery.convert(tiny_model("llama"), {"steps": [step]})) == rows


def test_decoded_tokens_stand_behind_the_cache_where_a_parent_counts_from_zero():
    """Bamba counts positions from 0 in every call that names none: its loss through the cache was another."""
    report = evaluate(tiny_model("bamba"), text=torch.randint(3, 128, (2, 24)))
    assert report.model.cache_gap == pytest.approx(0, abs=1e-5)


def test_a_seed_is_refused_where_no_token_is_drawn():
    with pytest.raises(RecipeError, match="temperature 0 draws none"):
        surgery.generate(SMALL, "Once", seed=3)


def test_as_many_tokens_come_at_once_as_asked_for():
    """Codes beside slots that leave behind prompts: what came at once is not decoded, in either."""
    child, ids = surgery.convert(tiny_model("llama"), "kv-int4"), torch.randint(3, 128, (2, 100))
    some = evaluate(child, text=ids, path="decode", at_once=90)
    assert some.prompt == 90 and evaluate(child, text=ids[:, :90], path="decode").prompt == 1
    with torch.no_grad():
        cache = child(ids[:, :90]).past_key_values
        rest = [child(ids[:, t : t + 1], past_key_values=cache).logits for t in range(90, 99)]
        logits = torch.cat([child(ids[:, :90]).logits, *rest], 1)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert some.model.nats_per_token == pytest.approx(wanted, abs=1e-5)
    for path, at_once, words in (("prefill", 5, "path is prefill"), ("decode", 100, "leaves none to decode")):
        with pytest.raises(RecipeError, match=words):
            evaluate(child, text=ids, path=path, at_once=at_once)


@pytest.mark.parametrize(("family", "length"), [("gpt2", None), ("gpt2", 16), ("mpt", None), ("llama", 16)])
def test_token_ids_are_cut_to_the_length_asked_for_and_to_the_models_positions(family, length):
    model = tiny_model(family)
    if family == "gpt2":
        model = type(model)(type(model.config)(**{**model.config.to_dict(), "n_positions": 64})).eval()
    limit = {"gpt2": 64, "mpt": 256, "llama": 256}[family]
    ids = torch.randint(8, 120, (2, 512), generator=torch.Generator().manual_seed(0))
    size = length or limit
    report = evaluate(model, text=ids, length=length, path="prefill", speed=length is None)
    assert (report.length, report.windows, report.tokens) == (size, 1024 // size, 1024 // size * (size - 1))
    assert report.model.context == limit
    cut = ids.view(-1, size)
    with torch.inference_mode():
        logp = model(cut, use_cache=False).logits.log_softmax(-1)[:, :-1]
    wanted = -float(logp.gather(-1, cut[:, 1:, None]).mean())
    assert report.model.nats_per_token == pytest.approx(wanted, abs=1e-5)
    if length is None:
        assert report.model.speed.prompt + report.model.speed.new <= limit
    with pytest.raises(CheckpointError, match=f"windows of {limit + 1} tokens, but the model has {limit} positions"):
        evaluate(model, text=ids, length=limit + 1)


def test_questions_start_with_all_that_the_tokenizer_starts_a_text_with_and_nothing_else():
    def starting(single, specials):
        tokenizer = load_tokenizer(SMALL)
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in specials]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
        return tokenizer, [i for _, i in ids]

    tokenizer, ids = starting("<|end|> <s> $A", ["<|end|>", "<s>"])
    assert Reader(tokenizer).start == ids
    tokenizer, _ = starting("$A </s>", ["</s>"])
    tokenizer.bos_token = "</s>"
    assert Reader(tokenizer).start == []


def test_questions_that_do_not_fit_the_positions_or_use_unknown_ids_are_refused_before_any_work(small, monkeypatch):
    monkeypatch.setattr(sys.modules["surgery.measure.evaluate"], "score_windows", None)
    tokenizer = load_tokenizer(SMALL)
    options = {"text": IDS, "recall_tasks": ("passkey",), "tokenizer": tokenizer}
    with pytest.raises(RecipeError, match=r"questions of 512 tokens .* the model has 512"):
        evaluate(small, recall_lengths=(512,), **options)
    with pytest.raises(CheckpointError, match=r"recall: token id \d+ \('.+'\), but the model knows 128"):
        evaluate(tiny_model("llama"), **options)


def test_sizes_are_read_as_people_write_them():
    assert parse_bytes("80GiB") == 80 * 2**30
    assert parse_bytes("24 GB") == 24 * 10**9
    assert parse_bytes(512) == 512
    assert parse_bytes(".5KiB") == 512
    assert max_batch(1000, 400, 100.0) == 6
    assert max_batch(100, 400, 100.0) == 0


def test_the_largest_batch_is_of_caches_as_long_as_its_context():
    parent = tiny_model("mistral", sliding_window=32, max_position_embeddings=512)
    step = {"rewriter": "evict", "scorer": "streaming", "slots": 32, "recent": 16}
    full = tiny_model("llama", max_position_embeddings=512)
    for model in (parent, surgery.convert(full, {"steps": [step]}), surgery.convert(full, "kv-int4")):
        found = evaluate(model, text=IDS, path="prefill", memory="1GB").model
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        whole = torch.randint(3, 128, (1, 512))
        assert found.context == 512
        assert found.max_batch == max_batch(10**9, weights, cache_bytes(model, whole))
