"""The counter of the decode kernel's instructions, on a listing written by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from kvq_calib.runtime.cuda.kinds import KEY_KINDS

SCRIPTS = Path(__file__).parent.parent / "kernels"
LISTING = """
.text.reduce_splits:
.L_x_9:
        /*0000*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
//--------------------- .text.decode_attention --------------------------
.text.decode_attention:
.L_x_1:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_2:
        /*0010*/                   LDG.E.CONSTANT R1, desc[UR4][R2.64] ;
        /*0020*/                   LOP3.LUT R1, R1, 0xf000f, R7, 0xea, !PT ;
        /*0030*/                   HFMA2 R1, R1, R5, -9, -9 ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0050*/              @!P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0060*/                   FADD R1, R1, R2 ;
        /*0070*/               @P1 BRA `(.L_x_3) ;
.L_x_4:
        /*0080*/                   PRMT R1, R1, 0x5410, R2 ;
        /*0090*/                   HMMA.16816.F32 R4, R8, R2, RZ ;
        /*00a0*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*00b0*/               @P1 BRA `(.L_x_4) ;
        /*00c0*/              @!P0 BRA `(.L_x_1) ;
//--------------------- .nv.info --------------------------
"""


def script(monkeypatch, name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def counter(monkeypatch):
    return script(monkeypatch, "count_instructions")


def test_the_counts_of_the_recipes_are_what_they_should_be(monkeypatch) -> None:
    """Instructions per element of mixed widths, and no load per element: only words of codes are read."""
    counts = json.loads(script(monkeypatch, "predict").COUNTS.read_text())
    most = {("kvq3", "key"): 5.5, ("kvq3", "value"): 4.0, ("kvq2", "key"): 5.5, ("kvq2", "value"): 4.0}
    for row in counts:
        assert row["instructions"] <= most.get((row["recipe"], row["kind"]), 6.0)
        assert row["loads"] <= 0.1
    assert {(row["recipe"], row["kind"]) for row in counts} >= most.keys()


def test_the_tables_of_the_docs_follow_from_the_counts(monkeypatch) -> None:
    """After `make kernel-counts`, `python kernels/predict.py` prints what belongs there."""
    predict = script(monkeypatch, "predict")
    counts = json.loads(predict.COUNTS.read_text())
    lines = (SCRIPTS.parent / "docs/reference/kernels.md").read_text().splitlines()
    for row in predict.count_rows(counts) + predict.bound_rows(counts):
        assert row in lines


def test_the_bounds(monkeypatch) -> None:
    """A GPU that does one of everything a second."""
    predict = script(monkeypatch, "predict")
    slow = predict.Gpu(1, 1 / 128, 1.0)
    counts = [
        {"recipe": "kvq3", "kind": kind, "instructions": 3.0, "alu": 1.0, "loads": 0.1}
        for kind in ("key", "value")
    ]
    least = predict.bound(counts, "kvq3", slow)
    elements = 131072 * 8 * 128
    assert (least.issue, least.alu) == (6 * elements, 4 * elements)
    assert least.memory == pytest.approx(2 * elements * 3.4 / 8)
    assert least.seconds == least.issue


def test_innermost_loops_with_products_are_counted(counter) -> None:
    loops = counter.inner_loops(LISTING)
    assert [len(loop) for loop in loops] == [5, 4]
    assert counter.Loop.of(loops[0]) == counter.Loop(5 / 8, 1 / 8, 1 / 8)
    assert counter.Loop.of(loops[1]) == counter.Loop(4 / 16, 1 / 16, 0.0)


def test_neighbouring_heads_are_laid_out_as_one(counter) -> None:
    assert list(counter.joined_heads([1, 2, 3, 4, 5, 6], 2, 2)) == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 1, 2]]
    assert list(counter.joined_heads([1, 2, 3, 4], 2, 1)) == [[1, 2], [3, 4]]


def test_a_loop_that_is_missing_is_noticed(counter, monkeypatch, tmp_path) -> None:
    """So that no loop is taken for another kind's."""
    tool = tmp_path / "nvdisasm"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setattr(counter, "compile_cubin", lambda *arguments: b"")
    options = counter.argparse.Namespace(nvcc="nvcc", nvdisasm=str(tool))
    fields = dict.fromkeys(counter.DecodeVariant.__dataclass_fields__, False)
    uniform = counter.DecodeVariant(**{**fields, "head_dim": 128, "heads": 4, "key_bits": 3, "value_bits": 3})
    loops = counter.loops_of(uniform, "sm_90", options)
    assert loops["key"] == {(0, 0): counter.Loop(5 / 8, 1 / 8, 1 / 8)}
    mixed = counter.DecodeVariant(**{**fields, "head_dim": 128, "heads": 4, "key_bits": 0, "value_bits": 3})
    with pytest.raises(SystemExit, match=f"2 inner loops .* {len(KEY_KINDS) + 1} were expected"):
        counter.loops_of(mixed, "sm_90", options)


def test_a_disassembler_that_is_missing_is_said_in_one_line(counter) -> None:
    with pytest.raises(counter.ToolMissing, match="pip install nvidia-cuda-nvdisasm"):
        counter.disassembler("no-such-tool")
