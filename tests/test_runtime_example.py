"""The example script, on a tiny model."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
from artifact_factory import RECIPES, artifact_for
from models_zoo import tiny_model

pytestmark = pytest.mark.model
SCRIPT = Path(__file__).parent.parent / "examples" / "generate_and_plot_memory.py"


def test_the_example_writes_table_and_plot(tokenizer, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    artifact = tmp_path / "tiny.kvq.safetensors"
    artifact_for(model, RECIPES["dense2"]).save(artifact)
    table, image = tmp_path / "m.csv", tmp_path / "m.png"
    options = ["--tokens", "300", "--csv", str(table), "--plot", str(image)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "model"), str(artifact), *options])
    spec = importlib.util.spec_from_file_location("example", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()
    assert "MiB for" in capsys.readouterr().out
    assert image.read_bytes().startswith(b"\x89PNG")
    with table.open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["tokens", "DynamicCache", artifact.name]
    assert len(rows) == 300
    prompt = len(tokenizer(example.PROMPT)["input_ids"])
    assert [int(row[0]) for row in rows] == list(range(prompt, prompt + 300))
    # two layers of keys and values, 2 heads of 16 channels in float32
    assert [int(row[1]) for row in rows] == [2 * 2 * 32 * 4 * (prompt + step) for step in range(300)]
    ordinary, packed = int(rows[-1][1]), int(rows[-1][2])
    assert packed < ordinary / 2
