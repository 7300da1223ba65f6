"""Additions to the pages of ``docs/`` on the site: linked files, commands, and settings.

Pages link to files elsewhere in the repository (``../benchmarks/results/fit.md``), which works when the repository is
browsed. Here each such file becomes a part of the site under ``repository/``, Markdown as a page, and links are
adapted. A link to a missing file is left unchanged, and the strict build refuses it.
"""

from __future__ import annotations

import json
import posixpath
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DOCS = "docs"
OUTSIDE = "repository"
#: Files in the navigation that no page links to.
_ALWAYS = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"),
    *(f"configs/{file.name}" for file in sorted((ROOT / "configs").glob("*.yaml"))),
)
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")


def _place(path: str) -> str:
    """The place of a repository file on the site."""
    return path.removeprefix(f"{DOCS}/") if path.startswith(f"{DOCS}/") else f"{OUTSIDE}/{path}"


def _origin(page: str) -> str:
    """The repository file of a page on the site."""
    return page.removeprefix(f"{OUTSIDE}/") if page.startswith(f"{OUTSIDE}/") else f"{DOCS}/{page}"


def _targets(path: str, text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Links from a file to other files of the repository."""
    for link in _LINK.finditer(text):
        if "://" not in link[1] and not link[1].startswith(("mailto:", "/")):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
            if (ROOT / target).is_file():
                yield link, target


def on_files(files: Files, config: Any) -> Files:
    """Add every file that a page links to, and the files that those link to."""
    waiting = [_origin(file.src_uri) for file in files.documentation_pages()] + list(_ALWAYS)
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith(f"{DOCS}/"):
            files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
        if not path.endswith(".md"):
            continue
        for _, target in _targets(path, (ROOT / path).read_text(encoding="utf-8")):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Adapt links to the site, and insert commands and settings where a page asks for them."""
    here = page.file.src_uri
    text, last = [], 0
    for link, target in _targets(_origin(here), markdown):
        place = posixpath.relpath(_place(target), posixpath.dirname(here) or ".")
        text += [markdown[last : link.start(1)], place]
        last = link.end(1)
    markdown = "".join([*text, markdown[last:]])
    for name, write in (("commands", _commands), ("settings", _settings), ("recipes", _recipes)):
        mark = f"<!-- {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, "\n".join(write()))
    return markdown


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Replace Sphinx roles in docstrings by the name, because Markdown does not support them."""
    return re.sub(
        r":(?:class|func|meth|mod|data|attr):<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html
    )


def _cell(text: str) -> str:
    return " ".join(re.sub(r"([|\[\]])", r"\\\1", text).split())


# ---------------------------------------------------------------------------------------------- commands


def _commands() -> Iterator[str]:
    from kvq_calib.cli.artifact import artifact_group
    from kvq_calib.cli.calibrate import calibrate_command
    from kvq_calib.cli.evaluate.group import eval_group

    yield from _command("kvq-calibrate", calibrate_command, "##")
    for group in (eval_group, artifact_group):
        yield from (f"## {group.name}", "", group.help or "", "")
        for name, command in group.commands.items():
            yield from _command(f"{group.name} {name}", command, "###")


def _command(name: str, command: click.Command, level: str) -> Iterator[str]:
    from kvq_calib.cli.help import sections_of

    context = click.Context(command, info_name=name)
    yield from (f"{level} {name}", "", *(line.strip() for line in (command.help or "").splitlines()), "")
    yield from ("```", " ".join([name, *command.collect_usage_pieces(context)]), "```", "")
    for title, options in sections_of(command, context).items():
        yield from (f"| {title} | |", "|---|---|")
        for option in options:
            if record := option.get_help_record(context):
                yield f"| <code>{record[0].replace('|', '&#124;')}</code> | {_cell(record[1])} |"
        yield ""
    yield from ("```sh", *getattr(command, "examples", ()), "```", "")


# ---------------------------------------------------------------------------------------------- settings


def _settings() -> Iterator[str]:
    from kvq_calib.schema import recipe, spec

    sections = [
        ("", recipe.CalibrationConfig),
        ("cache", spec.KVCacheSpec),
        ("cache.key, cache.value, with the scalar codec", spec.ScalarSpec),
        ("cache.key.outliers, cache.value.outliers", spec.OutlierSpec),
        ("cache.key, cache.value, with the trellis codec", spec.TrellisSpec),
        ("cache.key.error_compensation", spec.ErrorCompensationSpec),
        ("fit", recipe.FitConfig),
        ("allocation", recipe.AllocationConfig),
        ("learn", recipe.LearnConfig),
    ]
    for path, model in sections:
        about = _attributes(model)
        yield from (
            f"### {path}" if path else "### Of the whole run",
            "",
            (model.__doc__ or "").split("\n")[0],
            "",
        )
        yield from ("| key | takes | default | |", "|---|---|---|---|")
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else _default(field)
            yield f"| `{name}` | {_cell(_takes(field))} | {_cell(default)} | {_cell(about[name])} |"
        yield ""


def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """Descriptions of attributes in the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        part = (cls.__doc__ or "").partition("Attributes:\n")[2]
        for names, text in re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", part, re.MULTILINE):
            found |= {
                name.strip(): re.sub(r":\w+:`", "`", text.replace("``", "`")) for name in names.split(",")
            }
    return found


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


def _takes(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {limit}"
        for rule in field.metadata
        for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if (limit := getattr(rule, attribute, None)) is not None
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type, arguments)))
    if annotation is type(None):
        return "`null`"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    names = {int: "an integer", float: "a number", str: "text", bool: "`true`, `false`"}
    return names.get(annotation, "sections by layer" if origin is not None else str(annotation))


def _recipes() -> Iterator[str]:
    from kvq_calib.schema.recipe import read_recipe, recipe_names

    yield from ("| recipe | |", "|---|---|")
    for name in recipe_names():
        yield f"| [`{name}`](../{OUTSIDE}/configs/{name}.yaml) | {_cell(read_recipe(name)['description'])} |"
