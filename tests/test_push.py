"""An export goes to the Hub whole, in one commit, or not at all: the real client against a Hub in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import tiny_model
from hub_server import Hub, Repo
from huggingface_hub import HfApi, snapshot_download

import surgery
from surgery.errors import CheckpointError
from surgery.export import hub as hub_target
from surgery.export.push import push
from surgery.export.remote_code import digests, verify
from surgery.export.target import Source

SHARE = {"rewriter": "share", "layout": "cla2", "init": "replace", "gain_fit": False, "refit_queries": False,
         "refit_output": False}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # of the client, about its HTTP library


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """What `--to hub` writes, but for the check that it runs."""
    folder = tmp_path_factory.mktemp("export")
    hub_target.Hub().write(Source(surgery.convert(tiny_model("llama"), {"steps": [SHARE]})), folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    (folder / "export.json").write_text(json.dumps({"facts": {"code": digests(folder)}}))
    return folder


@pytest.fixture(scope="module")
def in_shards(export, tmp_path_factory) -> Path:
    """The same with several files of weights in the place of one."""
    folder = Path(shutil.copytree(export, tmp_path_factory.mktemp("shards") / "export"))
    (folder / "model.safetensors").unlink()
    saved = tmp_path_factory.mktemp("saved")
    surgery.load(export).save_pretrained(saved, max_shard_size="20KB")
    for file in saved.glob("model*"):
        shutil.copyfile(file, folder / file.name)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(export, tmp_path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "copy"))


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    # By xet the client uploads to a store of its own; what is committed, and when, is the same.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    with Hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_repository_gets_all_in_one_commit_and_gives_it_back(hub, folder, call, tmp_path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    code, out, err = call("push", folder, "me/model", "--private")
    assert code == 0, err
    repo = hub.repos["me/model"]
    assert repo.private and len(repo.commits) == 2
    assert f"{hub.url}/me/model/commit/{repo.sha}" in out
    (folder / ".git" / "config").unlink()
    assert {name: data for name, data in repo.files.items() if name != ".gitattributes"} == contents(folder)
    fetched = Path(snapshot_download("me/model", cache_dir=tmp_path / "cache"))
    assert verify(fetched) == verify(folder)
    model, same = surgery.load(fetched), surgery.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))


def test_an_update_leaves_no_weights_nor_code_of_the_export_before(hub, folder, in_shards) -> None:
    push(folder, "me/model")
    mine = {"notes.md": b"by hand", "plots/config.json": b"{}", "tokenizer.json": b"{}"}
    hub.repos["me/model"].commits.append({**hub.repos["me/model"].files, **mine, "old_code.py": b""})
    done = push(in_shards, "me/model")
    # Loaders would have read the former `model.safetensors` in the place of the new shards.
    assert done.removed == ("model.safetensors", "old_code.py")
    assert any("model.safetensors " in line and "removed" in line for line in done.lines())
    repo = hub.repos["me/model"]
    assert len(repo.commits) == 4
    assert repo.files == {**contents(in_shards), **mine, ".gitattributes": repo.files[".gitattributes"]}


def test_files_that_the_repository_ignores_are_uploaded_all_the_same(hub, folder) -> None:
    hub.repos["me/model"] = Repo(private=False)
    hub.repos["me/model"].files[".gitignore"] = b"*.safetensors\n*.json\n"
    push(folder, "me/model")
    assert contents(folder).keys() <= hub.repos["me/model"].files.keys()


def test_what_is_to_be_private_does_not_go_into_a_public_repository(hub, folder, call) -> None:
    hub.repos |= {"me/public": Repo(private=False), "me/private": Repo(private=True)}
    code, _, err = call("push", folder, "me/public", "--private")
    assert code == 2 and "me/public is there already, and public" in err and err.count("Nothing was published") == 1
    assert len(hub.repos["me/public"].commits) == 1 and not hub.objects
    assert push(folder, "me/private").private  # whatever was asked for, the report says what is so


@pytest.mark.parametrize("repo_id", ["them/model", "me/read-only"])
def test_without_permission_there_is_one_line_and_nothing_changes(repo_id, hub, folder, call) -> None:
    hub.repos["me/read-only"] = Repo(private=False, writable=False)
    code, _, err = call("push", folder, repo_id)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith(f"CheckpointError: {repo_id}: the Hub says: 403") and "don't have the rights" in err
    assert "Nothing was published" in err
    assert "them/model" not in hub.repos and len(hub.repos["me/read-only"].commits) == 1 and not hub.objects


@pytest.mark.parametrize(
    "broken", ["POST /api/repos/create", "/preupload/", "/objects/batch", "PUT /objects", "/commit/"]
)
@pytest.mark.parametrize("known", [False, True], ids=["new", "update"])
def test_a_connection_that_breaks_publishes_nothing(broken, known, hub, folder, in_shards) -> None:
    if known:
        push(folder, "me/model")
    before = dict(hub.repos["me/model"].files) if known else {".gitattributes": b"*.safetensors lfs\n"}
    hub.break_at = lambda request: broken in request
    with pytest.raises(CheckpointError, match="^me/model: the Hub says: .* Nothing was published") as caught:
        push(in_shards, "me/model")
    assert "\n" not in str(caught.value)
    if "me/model" in hub.repos:
        assert hub.repos["me/model"].files == before
    hub.break_at = lambda request: False
    push(in_shards, "me/model")  # the same again goes through
    assert contents(in_shards).items() <= hub.repos["me/model"].files.items()


def test_a_commit_whose_answer_is_lost_is_not_called_a_failure_to_publish(hub, folder) -> None:
    hub.break_after = lambda request: "/commit/" in request
    with pytest.raises(CheckpointError, match="The repository is at commit .* now, not at .*: look whether that is"):
        push(folder, "me/model")
    hub.repos.clear()
    hub.break_at = lambda request: request.startswith("GET") and any("/commit/" in asked for asked in hub.asked)
    hub.asked.clear()
    with pytest.raises(CheckpointError, match="Whether the commit arrived is not known"):
        push(folder, "me/model")


def test_two_who_push_at_once_do_not_mix_their_files(hub, folder, monkeypatch) -> None:
    upload = HfApi.preupload_lfs_files

    def meanwhile(self, repo_id, *arguments, **options):
        hub.repos[repo_id].commits.append({**hub.repos[repo_id].files, "model.safetensors": b"theirs"})
        return upload(self, repo_id, *arguments, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    with pytest.raises(CheckpointError, match="A commit has happened since"):
        push(folder, "me/model")
    assert hub.repos["me/model"].files["model.safetensors"] == b"theirs"


def test_changed_code_is_refused_before_anybody_is_asked(hub, folder, call) -> None:
    (folder / "attention.py").write_text("import os\n")
    code, _, err = call("push", folder, "me/model")
    assert code == 2 and "attention.py: changed since the export (sha256" in err
    assert hub.asked == []


def test_a_hub_that_cannot_be_reached_is_one_line(hub, folder, call, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    code, _, err = call("push", folder, "me/model")
    assert code == 2 and err.startswith("CheckpointError: me/model: the Hub says:") and err.count("\n") == 1
    code, _, err = call("push", folder, "not an id")
    assert code == 2 and "is no repository id" in err and err.count("\n") == 1
