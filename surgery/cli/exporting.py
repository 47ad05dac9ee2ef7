"""The commands `surgery export`, `verify` and `push`; options of `export` are the fields of the targets' classes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.text import Text

from ..console import show, write_json
from .verbs import Command

EXPORT_EXAMPLES = (
    "surgery export ./smaller --to hub -o ./for-the-hub",
    "surgery export ./latent --to native -o ./deepseek",
    "surgery export ./latent --to native --norm calibrated --pad --text text.jsonl -o ./deepseek",
    "surgery export ./shared --to vllm -o ./served",
    "surgery export ./smaller --to gguf -o ./for-llama-cpp",
)
VERIFY_EXAMPLES = ("surgery verify ./for-the-hub",)
PUSH_EXAMPLES = (
    "surgery push ./for-the-hub me/smaller --dry-run",
    "surgery push ./for-the-hub me/smaller --private",
)
_ADDED = "surgery.export: options of targets"


class ExportCommand(Command):
    """Takes the options of all targets that are registered when the command is run."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options that every target has, and those of each."""
        from ..planning.targets import TARGETS

        params: list[Any] = [*super().get_params(ctx)]
        for param in params:
            if param.name == "to":
                param.help = " ".join(f"{name}: {_first_line(name)}" for name in TARGETS)
        if _ADDED not in ctx.meta:  # the parser wants the same objects each time
            ctx.meta[_ADDED] = _target_params()
        return [*params, *ctx.meta[_ADDED]]

    def invoke(self, ctx: Any) -> Any:
        """Hand the options of targets to `export` as `ctx.obj`: its signature names none."""
        given = {param.name: ctx.params.pop(param.name, None) for param in ctx.meta.get(_ADDED, ())}
        ctx.obj = {name: value for name, value in given.items() if value is not None}
        return super().invoke(ctx)


def export(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a converted model.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write; must not exist, or be empty.")
    ],
    to: Annotated[str, typer.Option(metavar="TARGET", help="Name of the target.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="What surgery eval --json wrote, for the model card; may be given several times."
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Hub id of the parent, for the model card, where the parent's path does not say it."
        ),
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="NAME", help="Parent's license, for the model card, where its card does not say it."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that is not empty; keeps what you wrote in README.md.")
    ] = False,
) -> None:
    """Write a converted model for other software, load it there, and compare its answers with the source's."""
    from ..export import export as write

    report = write(
        model, out, to=to, overwrite=overwrite, results=results or (), base_model=base_model, license=license_,
        **context.obj,
    )  # fmt: skip
    show(*report.lines(), f"[bold]written to {out}[/bold]")
    write_json({**report.to_dict(), "written": str(out)})


def verify(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What surgery export wrote.")]) -> None:
    """Check the code files of an export against their digests, and that nothing else in it would run code."""
    from ..export.remote_code import verify as check

    names = check(folder)
    show(f"{len(names)} code files are as the export wrote them" if names else "no code files", *names)
    write_json({"code_files": names})


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What surgery export wrote.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="owner/name on the Hub; made where it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the files, their sizes and the card; needs no network.")
    ] = False,
) -> None:
    """Upload an export to the Hugging Face Hub, after checking its code files."""
    from ..export.push import push as upload

    done = upload(folder, repo_id, private=private, dry_run=dry_run)
    show(*map(Text, (*([done.card] if dry_run else []), *done.lines())))  # text, not markup: cards have brackets
    write_json({"repo_id": repo_id, "files": dict(done.files), "bytes": done.bytes, "url": done.url})


def _target_params() -> list[Any]:
    """One option for each name among the fields of the targets, as typer makes it of a function's arguments."""
    from ..planning.targets import option_fields, target_class

    arguments = []
    for name, owners in option_fields().items():
        target, field = owners[0]
        kind = field.metadata.get("type") or get_type_hints(target_class(target))[name]
        kind = kind if kind in (bool, int, float, Path) else str
        several: dict[str, list[str]] = {}
        for owner, other in owners:
            several.setdefault(str(other.metadata.get("help", "")), []).append(owner)
        text = " ".join(f"{', '.join(named)}: {said}" for said, named in several.items())
        flag = "--" + name.replace("_", "-")
        value = "FILE" if kind is Path else None
        option = typer.Option(flag, help=text, metavar=value, rich_help_panel="Options of targets")
        arguments.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None,
                annotation=Annotated[kind | None, option],
            )
        )  # fmt: skip

    def options(**_: Any) -> None: ...

    options.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]
    options.__annotations__ = {argument.name: argument.annotation for argument in arguments}
    app = typer.Typer(add_completion=False)
    app.command()(options)
    return list(typer.main.get_command(app).params)


def _first_line(target: str) -> str:
    from ..planning.targets import target_class

    return (inspect.getdoc(target_class(target)) or "").partition("\n")[0]
