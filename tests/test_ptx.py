"""Tests of the PTX translator: instructions in hand-written PTX, and faults that it must find."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from ptx.host import compiled, nvcc, ptx_of
from ptx.translate import Unknown, translate
from shim.host import compiler

from kvq_calib.runtime.cuda.build import kernel_folder

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

HEAD = """
.version 9.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry probe(.param .align 8 .b8 probe_param_0[16])
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .f32 %f<32>;
    .reg .b32 %r<64>;
    .reg .b64 %rd<16>;
    ld.param.u64 %rd1, [probe_param_0];
    ld.param.u64 %rd2, [probe_param_0+8];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd2, %rd3;
"""


def probe(body: str, given: np.ndarray, threads: int = 32, shared: int = 0, out: int = 0) -> np.ndarray:
    """Run a kernel whose ``%rd1`` is ``given``, ``%rd2`` the result and ``%rd4`` the thread's own word of it."""
    library = compiled(HEAD + body + "\n    ret;\n}\n")
    library.ptx_races()
    given = np.ascontiguousarray(given)
    result = np.zeros(out or threads, dtype=np.uint32)
    params = (ctypes.c_uint64 * 2)(given.ctypes.data, result.ctypes.data)
    library.launch_probe(params, 1, 1, 1, threads, shared)
    probe.races = library.ptx_races()
    return result


#: Instructions on %r2, %r3, %r4 (given) with the result in %r5: what it is to be, by the ISA.
X, Y, Z = 0x89ABCDEF, 0x01234567, 0x00007531
CASES = {
    "prmt.b32 %r5, %r2, %r3, 0x7531": 0x014589CD,
    "prmt.b32 %r5, %r2, %r3, 0x6420": 0x2367ABEF,
    "prmt.b32 %r5, %r2, %r3, 0x888F": 0xFFFFFF00,
    "lop3.b32 %r5, %r2, %r3, %r4, 0xEA": (X & Y) | Z,
    "lop3.b32 %r5, %r2, %r3, %r4, 0xCA": (X & Y) | (~X & Z) & 0xFFFFFFFF,
    "lop3.b32 %r5, %r2, %r3, %r4, 0x96": X ^ Y ^ Z,
    "shf.l.wrap.b32 %r5, %r2, %r3, 36": 0x12345678,
    "shf.r.wrap.b32 %r5, %r2, %r3, 4": 0x789ABCDE,
    "shl.b32 %r5, %r2, 32": 0,
    "shr.s32 %r5, %r2, 40": 0xFFFFFFFF,
    "shr.u32 %r5, %r2, 4": X >> 4,
    "bfi.b32 %r5, %r3, %r2, 8, 12": (X & ~0xFFF00) | (0x567 << 8),
    "bfe.u32 %r5, %r2, 8, 12": 0xBCD,
    "bfe.s32 %r5, %r2, 8, 12": 0xFFFFFBCD,
    "brev.b32 %r5, %r3": int(f"{Y:032b}"[::-1], 2),
    "popc.b32 %r5, %r2": X.bit_count(),
    "div.s32 %r5, %r2, 7": (-((2**32 - X) // 7)) % 2**32,
    "rem.s32 %r5, %r2, 7": (-((2**32 - X) % 7)) % 2**32,
    "mul.lo.s32 %r5, %r2, %r3": X * Y % 2**32,
    "mul.hi.u32 %r5, %r2, %r3": X * Y >> 32,
    "mad.lo.s32 %r5, %r2, %r3, %r4": (X * Y + Z) % 2**32,
    "min.s32 %r5, %r2, %r3": X,
    "min.u32 %r5, %r2, %r3": Y,
    "cvt.u16.u32 %rs1, %r2; cvt.s32.s16 %r5, %rs1": 0xFFFFCDEF,
    "cvt.rzi.s32.f32 %r5, 0fC0200000": 0xFFFFFFFE,
    "cvt.rni.f32.f32 %f1, 0f40200000; mov.b32 %r5, %f1": 0x40000000,
    "max.f32 %f1, 0f7FC00000, 0f3F800000; mov.b32 %r5, %f1": 0x3F800000,
    "setp.lt.f32 %p1, 0f7FC00000, 0f3F800000; selp.b32 %r5, 1, 2, %p1": 2,
    "setp.neu.f32 %p1, 0f7FC00000, 0f3F800000; selp.b32 %r5, 1, 2, %p1": 1,
    "setp.lt.s32 %p1, %r2, %r3; selp.b32 %r5, 1, 2, %p1": 1,
    "ex2.approx.ftz.f32 %f1, 0fFF800000; mov.b32 %r5, %f1": 0,
    "ex2.approx.ftz.f32 %f1, 0f40400000; mov.b32 %r5, %f1": 0x41000000,
    "cvt.rn.f16x2.f32 %r5, 0f40000000, 0f3F800000": 0x40003C00,
    "mul.f16x2 %r5, 0x40003C00, 0x42004200": 0x46004200,
    "fma.rn.f16x2 %r5, 0x40003C00, 0x42004200, 0x3C00BC00": 0x47004000,
    "cvt.rn.bf16.f32 %rs1, 0f3F80FFFF; cvt.u32.u16 %r5, %rs1": 0x3F81,
    "fma.rn.f32 %f1, 0f3F800001, 0f3F800001, 0fBF800002; mov.b32 %r5, %f1": 0x28800000,
}


def test_instructions() -> None:
    body = "ld.u32 %r2, [%rd1]; ld.u32 %r3, [%rd1+4]; ld.u32 %r4, [%rd1+8];\n"
    for number, text in enumerate(CASES):
        body += f"{text};\nst.global.u32 [%rd2+{4 * number}], %r5;\n"
    found = probe(body, np.array([X, Y, Z], np.uint32), out=len(CASES))
    assert {text: hex(value) for text, value in zip(CASES, found.tolist(), strict=True)} == {
        text: hex(value) for text, value in CASES.items()
    }


@pytest.mark.parametrize(
    ("mode", "c", "source"),
    [
        ("up.b32 %r5|%p1, %r1, 3, 0", 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down.b32 %r5|%p1, %r1, 3, 31", 31, lambda lane: lane + 3 if lane + 3 < 32 else lane),
        ("bfly.b32 %r5|%p1, %r1, 17, 31", 31, lambda lane: lane ^ 17),
        ("idx.b32 %r5|%p1, %r1, 5, 6175", 31, lambda lane: lane // 8 * 8 + 5),
    ],
)
def test_shuffles(mode, c, source) -> None:
    """The last in segments of eight lanes: bits 8 to 12 of c are 0x18."""
    found = probe(f"shfl.sync.{mode}, -1; st.global.u32 [%rd4], %r5;", np.zeros(1, np.uint32))
    assert found.tolist() == [source(lane) for lane in range(32)]


def test_matrix_products() -> None:
    """Fragments as the ISA draws them, filled and read by lane."""
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-4, 5, size).astype(np.float16) for size in ((16, 16), (16, 8)))
    words = np.zeros((32, 6), np.uint32)
    for lane in range(32):
        g, j = divmod(lane, 4)
        rows = [(g, 2 * j), (g + 8, 2 * j), (g, 2 * j + 8), (g + 8, 2 * j + 8)]
        for i, (row, column) in enumerate(rows):
            words[lane, i] = a[row, column : column + 2].view(np.uint32)[0]
        for i, row in enumerate((2 * j, 2 * j + 8)):
            words[lane, 4 + i] = np.ascontiguousarray(b[row : row + 2, g]).view(np.uint32)[0]
    body = "mul.wide.u32 %rd5, %r1, 24; add.s64 %rd6, %rd1, %rd5; mul.wide.u32 %rd7, %r1, 16; add.s64 %rd8, %rd2, %rd7;"
    body += "".join(f"ld.global.u32 %r{10 + i}, [%rd6+{4 * i}];" for i in range(6))
    body += "".join(f"mov.f32 %f{i}, 0f3F800000;" for i in range(4))
    body += (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r10, %r11, %r12, %r13}, "
        "{%r14, %r15}, {%f0, %f1, %f2, %f3}; st.global.v4.f32 [%rd8], {%f0, %f1, %f2, %f3};"
    )
    found = probe(body, words, out=128).view(np.float32).reshape(32, 4)
    want = a.astype(np.float32) @ b.astype(np.float32) + 1
    for lane in range(32):
        g, j = divmod(lane, 4)
        assert found[lane].tolist() == [*want[g, 2 * j : 2 * j + 2], *want[g + 8, 2 * j : 2 * j + 2]]


def test_a_matrix_is_transposed() -> None:
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    body = "add.s64 %rd5, %rd1, %rd3; ld.global.u32 %r2, [%rd5]; "
    body += "movmatrix.sync.aligned.m8n8.trans.b16 %r5, %r2; st.global.u32 [%rd4], %r5;"
    found = probe(body, matrix.view(np.uint32)).view(np.uint16).reshape(8, 8)
    assert np.array_equal(found, matrix.T)


# ---- faults ------------------------------------------------------------------------------------------------------

#: Every thread writes a word of shared memory, then reads that of its neighbour.
WRITE = "shl.b32 %r2, %r1, 2; mov.u32 %r3, memory; add.s32 %r3, %r3, %r2; st.shared.u32 [%r3], %r1;\n"
READ = "xor.b32 %r3, %r3, 4; ld.shared.u32 %r5, [%r3]; st.global.u32 [%rd4], %r5;"
READ_OTHER_WARP = READ.replace("%r3, 4", "%r3, 128")


@pytest.mark.parametrize(
    ("barrier", "read", "races"),
    [
        ("bar.sync 0;", READ, False),
        ("bar.sync 0;", READ_OTHER_WARP, False),
        ("bar.warp.sync -1;", READ, False),
        ("bar.warp.sync -1;", READ_OTHER_WARP, True),
        ("", READ, True),
        ("", READ_OTHER_WARP, True),
        ("shfl.sync.bfly.b32 %r9|%p1, %r1, 1, 31, -1;", READ, True),  # orders no memory
        ("bar.sync 0;", READ + "st.shared.u32 [%r3], %r1;", False),
        (
            "bar.sync 0;",
            READ + "xor.b32 %r3, %r3, 8; st.shared.u32 [%r3], %r1;",
            True,
        ),  # a write after a read
        ("bar.sync 0;", "mov.u32 %r3, memory; atom.shared.add.u32 %r5, [%r3], 1;", False),
        ("bar.sync 0;", "mov.u32 %r3, memory; st.shared.u32 [%r3], %r1;", True),
    ],
)
def test_races_are_found(barrier, read, races) -> None:
    found = probe(WRITE + barrier + read, np.zeros(1, np.uint32), threads=64, shared=1024)
    assert (probe.races > 0) == races
    if barrier == "bar.sync 0;" and read == READ:
        assert found.tolist() == [thread ^ 1 for thread in range(64)]


def test_bytes_side_by_side_are_no_race() -> None:
    body = "mov.u32 %r3, memory; add.s32 %r3, %r3, %r1; cvt.u16.u32 %rs1, %r1; st.shared.u8 [%r3], %rs1;"
    body += "ld.shared.u8 %rs2, [%r3]; cvt.u32.u16 %r5, %rs2; st.global.u32 [%rd4], %r5;"
    assert probe(body, np.zeros(1, np.uint32), threads=64, shared=64).tolist() == list(range(64))
    assert probe.races == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.v2.u32 {%r5, %r6}, [%rd1+4];", "not aligned"),
        ("mov.u32 %r3, memory; ld.shared.u32 %r5, [%r3+64];", "outside shared memory"),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 bar.warp.sync -1; @!%p1 bar.warp.sync -1;", "different operations"),
        ("bar.warp.sync 65535;", "a part of a warp"),
    ],
)
def test_faults_end_the_run(body, message, capfd) -> None:
    """In a process of its own, since it is aborted."""

    def run() -> None:
        faulthandler.disable()  # pytest's writes to a file of its own
        probe(body, np.zeros(16, np.uint64), shared=64)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode != 0
    assert message in capfd.readouterr().err


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(Unknown, match="statically allocated"):
        translate(HEAD + ".shared .align 4 .b8 more[64];\n ret; }")
    with pytest.raises(Unknown, match="reg"):
        translate(HEAD + ".reg .b128 %q<3>;\n ret; }")


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
def test_a_barrier_taken_out_of_the_kernel_is_found(tmp_path: Path) -> None:
    """Results stay right in the order in which fibers run, so that nothing else would notice."""
    import test_kernels
    import torch
    from artifact_factory import RECIPES
    from shim import host

    folder = tmp_path / "cuda"
    shutil.copytree(kernel_folder(), folder)
    source = (folder / "decode.cu").read_text()
    barrier = "__syncthreads();  // Shared::out overwrites the queries"
    assert source.count(barrier) == 1

    def attend(text: str) -> tuple[torch.Tensor, int]:
        (folder / "decode.cu").write_text(text)
        libraries = {}

        def build(source: str, defines: tuple[str, ...]) -> ctypes.CDLL:
            if (source, defines) not in libraries:
                libraries[source, defines] = compiled(ptx_of(source, defines, folder))
            return libraries[source, defines]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host, "build", build)
            machine = test_kernels.Machine(host.HostLauncher(), torch.device("cpu"))
            layer = test_kernels.Layer(machine, RECIPES["nuq4-1p"], test_kernels.geometry(32, 1, 1))
            storage = layer.storage(1)
            layer.torch.pack(storage, layer.tokens("key", 1, 256), layer.tokens("value", 1, 256))
            pages = [test_kernels.PageTable(side).refresh() for side in (storage.key, storage.value)]
            blocks = torch.tensor([[[32 * i, -1] for i in range(8)]], dtype=torch.int32)
            context = test_kernels.DecodeContext(blocks, torch.empty(1, 0, dtype=torch.int32))
            none = layer.tokens("key", 1, 0)
            step = test_kernels.DecodeStep(
                torch.ones(1, 1, 32).half(), *pages, [(none, none)] * 2, context, 0.1
            )
            out = test_kernels.DecodeKernel(machine.launcher, *layer.tables).attend(step)
        return out, sum(library.ptx_races() for library in libraries.values())

    right, races = attend(source)
    assert races == 0
    _, races = attend(source.replace(barrier, ""))
    assert races > 0
    assert right.isfinite().all()
