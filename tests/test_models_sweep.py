"""benchmarks/models.py: its results for families with known outcome, and detection of faults."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from kvq_calib import KVQCache
from kvq_calib.errors import ModelError
from kvq_calib.model.probe import Serving

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("importable_benchmarks")]

needs_the_newest_transformers = pytest.mark.skipif(
    tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 24),
    reason="families came with newer versions",
)


@pytest.fixture
def models() -> Any:
    import models

    return models


@pytest.mark.parametrize(
    ("family", "outcome", "detail"),
    [
        ("llama", "works", "heads of 16"),
        ("opt", "works", "heads of 16, no RoPE"),
        ("gemma2", "works", "heads of 16, window 4096; heads of 16"),
        # In older versions, whose models of states have caches of their own, the latter.
        ("mamba", "none", "has no layer that caches keys and values|keeps no keys and values in a cache"),
        ("bert", "works", "heads of 16, no RoPE"),
        ("bloom", "materialized", "heads of 16, no RoPE"),
        ("no such family", "not small", "ValueError: "),
    ],
)
def test_what_is_found(models: Any, family: str, outcome: str, detail: str) -> None:
    found = models.examine(family)
    assert (found.family, found.outcome) == (family, outcome), found
    assert re.match(detail, found.detail), found


def test_a_family_that_would_generate_nonsense_is_a_fault(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the probe took everything, Doge would be calibrated, and fail or differ at its second pass."""
    monkeypatch.setattr("kvq_calib.model.inspect.probe_serving", lambda *_, **__: Serving())
    found = models.examine("doge")
    assert found.outcome in ("fails", "differs"), found
    assert found.is_fault


def test_other_ends_are_faults_too(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("unforeseen")

    def quantizing(artifact: Any, model: Any, **_: Any) -> Any:  # where everything should have stayed exact
        return KVQCache(artifact, model)

    for name, replacement, outcome in (
        ("calibrate", fail, "crash"),
        ("KVQCache", fail, "fails"),
        ("KVQCache", quantizing, "differs"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(models, name, replacement)
            found = models.examine("llama")
        assert found.outcome == outcome, found
        assert found.is_fault


def test_a_check_that_says_something_else_is_a_fault(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any) -> Any:
        raise ModelError("what it is not")

    monkeypatch.setattr(models, "check_configuration", refuse)
    found = models.examine("llama")
    assert (found.outcome, found.detail) == ("check", "works: refused")
    assert found.is_fault


def test_a_sweep_goes_on_from_its_findings(
    models: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    examined = []

    def examine(name: str, seconds: float) -> Any:
        examined.append(name)
        return models.Finding(name, "works", "")

    monkeypatch.setattr(models, "examined", examine)
    path = tmp_path / "findings"
    assert models.sweep(["llama", "opt"], path=path, minutes=-1) == []
    assert [each.family for each in models.sweep(["llama"], path=path)] == ["llama"]
    assert [each.family for each in models.sweep(["llama", "opt"], path=path)] == ["llama", "opt"]
    assert examined == ["llama", "opt"]


def test_a_process_of_its_own_ends_in_time(models: Any) -> None:
    models._serve()
    assert models.examined("llama").outcome == "works"
    slow = models.examined("llama", seconds=0.0)
    assert (slow.outcome, slow.detail) == ("slow", "more than 0 s")
    assert slow.is_fault


def finding(models: Any, family: str, outcome: str, detail: str, version: str) -> Any:
    versions = {"kvq-calib": "0.1.0", "torch": "2.13.0", "transformers": version}
    return models.Finding(family, outcome, detail, versions)


def test_the_page_counts_and_names_faults(models: Any) -> None:
    found = [
        finding(models, *each, "5.24.0")
        for each in (
            ("llama", "works", "heads of 16"),
            ("mamba", "none", "keeps none"),
            ("odd", "differs", "off by 1"),
            ("xlstm", "refused", "it <has> no | cache"),
        )
    ]
    older = [
        finding(models, *each, "5.2.0")
        for each in (
            ("gone", "works", "heads of 8"),
            ("llama", "works", "heads of 16"),
            ("mamba", "refused", "other code"),
            ("xlstm", "refused", "it has another"),
        )
    ]
    lines = models.page(older, found, "2026-01-02")
    text = " ".join(lines)
    assert (
        "Of 4 families in transformers 5.24.0, 1 attend to packed pages, 0 get their keys and values" in text
    )
    assert "Of 4 families in transformers 5.2.0, 2 attend to packed pages" in text
    assert "1 are refused" in text
    assert "judged otherwise by `--check`: 1." in text
    assert "2026-01-02 with kvq-calib 0.1.0, torch 2.13.0, and transformers 5.24.0 and 5.2.0" in text
    for row in (
        "| family | transformers 5.24.0 | transformers 5.2.0 |",
        "| `llama` | heads of 16 | the same |",
        "| `gone` | does not have it | heads of 8 |",
        "| `mamba` | keeps none | refused: other code |",
        "| `xlstm` | it &lt;has> no \\| cache | it has another |",
        "| `odd` | differs: off by 1 | does not have it |",
    ):
        assert row in lines, row
    assert "## Faults" in lines
    assert "## Faults" not in models.page(older, found[:2], "2026-01-02")
    assert "| `odd` | differs | off by 1 |" in models.lines_of(found)


def test_the_page_is_written_from_files_of_findings(
    models: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, version in (("old", "5.2.0"), ("new", "5.24.0")):
        line = json.dumps(dataclasses.asdict(finding(models, "llama", "works", "heads of 16", version)))
        (tmp_path / name).write_text(line + "\n")
    words = ["--page", str(tmp_path / "old"), str(tmp_path / "new"), "--output", str(tmp_path / "page.md")]
    monkeypatch.setattr(sys, "argv", ["models.py", *words])
    with pytest.raises(SystemExit) as ended:
        models.main()
    assert ended.value.code == 0
    assert "| `llama` | heads of 16 | the same |" in (tmp_path / "page.md").read_text()


def test_every_family_of_this_transformers_is_looked_at(models: Any) -> None:
    assert {"llama", "mamba", "gemma3_text", "phi3"} <= set(models.families())
    assert models.arguments([]).families == []


@needs_the_newest_transformers
def test_settings_are_for_families_that_exist(models: Any) -> None:
    from small_models import EXTRA

    assert set(EXTRA) <= set(models.families())
