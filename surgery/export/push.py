"""Upload an export to the Hugging Face Hub in one commit, after its code was checked against its digests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..console import human_bytes
from ..errors import CheckpointError
from .card import CARD
from .remote_code import verify

LOADED = (".safetensors", ".safetensors.index.json", "config.json", ".py")
"""Ends of names of what a loader takes from the root of a repository, whether the newest export wrote it or not."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What goes where."""

    folder: Path
    repo_id: str
    private: bool
    files: tuple[tuple[str, int], ...]
    """Path below `folder`, bytes."""
    removed: tuple[str, ...] = ()
    """Files of an earlier export that this one has none of, which loaders would have read beside it."""
    url: str | None = None
    """Of the commit; None for a dry run."""

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(size for _, size in self.files)

    @property
    def card(self) -> str:
        """The model card."""
        return (self.folder / CARD).read_text(encoding="utf-8")

    def lines(self) -> list[str]:
        """What a terminal shows: every file, the sum, the place."""
        kind = "private" if self.private else "public"
        width = max(len(name) for name, _ in self.files)
        done = "would be uploaded to" if self.url is None else "uploaded to"
        return [
            *(f"{name:<{width}}  {human_bytes(size):>10}" for name, size in self.files),
            *(f"{name:<{width}}  {'removed':>10}" for name in self.removed),
            f"{len(self.files)} files, {human_bytes(self.bytes)}, {done} {kind} {self.repo_id}",
            *([] if self.url is None else [self.url]),
        ]


def push(folder: str | Path, repo_id: str, *, private: bool = False, dry_run: bool = False) -> Upload:
    """Upload an export, making the repository where there is none: all of it in one commit, or nothing.

    Of what is in the repository already, weights, configs and code at its root that this export does not have are
    removed in the same commit (loaders take one `model.safetensors` before any shards); all else stays.

    Args:
        folder: what `export` wrote.
        repo_id: `owner/name`.
        private: a new repository is to be private; one that is there must be so already.
        dry_run: only say what would be uploaded; asks nobody, works offline.

    Raises:
        CheckpointError: no export, code that is not what the export wrote (see `verify`), no repository id, or what the
            Hub's client says: no permission, no network, somebody else's commit in between. Says what is published.
    """
    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is no repository id: {error}") from None
    verify(folder)
    if not (folder / CARD).is_file():
        raise CheckpointError(f"{folder}: has no {CARD}. Export again, which writes one.")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    files = tuple((path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)
    removed: tuple[str, ...] = ()
    url = None
    if not dry_run:
        removed, private, url = _commit(folder, [name for name, _ in files], repo_id, private)
    return Upload(folder=folder, repo_id=repo_id, private=private, files=files, removed=removed, url=url)


def _commit(folder: Path, names: list[str], repo_id: str, private: bool) -> tuple[tuple[str, ...], bool, str]:
    """Upload files and commit them at once; the files removed, whether nobody else sees them, and the commit's URL.

    Not `upload_folder`, which may stream a large folder in several commits: a connection that breaks leaves some.
    """
    api, found = HfApi(library_name="surgery"), None
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        found = api.model_info(repo_id)
        if private and not found.private:
            raise CheckpointError(
                f"{repo_id} is there already, and public: --private is for new repositories. Nothing was published. "
                "Make it private in its settings, or leave --private out."
            )
        there = [file.rfilename for file in found.siblings or ()]
        loaded = "config.json" in names  # GGUF files may lie beside anything
        removed = tuple(sorted(n for n in there if loaded and "/" not in n and n.endswith(LOADED) and n not in names))
        # By the repository's own .gitignore, the client would leave files out and say nothing.
        api.preupload_lfs_files(repo_id, additions, gitignore_content="", free_memory=False)
        done = api.create_commit(
            repo_id, [*additions, *map(CommitOperationDelete, removed)], parent_commit=found.sha,
            commit_message="Upload an export of surgery",
        )  # fmt: skip
    except CheckpointError:
        raise
    except Exception as error:  # the client's own, and those of the HTTP library that its release uses
        raise CheckpointError(f"{repo_id}: {_said(error)} {_published(api, repo_id, found)}") from error
    return removed, bool(found.private), str(done.commit_url)


def _published(api: HfApi, repo_id: str, before: ModelInfo | None) -> str:
    """What an upload that ended in an error has changed: a commit may arrive, and the answer to it be lost."""
    if before is None:
        return "Nothing was published."
    try:
        now = api.model_info(repo_id).sha
    except Exception as error:  # as above
        return f"Whether the commit arrived is not known ({_said(error)}): look there, or run this again."
    if now == before.sha:
        return "Nothing was published: the repository is as it was. Run this again."
    return f"The repository is at commit {str(now)[:8]} now, not at {str(before.sha)[:8]}: look whether that is yours."


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _said(error: Exception) -> str:
    """The Hub's own words for what went wrong, in one line."""
    own = getattr(error, "server_message", None)
    text = " ".join(str(error).split()) or type(error).__name__
    said = text + (f" ({own})" if own and own not in text else "")
    return f"the Hub says: {said}" + ("" if said.endswith(".") else ".")
