"""Exports for the Hub: they run where only torch and transformers are, and answer there as they do here."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from families import tiny_model
from markdown_it import MarkdownIt
from methods import METHODS, converted, merged, parent, sites
from packaging.requirements import Requirement
from safetensors.torch import load_file
from test_report import made_up
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_imports

import surgery
from surgery.console import human_bytes
from surgery.errors import CheckpointError, PlanError
from surgery.export import hub, parity, remote_code
from surgery.export.card import BEGIN, CardOptions, write_card
from surgery.export.parity import Parity
from surgery.export.remote_code import RUNTIME, verify
from surgery.export.target import Source, Written

NEW_TOKENS = 64
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
# Of each variant one family, another one each time; the slow run has them all.
EVERY = [(method, family) for method, row in METHODS.items() for family in row.families]
SOME = [(method, row.families[i % len(row.families)]) for i, (method, row) in enumerate(METHODS.items())]
REST = [pair for pair in EVERY if pair not in SOME]


@pytest.fixture(scope="module", autouse=True)
def started():
    """Here a process is started for each export that is checked, as users' are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "subprocess", subprocess)
        yield


@pytest.fixture(scope="session")
def bare(tmp_path_factory) -> Path:
    """A folder for `sys.path` with torch, transformers, what these two require, and nothing else."""
    wanted, todo = set(), ["torch", "transformers", "jinja2"]
    folder = tmp_path_factory.mktemp("bare")
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in wanted:
            continue
        wanted.add(name)
        distribution = importlib.metadata.distribution(name)
        required = [Requirement(text) for text in distribution.requires or ()]
        todo += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists() and not top.endswith(".pth"):
                (folder / top).symlink_to(Path(distribution.locate_file(top)))
    return folder


def run_bare(bare: Path, code: str, *arguments: object, modules: Path) -> str:
    """Run `code` in a process that sees the bare folder and the standard library only."""
    begin = f"import sys\nsys.path.append({str(bare)!r})\n"
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-c", begin + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def prompt(vocabulary: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, (2, 6), generator=torch.Generator().manual_seed(1))


def statically(family: str) -> bool:
    """Whether the parent itself generates with a static cache."""
    try:
        parent(family).generate(prompt(99), max_new_tokens=2, do_sample=False, cache_implementation="static")
    except Exception:
        return False
    return True


ANSWER = """
import importlib.util, json, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("surgery") is None and importlib.util.find_spec("accelerate") is None
found = {}
for folder, caches in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.tensor(json.loads(sys.argv[2]))
    for cache in caches:
        kind = {"cache_implementation": cache}
        if cache == "static" and model.retains:  # with room for tokens that do not merge
            kind = {"past_key_values": model.static_cache(ids.shape[1] + 64, ratio=1.0)}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **kind, **json.loads(sys.argv[3]))
        found[f"{folder} {cache}"] = made.contiguous()
save_file(found, sys.argv[4])
"""


def check(models: dict[str, tuple[PreTrainedModel, bool]], bare: Path, folder: Path) -> None:
    """Export models (and whether they have static caches), and compare what one bare process makes of them with what
    they are here."""
    want, asked = {}, {}
    for name, (model, static) in models.items():
        out = folder / name
        out.mkdir()
        source = Source(model)
        hub.Hub().check(source)
        hub.Hub().write(source, out)
        asked[str(out)] = caches = ["dynamic", "static"] if static else ["dynamic"]
        for cache in caches:
            ids, kind = prompt(99), {"cache_implementation": cache}
            if cache == "static" and model.retains:
                kind = {"past_key_values": model.static_cache(ids.shape[1] + NEW_TOKENS, ratio=1.0)}
            made = model.generate(ids, attention_mask=torch.ones_like(ids), **kind, **GREEDY)
            want[f"{out} {cache}"] = made
    answers = folder / "answers.safetensors"
    questions = [json.dumps(part) for part in (asked, prompt(99).tolist(), GREEDY)]
    run_bare(bare, ANSWER, *questions, answers, modules=folder / "modules")
    got = load_file(answers)
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def of_the_matrix(pairs: list[tuple[str, str]]) -> dict[str, tuple[PreTrainedModel, bool]]:
    return {f"{method}-{family}": (converted(method, family), statically(family)) for method, family in pairs}


def test_every_variant_generates_the_same_where_only_torch_and_transformers_are(bare, tmp_path) -> None:
    models = of_the_matrix(SOME)
    assert sum(static for _, static in models.values()) > len(models) // 2
    ranked = merged(METHODS["identity"], ["llama"], "ranked", scorer="h2o", budget="ada", window=2, sinks=1)
    models["ranked"] = ranked.convert(parent("llama"), sites("llama")), False
    check(models, bare, tmp_path)


@pytest.mark.slow
def test_every_variant_of_every_family_generates_the_same_there(bare, tmp_path) -> None:
    check(of_the_matrix(REST), bare, tmp_path)


FAST = {"refit_queries": False, "refit_output": False}
PARENT_CARD = """---
license: llama3
license_name: some-terms
language: [en, de]
base_model: somebody/grandparent
---
# Parent
"""


def windows() -> torch.Tensor:
    return torch.randint(3, 99, (8, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def child(tmp_path_factory) -> Path:
    """A converted checkpoint with latents and readers, whose parent has a card and a licence."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama").save_pretrained(folder / "parent")
    (folder / "parent" / "README.md").write_text(PARENT_CARD)
    (folder / "parent" / "LICENSE").write_text("terms")
    recipe = {"name": "both", "steps": [{"rewriter": "share", "layout": "cla2", "init": "latent", **FAST}]}
    surgery.convert_checkpoint(folder / "parent", recipe, folder / "child", calibration=windows())
    return folder / "child"


@pytest.fixture(scope="module")
def export(child, tmp_path_factory) -> Path:
    """Its export with the report of an evaluation; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "result.json").write_text(json.dumps(made_up().to_dict()))
    surgery.export(child, folder / "out", to="hub", results=folder / "result.json")
    return folder / "out"


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    """No test asks the Hub for the card of a parent."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def copy(export, tmp_path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "copy"))


def test_the_report_states_the_largest_difference(export) -> None:
    report = json.loads((export / "export.json").read_text())
    assert report["target"] == "hub" and report["architecture"] == "SurgeryLlamaForCausalLM"
    assert report["parity"]["logit_difference"] == 0.0
    assert report["parity"]["equal_greedy_tokens"] == report["parity"]["greedy_tokens"] == 96
    assert report["parity"]["caches"] == ["dynamic", "static"]
    assert report["parity"]["engine"].startswith("transformers ")


def test_the_export_holds_the_runtime_as_it_is_and_asks_for_surgery_only_where_it_can_do_without(export) -> None:
    for file in RUNTIME.glob("*.py"):
        if file.name != "__init__.py":
            assert (export / file.name).read_bytes() == file.read_bytes()
    for file in export.glob("*.py"):
        assert "surgery" not in get_imports(str(file)), file.name  # transformers' own reading: outside of any `try`
    config = json.loads((export / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_surgery_llama.SurgeryLlamaConfig",
        "AutoModel": "modeling_surgery_llama.SurgeryLlamaModel",
        "AutoModelForCausalLM": "modeling_surgery_llama.SurgeryLlamaForCausalLM",
    }
    assert config["architectures"] == ["SurgeryLlamaForCausalLM"]
    assert config["surgery"]["min_transformers"] == "5.16"


def test_no_path_of_this_machine_leaves_with_the_export(export, child) -> None:
    assert str(child.parent) in (child / "surgery.json").read_text()
    for file in export.iterdir():
        if file.suffix in (".json", ".md", ".py", ".yaml"):
            assert str(child.parent) not in file.read_text(), file.name
    assert json.loads((export / "surgery.json").read_text())["parent"] == "parent"


AGAIN = """
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.generation import CompileConfig
folder, again, ids = sys.argv[1], sys.argv[2], torch.arange(3, 13)[None]
found = {}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert type(base).__name__ == "SurgeryLlamaModel"
model.save_pretrained(again)
second = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
with torch.no_grad():
    found["logits"], found["again"] = model(ids).logits, second(ids).logits
    found["base"] = model.lm_head(base(ids).last_hidden_state)
compiled = CompileConfig(backend="eager", fullgraph=True, mode=None, dynamic=False)
compiled._compile_all_devices = True
greedy = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
found["plain"] = model.generate(ids, **greedy)
found["compiled"] = model.generate(ids, cache_implementation="static", compile_config=compiled, **greedy)
save_file({name: tensor.contiguous() for name, tensor in found.items()}, sys.argv[3])
"""


def test_the_loaded_model_compiles_and_can_be_saved_again_with_its_code(export, child, bare, tmp_path) -> None:
    again, answers = tmp_path / "again", tmp_path / "answers"
    run_bare(bare, AGAIN, export, again, answers, modules=tmp_path / "modules")
    got = load_file(answers)
    with torch.no_grad():
        want = surgery.load(child)(torch.arange(3, 13)[None]).logits
    for name in ("logits", "again", "base"):
        assert torch.equal(got[name], want), name
    assert torch.equal(got["compiled"], got["plain"])
    config = json.loads((again / "config.json").read_text())
    assert config["auto_map"] == json.loads((export / "config.json").read_text())["auto_map"]
    needed = {file.name for file in export.glob("*.py")}
    assert {file.name for file in again.glob("*.py")} == needed


KERNELS = """
import sys, torch
from transformers import AutoModelForCausalLM
ids, made = torch.arange(3, 13)[None], []
for attention in ("sdpa", "surgery"):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, attn_implementation=attention)
    assert type(model).__module__.startswith("transformers_modules.")
    made.append(model.eval().generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False))
assert "surgery.kernels.decode_latent" in sys.modules and torch.equal(*made)
"""


def test_an_export_decodes_by_the_kernels_where_they_are_installed(export, tmp_path) -> None:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KERNELS, str(export)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_export_loads_here_too_and_is_saved_as_any_conversion(export, child, tmp_path) -> None:
    model = surgery.load(export)
    with torch.no_grad():
        assert torch.equal(model(windows()).logits, surgery.load(child)(windows()).logits)
    surgery.save(model, tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not (tmp_path / "saved" / "export.json").exists()


def test_a_model_of_the_parents_own_class_needs_no_code(tmp_path) -> None:
    model = surgery.convert(tiny_model("llama"), "gqa-2x")
    report = surgery.export(model, tmp_path / "out", to="hub")
    assert report.architecture == "LlamaForCausalLM" and report.facts["code"] == {}
    assert report.parity.logit_difference == 0.0
    assert verify(tmp_path / "out") == []
    assert "trust_remote_code" not in (tmp_path / "out" / "README.md").read_text()


def test_a_large_checkpoint_is_compared_layer_by_layer_from_disk(child, tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(hub, "LARGE", 0)
    monkeypatch.setattr(hub, "answers_alone", lambda *a, **k: asked.append(k) or parity.answers_alone(*a, **k))
    report = surgery.export(child, tmp_path / "out", to="hub", link=True)
    assert asked == [{"auto": "AutoModelForCausalLM", "trust_remote_code": True, "device_map": {"": "disk"}}]
    assert report.parity.logit_difference == 0.0
    assert (tmp_path / "out" / "model.safetensors").samefile(child / "model.safetensors")


def test_what_is_no_conversion_is_refused(tmp_path) -> None:
    with pytest.raises(PlanError, match="was not converted"):
        surgery.export(tiny_model("llama"), tmp_path / "out", to="hub")
    with pytest.raises(PlanError, match=r"no option 'nrom'. It has link"):
        surgery.export(tiny_model("llama"), tmp_path / "out", to="hub", nrom=1)
    model = converted("identity", "llama")
    model.config.surgery["parent"]["architecture"] = "LlamaOfTheFuture"
    with pytest.raises(PlanError, match="no LlamaOfTheFuture"):
        surgery.export(model, tmp_path / "out", to="hub")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_cut_short_is_refused_before_anything_is_written(child, tmp_path) -> None:
    source = Path(shutil.copytree(child, tmp_path / "child"))
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cut short"):
        surgery.export(source, tmp_path / "out", to="hub")
    assert not (tmp_path / "out").exists()


def test_a_model_that_answers_otherwise_when_loaded_again_is_not_exported(child, tmp_path, monkeypatch) -> None:
    model = surgery.load(child)
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()  # what no config says

    def loaded(folder: Path, ask: parity.Ask, **_: object) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        said = {"class": "SurgeryLlamaForCausalLM", "transformers": "5"}
        return parity.answers_of(surgery.load(folder), ask), said

    monkeypatch.setattr(hub, "answers_alone", loaded)
    with pytest.raises(CheckpointError, match=r"differ from the source's by .* Nothing was written"):
        surgery.export(model, tmp_path / "out", to="hub")
    model.model.layers[0].mlp.act_fn = torch.nn.SiLU()
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(CheckpointError, match="NaN or inf"):
        surgery.export(model, tmp_path / "out", to="hub")
    assert list(tmp_path.iterdir()) == []


def test_code_that_does_not_run_is_not_exported(child, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(remote_code, "_MODELING", "from .modeling import Nothing  # {parent}")
    with pytest.raises(CheckpointError, match="does not run without surgery"):
        surgery.export(child, tmp_path / "out", to="hub")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing_and_spares_what_was_there(child, tmp_path, monkeypatch, call) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "answers_alone", interrupted)
    code, _, err = call("export", child, "--to", "hub", "-o", tmp_path / "out")
    assert code == 130 and err.splitlines()[-1] == "Interrupted. Nothing was written."
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("old")
    assert call("export", child, "--to", "hub", "-o", tmp_path / "out", "--overwrite")[0] == 130
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "mine"]


TAMPERED = [
    ("latent.py", lambda file: file.write_text(file.read_text() + "\nimport os\n"), "latent.py: changed since"),
    ("heads.py", lambda file: file.unlink(), "heads.py: this code file is missing"),
    ("more.py", lambda file: file.write_text("import os\n"), "more.py: no export wrote this code file"),
    ("sub/more.py", lambda file: (file.parent.mkdir(), file.write_text("")), "more.py: no export wrote"),
    ("weights.bin", lambda file: file.write_bytes(b"\x80\x04."), "weights.bin: a pickle"),
    ("config.json", lambda file: file.write_text(file.read_text().replace("modeling_surgery", "x/y--evil")),
     "AutoModel is x/y--evil_llama.SurgeryLlamaModel, code that no export wrote"),
    ("export.json", lambda file: file.unlink(), "has no export.json"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tamper", "said"), TAMPERED, ids=[name for name, _, _ in TAMPERED])
def test_tampering_is_named_and_not_uploaded(name, tamper, said, copy, call) -> None:
    assert call("verify", copy)[0] == 0
    tamper(copy / name)
    for command in (("verify", copy), ("push", copy, "me/model", "--dry-run")):
        code, _, err = call(*command)
        assert code == 2 and said in err and err.count("\n") == 1


def numbers_in(value: object) -> list[str]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers_in(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers_in(v)]
    return [json.dumps(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def rendered(card: str) -> str:
    """The card as a web page shows it, tables and details included; its front matter is no part of it."""
    return MarkdownIt("commonmark").enable("table").render(card.split("---\n", 2)[2])


def test_the_card_holds_every_number_of_the_evaluation_and_renders(export) -> None:
    page = rendered((export / "README.md").read_text())
    text = re.sub(r"<[^>]+>", " ", page)
    numbers = numbers_in(made_up().to_dict())
    assert len(numbers) > 100
    shown = set(re.findall(r"-?\d[\d.e+-]*", text))
    assert {n for n in numbers if n not in shown} == set()
    assert page.count("<table>") >= 4  # layers, quality, recall, memory and speed
    for row in made_up().to_markdown().splitlines():  # and people find them in tables
        for cell in row.strip("| ").split(" | ") if row.startswith("| gqa-2x") else ():
            assert f">{cell.strip()}</t" in page, cell
    pictures = re.findall(r'<img src="([^"]+)"', page)
    assert len(pictures) == 4
    assert all((export / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert "|---" not in text and "{" not in page.split("<details>")[0]


def test_the_card_has_the_parents_licence_and_the_recipe(export, child, tmp_path) -> None:
    card = (export / "README.md").read_text()
    fields = yaml.safe_load(card.split("---\n")[1])
    assert fields["license"] == "llama3" and fields["license_name"] == "some-terms"
    assert fields["language"] == ["en", "de"]
    assert "base_model" not in fields  # the parent is a folder here; its own parent is another model
    assert fields["tags"] == ["custom_code", "kv-cache", "surgery"]
    assert (export / "LICENSE").read_text() == "terms"
    recipe = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == yaml.safe_load((export / "recipe.yaml").read_text())
    assert "trust_remote_code=True" in card
    options = CardOptions.of(base_model="meta/llama", license="mit")
    source = Source(child)
    write_card(tmp_path, "x", source, Written(architecture="x"), Parity(**PARITY), options)
    fields = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert (fields["base_model"], fields["license"]) == ("meta/llama", "mit")
    assert "license_name" not in fields


PARITY = {"engine": "e 1", "logit_difference": 0.0, "relative_difference": 0.0, "equal_greedy_tokens": 1,
          "greedy_tokens": 1}  # fmt: skip


def test_what_people_write_into_the_card_stays_when_the_export_is_made_again(export, child, tmp_path) -> None:
    old = (export / "README.md").read_text()
    edited = old.replace("license: llama3", "license: mit").replace("# out", "# nonsense")
    edited = edited.replace(BEGIN, f"By me, before.\n\n{BEGIN}") + "\n## My notes\n\nBy me, after.\n"

    def again(card: str) -> str:
        write_card(tmp_path, "new", Source(child), Written(architecture="x"), Parity(**PARITY), CardOptions(), card)
        return (tmp_path / "README.md").read_text()

    once = again(edited)
    assert once.index("By me, before.") < once.index(BEGIN) < once.index("# new") < once.index("By me, after.")
    assert "license: mit" in once and "nonsense" not in once
    assert again(once) == once
    assert again("Only mine, without marks.\n").endswith("Only mine, without marks.\n")
    with pytest.raises(CheckpointError, match="front matter is no YAML"):
        again("---\n a: [\n---\n")


def test_the_parent_on_the_hub_is_named_by_its_id_and_revision(tmp_path) -> None:
    cached = "/home/me/.cache/huggingface/hub/models--meta--llama/snapshots/0123"
    model = converted("identity", "llama")
    for name, revision, id_ in (
        (cached, None, "meta/llama"),
        ("meta/llama", "0123", "meta/llama"),
        ("meta/llama", None, None),  # a relative path
        ("/home/me/models/llama", None, None),
    ):
        model.config.surgery["provenance"] = {"parent": name, "parent_revision": revision}
        source = Source(model)
        assert (source.parent_id, source.parent) == (id_, id_ or "llama")
    model.config.surgery["provenance"] = {"parent": "meta/llama", "parent_revision": "0123"}
    write_card(tmp_path, "x", Source(model), Written(architecture="x"), Parity(**PARITY), CardOptions(license="mit"))
    card = (tmp_path / "README.md").read_text()
    assert "[meta/llama](https://huggingface.co/meta/llama) at revision `0123`" in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "meta/llama"


def test_a_dry_run_shows_files_sizes_sum_and_card_and_asks_nobody(export, call, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    code, out, _ = call("push", export, "me/model", "--private", "--dry-run")
    assert code == 0
    total = sum(file.stat().st_size for file in export.rglob("*") if file.is_file())
    count = sum(file.is_file() for file in export.rglob("*"))
    assert f"{count} files, {human_bytes(total)}, would be uploaded to private me/model" in " ".join(out.split())
    for name in ("model.safetensors", "modeling_surgery_llama.py", "plots/quality.png"):
        assert name in out
    assert (export / "README.md").read_text().split("\n\n")[0] in out
    assert "by [surgery](https://pypi.org" in " ".join(out.split())  # as it is, not as markup of the terminal
