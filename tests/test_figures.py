"""The figures of README and documentation agree with the committed records and artifacts."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import figures  # noqa: E402
from plots import THEMES  # noqa: E402


def parts(svg):
    """What is written in a figure, and every number of its shapes."""
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    numbers = [
        float(one) for shape in re.findall(r' d="([^"]*)"', svg) for one in re.findall(r"-?[\d.]+", shape)
    ]
    return texts, numbers


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", figures.DRAWN)
def test_a_committed_figure_is_what_the_records_give(name, theme, tmp_path):
    file = tmp_path / "figure.svg"
    figures.DRAWN[name](THEMES[theme]).save(str(file))
    drawn, committed = (
        parts(each.read_text(encoding="utf-8")) for each in (file, figures.FIGURES / f"{name}-{theme}.svg")
    )
    assert drawn[0] == committed[0], f"python benchmarks/figures.py {name}"
    assert drawn[1] == pytest.approx(committed[1], abs=1.0), f"python benchmarks/figures.py {name}"


def test_every_figure_is_shown_and_every_shown_figure_is_drawn():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {
        name
        for page in pages
        for name in re.findall(r"figures/([\w-]+)-(?:light|dark)\.svg", page.read_text(encoding="utf-8"))
    }
    assert shown == set(figures.DRAWN)


def test_a_name_that_is_no_figure_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["figures.py", "no-such", "--output", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as stop:
        figures.main()
    assert stop.value.code == 2
    assert "no figure 'no-such'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
