"""Upload an export to the Hugging Face Hub, after its code was checked against its digests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..console import human_bytes
from ..errors import CheckpointError
from .card import CARD
from .remote_code import verify


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What goes where."""

    folder: Path
    repo_id: str
    private: bool
    files: tuple[tuple[str, int], ...]
    """Path below `folder`, bytes."""
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
            f"{len(self.files)} files, {human_bytes(self.bytes)}, {done} {kind} {self.repo_id}",
            *([] if self.url is None else [self.url]),
        ]


def push(folder: str | Path, repo_id: str, *, private: bool = False, dry_run: bool = False) -> Upload:
    """Upload an export, making the repository where there is none; existing files of other names stay there.

    Args:
        folder: what `export` wrote.
        repo_id: `owner/name`.
        dry_run: only say what would be uploaded; asks nobody, works offline.

    Raises:
        CheckpointError: no export, code that is not what the export wrote (see `verify`), no repository id, or what the
            Hub's client says: no permission, no network.
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
    url = None
    if not dry_run:
        api = HfApi(library_name="surgery")
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, allow_patterns=[name for name, _ in files],
                commit_message="Upload an export of surgery",
            )  # fmt: skip
        except Exception as error:  # the client's own, and those of the HTTP library that its release uses
            raise CheckpointError(f"{repo_id}: {_said(error)}") from error
        url = str(done.commit_url)
    return Upload(folder=folder, repo_id=repo_id, private=private, files=files, url=url)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _said(error: Exception) -> str:
    """The Hub's own words for what went wrong, in one line."""
    own = getattr(error, "server_message", None)
    text = " ".join(str(error).split()) or type(error).__name__
    return f"the Hub says: {text}" + (f" ({own})" if own and own not in text else "")
