"""Check the style of the documentation. `make lint` runs it.

    python docs/style.py [FILE ...]

- No line of prose is longer than 120 characters, in Markdown, docstrings and comments.
- README, start page and guides have no sentence of more than 35 words, docstrings and comments none of more than 40.
- The field's terms are used.
- proselint finds nothing, where it is installed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONGEST_LINE = 120
LONGEST_SENTENCE = 35
LONGEST_IN_CODE = 40
#: Terms to avoid, and what to write instead.
TERMS = {
    r"\bforeign tokens?\b": "vocabulary samples",
    r"\bsweeps? over the coordinates\b": "refinement pass",
    r"\bnobody's business\b": "say what happens",
    r"\bdivergence over that\b": "KL divergence relative to the baseline recipe",
    r"\bper cent\b": "%",
}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
#: Checks of proselint that do not suit plain text and formulas.
OFF = ("typography", "lexical_illusions", "dates_times", "misc.phrasal_adjectives", "misc.but")


def pages() -> list[Path]:
    """All pages of documentation."""
    own = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")]
    return [*own, *sorted((ROOT / "docs").rglob("*.md"))]


def sources() -> list[Path]:
    """All source files."""
    folders = ("kvq_calib", "benchmarks", "kernels", "tests", "docs", "examples")
    kinds = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
    return sorted(file for folder in folders for kind in kinds for file in (ROOT / folder).rglob(kind))


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The lines of prose in Markdown, numbered from 1: without code, tables and HTML."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not (
            fenced or line.startswith(("    ", "|", "<", "#")) or ("](" in line and len(line.split()) < 4)
        ):
            yield number, line


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Sentences, with the line on which they begin. A list item or a blank line ends a sentence."""
    start, words = 0, []
    for number, line in [*prose(text), (0, "")]:
        line = re.sub(r"`[^`]*`", "code", re.sub(r"\]\([^)]*\)", "]", line))
        if not line.strip() or re.match(r"\s*([-*]|\d+\.)\s", line):
            yield from ((start, " ".join(words)),) if words else ()
            words = []
        for word in re.sub(r"^\s*([-*]|\d+\.)\s", "", line).split():
            start = start if words else number
            words.append(word)
            if re.search(r"[.!?:;][)*\"]*$", word) and not re.search(r"\b(e\.g|i\.e|vs|al)\.$", word):
                yield start, " ".join(words)
                words = []


def _is_prose_of_code(line: str, inside: bool) -> bool:
    return inside or line.lstrip().startswith(("#", "//", "*", '"""'))


def as_prose(file: Path) -> str:
    """Docstrings and whole-line comments of a source file, on their lines; all other lines are empty."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    kept = {number: line for number, line in enumerate(lines, 1) if line.lstrip().startswith(("#", "//"))}
    if file.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, _DOCUMENTED) and ast.get_docstring(node):
                place = node.body[0]
                kept.update({n: lines[n - 1] for n in range(place.lineno, place.end_lineno + 1)})
    prose_lines, tables = [], 0
    for number in range(1, len(lines) + 1):
        line = re.sub(r'^(#:?|//|r?""")\s?|"""$', "", kept.get(number, "").strip())
        tables += line.startswith("====")  # a table has three such lines
        prose_lines.append("" if "---" in line or tables % 3 else line)
    return "\n".join(prose_lines)


def long_lines(file: Path) -> Iterator[str]:
    """Problems: lines of prose that are too long."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        lines = [(number, line) for number, line in prose(text) if not line.startswith("!")]
    else:
        inside, lines = False, []
        for number, line in enumerate(text.splitlines(), 1):
            if _is_prose_of_code(line, inside) and "://" not in line:
                lines.append((number, line))
            if line.count('"""') == 1:
                inside = not inside
    for number, line in lines:
        if len(line) > LONGEST_LINE:
            yield f"{file}:{number}: {len(line)} characters, more than {LONGEST_LINE}"


def long_sentences(file: Path) -> Iterator[str]:
    """Problems: sentences that are too long."""
    text, most = as_prose(file), LONGEST_IN_CODE
    if file.suffix == ".md":
        text, most = file.read_text(encoding="utf-8"), LONGEST_SENTENCE
    for number, sentence in sentences(text):
        if (count := len(sentence.split())) > most:
            yield f"{file}:{number}: a sentence of {count} words, more than {most}: {sentence[:60]}..."


def wrong_terms(file: Path) -> Iterator[str]:
    """Problems: unusual terms, where the field has one."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        for pattern, better in TERMS.items():
            if found := re.search(pattern, line, re.IGNORECASE):
                yield f"{file}:{number}: write {better!r}, not {found[0]!r}"


def proselint(files: list[Path]) -> Iterator[str]:
    """Problems that proselint finds in the prose of pages, without code and tables."""
    if importlib.util.find_spec("proselint") is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.json"
        settings.write_text(json.dumps({"checks": dict.fromkeys(OFF, False)}), encoding="utf-8")
        copies = {}
        for number, file in enumerate(files):
            kept = dict(prose(file.read_text(encoding="utf-8")))
            copy = Path(folder) / f"{number}.md"
            lines = [
                re.sub(r"`[^`]*`", "code", kept.get(line, "")) for line in range(1, max(kept, default=0) + 1)
            ]
            copy.write_text("\n".join(lines) + "\n", encoding="utf-8")
            copies[str(copy)] = file
        command = [sys.executable, "-m", "proselint", "--config", str(settings), "check", *copies]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    for line in found.splitlines():
        for copy, file in copies.items():
            if line.startswith(f"{copy}:") and not any(f" {check}" in line for check in OFF):
                yield line.replace(copy, str(file), 1)


def problems(files: list[Path]) -> Iterator[str]:
    """All problems of pages and sources."""
    guides = [ROOT / "README.md", ROOT / "docs" / "index.md", *(ROOT / "docs" / "guides").glob("*.md")]
    for file in files:
        yield from long_lines(file)
        if file.suffix == ".md":
            yield from wrong_terms(file)
        if file in guides or file.suffix != ".md":
            yield from long_sentences(file)
    yield from proselint([file for file in files if file.suffix == ".md"])


def main() -> int:
    """Print all problems. The status is 1 if there are any."""
    found = list(problems([Path(name).resolve() for name in sys.argv[1:]] or [*pages(), *sources()]))
    for line in found:
        print(line.replace(f"{ROOT}/", ""))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
