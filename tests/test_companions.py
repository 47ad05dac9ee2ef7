"""What lies beside the weights travels on every path; what belongs to the old weights alone stays behind."""

import json
import sys
from pathlib import Path

import pytest
import torch
import warm
from families import tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import surgery
from surgery import PlanError
from surgery.checkpoints import places, provenance
from surgery.checkpoints.companions import companions, copy_companions
from surgery.convert import convert_checkpoint
from surgery.export import Source, target_for
from surgery.export.target import hide_paths

GQA = {"name": "half", "steps": [{"rewriter": "gqa", "kv_heads": "1/2"}]}
TEXT = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1))

LETTERS = "tokenization_letters.LetterTokenizer"
TOKENIZER_CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizer
from .letters import split


class LetterTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "letters.txt"}

    def __init__(self, vocab_file, **kwargs):
        self.letters = Path(vocab_file).read_text().split()
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {letter: i for i, letter in enumerate(self.letters)}

    def _tokenize(self, text, **kwargs):
        return split(text)

    def _convert_token_to_id(self, token):
        return self.letters.index(token)

    def _convert_id_to_token(self, index):
        return self.letters[index]
"""
TRAVELS = {
    "LICENSE": "terms",
    "USE_POLICY.md": "policy",
    "letters.txt": "a b c d",
    "letters.py": "def split(text):\n    return [c for c in text if c != ' ']\n",
    "tokenization_letters.py": TOKENIZER_CODE,
    "modeling_old.py": "raise RuntimeError('code of the old model ran')\n",
    "tokenizer_config.json": json.dumps(
        {"tokenizer_class": "LetterTokenizer", "auto_map": {"AutoTokenizer": [LETTERS, None]}}
    ),
    "generation_config.json": json.dumps({"do_sample": True, "temperature": 0.25, "eos_token_id": 2}),
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "chat_template.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "sentencepiece.bpe.model": "model",
    "merges.txt": "a b",
    "dict.vocab": "a",
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]),
    "1_Pooling/config.json": json.dumps({"pooling_mode_mean_tokens": True}),
    "2_Dense/config.json": "{}",
    "2_Dense/model.safetensors": "the weights of a module behind the decoder",
    "2_Dense/pytorch_model.bin": "the same",
}  # fmt: skip
STAYS = {
    "README.md": "card of the parent",
    "pytorch_model.bin": "old weights",
    "pytorch_model.bin.index.json": "{}",
    "model.safetensors.index.fp32.json": "{}",
    "old-Q4.gguf": "old weights",
    "onnx/model.onnx": "old weights",
    "onnx/config.json": "{}",
    "original/params.json": '{"n_kv_heads": 2}',
    "optimizer.pt": "state",
    "trainer_state.json": "{}",
    "checkpoint-10/tokenizer.json": "{}",
    "an-earlier-result/config.json": "{}",
    "an-earlier-result/model.safetensors": "weights",
    "runs/events": "log",
    ".gitattributes": "*.bin lfs",
    ".cache/huggingface/x.metadata": "x",
    "figure.png": "picture",
}


@pytest.fixture
def parent(tmp_path):
    folder = tmp_path / "parent"
    tiny_model("llama").save_pretrained(folder)
    for name, text in {**TRAVELS, **STAYS}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_old.OldConfig",
        "AutoModelForCausalLM": "modeling_old.OldForCausalLM",
        "AutoTokenizer": [LETTERS, None],
        "AutoProcessor": "processing_missing.Processor",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


WRITTEN = {"config.json", "model.safetensors", "recipe.yaml", "surgery.json"}


@pytest.mark.parametrize("path", ["streamed", "calibrated", "own class", "memory"])
def test_every_path_takes_the_same_files_along(path, parent, tmp_path):
    child = tmp_path / "child"
    if path == "memory":
        surgery.save(surgery.convert(surgery.load(parent), GQA), child)
    else:
        recipe = "identity" if path == "own class" else GQA
        convert_checkpoint(parent, recipe, child, calibration=TEXT if path == "calibrated" else None)
    assert files(child) == {*TRAVELS, *WRITTEN}
    for name in set(TRAVELS) - {"generation_config.json"}:
        assert (child / name).read_text() == TRAVELS[name]
    assert json.loads((child / "generation_config.json").read_text())["temperature"] == 0.25
    named = json.loads((child / "config.json").read_text())["auto_map"]
    assert named == {"AutoTokenizer": [LETTERS, None]}


@pytest.mark.parametrize("path", ["memory", "disk"])
def test_a_child_that_is_converted_again_takes_the_same_files_along_and_tells_both_recipes(path, parent, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    if path == "memory":
        surgery.save(surgery.convert(surgery.convert(surgery.load(parent), GQA), "identity"), twice)
    else:
        convert_checkpoint(parent, GQA, once)
        convert_checkpoint(once, "identity", twice)
    assert files(twice) == {*TRAVELS, *WRITTEN}
    origin = json.loads((twice / "surgery.json").read_text())
    assert origin["parent"] == (None if path == "memory" else str(once))
    assert origin["recipe"]["name"] == "identity"
    assert origin["before"]["parent"] == str(parent)
    assert origin["before"]["recipe"]["name"] == "half"
    hide_paths(twice)
    for name in ("config.json", "surgery.json"):
        assert str(tmp_path) not in (twice / name).read_text()


LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, type(tokenizer).__name__, tokenizer("b a")["input_ids"])
"""


def test_child_loads_with_trust_remote_code_and_the_parents_tokenizer(parent, tmp_path):
    convert_checkpoint(parent, GQA, tmp_path / "child")
    done = warm.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "child")], check=True,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.split("\n")[-2] == "LlamaForCausalLM LetterTokenizer [1, 0]"


def test_tokenizer_that_is_passed_replaces_the_parents_and_nothing_else(parent, tmp_path):
    words = {f"w{i}": i for i in range(9)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), unk_token="w0")
    tokenizer.save_pretrained(tmp_path / "alone")
    convert_checkpoint(parent, GQA, tmp_path / "streamed", tokenizer=tokenizer)
    surgery.save(surgery.convert(surgery.load(parent), GQA), tmp_path / "memory", tokenizer=tokenizer)
    replaced = {
        "tokenizer_config.json", "sentencepiece.bpe.model", "merges.txt", "chat_template.json", "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    }  # fmt: skip
    for path in ("streamed", "memory"):
        assert files(tmp_path / path) == ({*TRAVELS} - replaced) | WRITTEN | files(tmp_path / "alone")
        for name in files(tmp_path / "alone"):
            assert (tmp_path / path / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_export_keeps_code_of_the_tokenizer_beside_the_code_of_the_model(parent, tmp_path):
    convert_checkpoint(parent, "identity", tmp_path / "child")
    (tmp_path / "out").mkdir()
    written = target_for("hub").write(Source(tmp_path / "child"), tmp_path / "out")
    assert set(TRAVELS) <= files(tmp_path / "out")
    assert {"letters.py", "tokenization_letters.py", "modeling_surgery_llama.py"} <= set(written.facts["code"])
    named = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert named["AutoTokenizer"] == [LETTERS, None]
    assert named["AutoModelForCausalLM"] == "modeling_surgery_llama.SurgeryLlamaForCausalLM"
    (tmp_path / "out" / "export.json").write_text("{}")  # the next export writes its own code
    assert {"letters.py", "tokenization_letters.py"} == {
        f for f in companions(tmp_path / "out") if "old" not in f and f.endswith(".py")
    }


def test_export_refuses_code_under_the_name_of_its_own(parent, tmp_path):
    (parent / "attention.py").write_text("")
    convert_checkpoint(parent, "identity", tmp_path / "child")
    (tmp_path / "out").mkdir()
    with pytest.raises(PlanError, match="attention.py: code of the parent's tokenizer"):
        target_for("hub").write(Source(tmp_path / "child"), tmp_path / "out")


def test_files_of_a_parent_on_the_hub_are_fetched_for_a_model_in_memory(parent, tmp_path, monkeypatch):
    asked = []

    def fetch(name, revision=None, **patterns):
        asked.append((name, revision, patterns))
        return str(parent)

    monkeypatch.setattr(places, "snapshot_download", fetch)
    model = tiny_model("llama")
    model.config.name_or_path, model.config._commit_hash = "somebody/small", "abc123"
    surgery.save(surgery.convert(model, GQA), tmp_path / "child")
    assert files(tmp_path / "child") == {*TRAVELS, *WRITTEN}
    [(name, revision, patterns)] = asked
    assert (name, revision) == ("somebody/small", "abc123")
    assert {"*.safetensors", "*.bin", "*.gguf"} <= set(patterns["ignore_patterns"])


def test_hub_that_cannot_be_reached_is_a_warning_and_not_the_end_of_a_conversion(tmp_path, monkeypatch):
    def fail(name, **_):
        raise surgery.CheckpointError(f"{name}: the Hub cannot be reached.")

    monkeypatch.setattr(provenance, "local_folder", fail)
    model = tiny_model("llama")
    model.config.name_or_path, model.config._commit_hash = "somebody/small", "abc123"
    with pytest.warns(UserWarning, match="without the tokenizer and other files of somebody/small"):
        surgery.save(surgery.convert(model, GQA), tmp_path / "child")
    assert files(tmp_path / "child") == WRITTEN | {"generation_config.json"}


def test_weights_of_a_hub_id_are_fetched_without_other_formats(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(places, "snapshot_download", lambda *a, **k: asked.append(k) or str(tmp_path))
    places.local_folder("somebody/small")
    left = asked[0]["ignore_patterns"]
    assert "*.safetensors" not in left
    assert {"*.bin", "*.gguf", "*.onnx", "original/*", "consolidated*.safetensors"} <= set(left)


def test_code_that_only_the_hub_has_stays_named(tmp_path):
    config = {
        "architectures": ["Homemade"],
        "auto_map": {"AutoModel": "me/code--own.Model", "AutoConfig": "own.Config"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    copy_companions(None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {"AutoModel": "me/code--own.Model"}
    assert list(tmp_path.iterdir()) == [Path(tmp_path / "config.json")]


def test_adapter_of_the_old_weights_stays(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors", "vocab.json"):
        (tmp_path / name).write_text("{}")
    assert companions(tmp_path) == ["vocab.json"]


def test_tokenizer_that_is_passed_is_the_one_that_the_config_leads_to(parent, tmp_path):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(9)}, "w0"))
    convert_checkpoint(parent, GQA, tmp_path / "child", tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
    assert "auto_map" not in json.loads((tmp_path / "child" / "config.json").read_text())
