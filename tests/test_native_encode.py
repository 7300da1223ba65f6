"""The native encoder finds torch's codes bit for bit, or leaves the work to torch. It never reads beyond its input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_factory import built_folder, compile_cpu, threads, trellis_quantizer, variables
from torch import Tensor

from kvq_calib.codec.trellis import TrellisQuantizer
from kvq_calib.native import loader
from kvq_calib.native.encode import Encoded, TrellisTables, encode_trellis
from kvq_calib.native.loader import Library, usable_isas

ARTIFACT = (
    Path(__file__).parent.parent
    / "benchmarks"
    / "artifacts"
    / "smollm2-135m-wikitext2"
    / "kvq3.kvq.safetensors"
)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    return built_folder(request.config)


def by_torch(quantizer: TrellisQuantizer, y: Tensor, weight: Tensor | None) -> Encoded:
    """Codes, and what was coded."""
    with variables(KVQ_CALIB_OPS="torch"):
        if quantizer.compensation is not None:
            coded, codes = quantizer.compensate(y, weight)
            return Encoded(codes, coded)
        return Encoded(quantizer.encode(y, weight), None)


def same(mine: Tensor | None, theirs: Tensor | None) -> bool:
    return mine is theirs is None or (mine is not None and theirs is not None and torch.equal(mine, theirs))


def check_equal(quantizer: TrellisQuantizer, y: Tensor, libraries: list[Library]) -> None:
    """All libraries, with weights given and weights found, against torch."""
    tables, weight = quantizer.native_tables, quantizer.token_weights(y)
    expected = by_torch(quantizer, y, weight)
    for library in libraries:
        found = [encode_trellis(library, tables, y, weight)]
        if weight is not None:
            found.append(encode_trellis(library, tables, y, by_size=True))
        for each in found:
            assert each is not None
            assert torch.equal(each.codes, expected.codes), library.isa
            assert same(each.coded, expected.coded), library.isa


def tokens_of(quantizer: TrellisQuantizer, batch: int, tokens: int, seed: int, steps: float = 0.0) -> Tensor:
    y = torch.randn(batch, tokens, quantizer.shape.channels, generator=torch.Generator().manual_seed(seed))
    centre, half = quantizer.channel_range()
    y = centre + half.clamp(min=0.5) * y
    return (y / steps).round() * steps if steps else y


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 2, 3, 5, 16, 20, 33]),
    max_bits=st.integers(1, 7),
    states=st.sampled_from([1, 4]),
    compensation=st.none() | st.tuples(st.sampled_from([0, 1, 3]), st.integers(0, 3)),
    weighting=st.booleans(),
    shaping=st.booleans(),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 200),
    steps=st.sampled_from([0.0, 0.5, 0.125]),
)
def test_codes_are_those_of_torch(
    libraries: list[Library],
    seed: int,
    heads: int,
    size: int,
    max_bits: int,
    states: int,
    compensation: tuple[int, int] | None,
    weighting: bool,
    shaping: bool,
    batch: int,
    tokens: int,
    steps: float,
) -> None:
    quantizer = trellis_quantizer(
        seed,
        heads=heads,
        size=size,
        max_bits=max_bits,
        states=states,
        compensation=compensation,
        weighting=weighting and states > 1,
        shaping=shaping and states > 1 and compensation is None,
        steps=steps,
    )
    check_equal(quantizer, tokens_of(quantizer, batch, tokens, seed, steps), libraries)


@pytest.mark.parametrize(("states", "shaping"), [(1, False), (4, False), (4, True)])
@pytest.mark.parametrize("bits", range(8))
def test_every_width_in_vectors_of_every_length(
    libraries: list[Library], bits: int, states: int, shaping: bool
) -> None:
    quantizer = trellis_quantizer(
        bits, size=4, max_bits=max(bits, 1), bits=bits, states=states, shaping=shaping
    )
    for blocks in (1, 5, 9, 17):
        check_equal(quantizer, tokens_of(quantizer, 1, 32 * blocks - 3, blocks), libraries)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1, 3, 4, 18, 32]),
    max_bits=st.integers(1, 7),
    codec=st.sampled_from(["nearest", "plain", "shaped", "matrix", "factor"]),
    weighting=st.booleans(),
    tokens=st.integers(1, 32),
    steps=st.sampled_from([0.0, 0.5]),
)
def test_a_block_alone(
    libraries: list[Library],
    seed: int,
    size: int,
    max_bits: int,
    codec: str,
    weighting: bool,
    tokens: int,
    steps: float,
) -> None:
    """As decoding closes one: its tokens, or the states of the trellis, stand in the lanes."""
    quantizer = trellis_quantizer(
        seed,
        size=size,
        max_bits=max_bits,
        states=1 if codec == "nearest" else 4,
        compensation={"matrix": (0, 2), "factor": (1, 1)}.get(codec),
        weighting=weighting and codec != "nearest",
        shaping=codec == "shaped",
        steps=steps,
    )
    check_equal(quantizer, tokens_of(quantizer, 1, tokens, seed, steps), libraries)


@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 256])
def test_heads_of_every_size(libraries: list[Library], size: int) -> None:
    quantizer = trellis_quantizer(size, heads=1, size=size, compensation=(4, 1), weighting=True)
    check_equal(quantizer, tokens_of(quantizer, 2, 90, size), libraries)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([4, 7, 8, 18]),
    compensation=st.sampled_from([None, (0, 0), (2, 1)]),
    flags=st.tuples(st.booleans(), st.booleans()),
    tokens=st.integers(1, 100),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    strided=st.sampled_from(["not", "tokens first", "reversed", "expanded", "every second"]),
)
def test_the_quantizer_uses_it_and_gets_what_torch_gives(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    size: int,
    compensation: tuple[int, int] | None,
    flags: tuple[bool, bool],
    tokens: int,
    dtype: torch.dtype,
    strided: str,
) -> None:
    monkeypatch.setattr(loader, "FOLDER", folder)
    weighting, rotation = flags
    x = torch.randn(2, 2, tokens, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if strided == "tokens first":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif strided == "reversed":
        x = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    elif strided == "expanded":
        x = x[:1].expand(2, -1, -1, -1)
    elif strided == "every second":
        x = torch.stack((x, x + 1), -1)[..., 0]
    found = []
    for ops in ("native", "torch"):
        quantizer = trellis_quantizer(
            seed, size=size, compensation=compensation, weighting=weighting, rotation=rotation
        )
        with variables(KVQ_CALIB_OPS=ops):
            found.append((quantizer.quantize(x).codes, quantizer.normalise(x).y))
            used = "native_tables" in quantizer.__dict__
            assert used == (ops == "native")
            held = 2 + 2 * weighting + 3 * rotation if used else 0
            assert len(quantizer.derived()) == held + (0 if not compensation else 1 + (compensation[1] > 0))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_any_number_of_threads_gives_the_same(libraries: list[Library]) -> None:
    quantizer = trellis_quantizer(5, heads=3, size=12, compensation=(0, 1), weighting=True)
    tables, y = quantizer.native_tables, tokens_of(quantizer, 3, 700, 5)
    for library in libraries:
        found = []
        for count in (1, 2, 3, 8):
            with threads(count):
                found.append(encode_trellis(library, tables, y, by_size=True))
        first = found[0]
        assert first is not None
        for other in found[1:]:
            assert other is not None
            assert torch.equal(other.codes, first.codes)
            assert same(other.coded, first.coded)


def test_threads_of_the_program_may_call_at_once(libraries: list[Library]) -> None:
    quantizer = trellis_quantizer(6, size=8, compensation=(0, 1))
    tables, y = quantizer.native_tables, tokens_of(quantizer, 2, 500, 6)
    library = libraries[0]
    with threads(2):
        expected = encode_trellis(library, tables, y)
        found: list[Encoded | None] = []
        callers = [
            threading.Thread(
                target=lambda: found.extend(encode_trellis(library, tables, y) for _ in range(5))
            )
            for _ in range(4)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert expected is not None
    assert len(found) == 20
    assert all(each is not None and torch.equal(each.codes, expected.codes) for each in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_threads_of_its_own(folder: Path) -> None:
    code = (
        "import os, sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from native_factory import trellis_quantizer\n"
        "from kvq_calib.native.encode import encode_trellis\n"
        "from kvq_calib.native.loader import library_of, usable_isas\n"
        "folder = Path(sys.argv[2]); library = library_of(next(usable_isas(folder)), folder)\n"
        "torch.set_num_threads(2); tables = trellis_quantizer(0).native_tables; y = torch.randn(2, 400, 32)\n"
        "first = encode_trellis(library, tables, y).codes\n"
        "child = os.fork()\n"
        "same = torch.equal(encode_trellis(library, tables, y).codes, first)\n"
        "if child == 0: os._exit(0 if same else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not same)\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder)]
    assert subprocess.run(command, timeout=120).returncode == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e19, 2e19, 1e-42, -0.0])
@pytest.mark.parametrize("compensation", [None, (0, 1)])
def test_what_is_no_number_is_left_to_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, value: float, compensation: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(loader, "FOLDER", folder)
    for place in (0, 9, 40):
        quantizer = trellis_quantizer(7, size=6, compensation=compensation, weighting=True)
        x = torch.randn(1, 2, 41, 6, generator=torch.Generator().manual_seed(1))
        x[0, 1, place, 2] = value
        with variables(KVQ_CALIB_OPS="native"):
            mine = quantizer.quantize(x).codes
        with variables(KVQ_CALIB_OPS="torch"):
            assert torch.equal(mine, quantizer.quantize(x).codes)


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 70))
@settings(deadline=None, max_examples=25)
def test_numbers_of_any_size_give_what_torch_gives(libraries: list[Library], seed: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    quantizer = trellis_quantizer(seed, size=5, compensation=(0, 1))
    tables = quantizer.native_tables
    shape = (1, tokens, quantizer.shape.channels)
    y = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-38, 38, shape, generator=generator)
    weight = 10.0 ** torch.randint(-45, 38, (1, tokens, 2), generator=generator)
    weight *= torch.randint(0, 2, weight.shape, generator=generator)
    expected = by_torch(quantizer, y, weight)
    for library in libraries:
        found = encode_trellis(library, tables, y, weight)
        # Squares that overflow and count nothing are no numbers, and not for this encoder.
        assert found is None or torch.equal(found.codes, expected.codes)
        huge = bool((y.abs() > 1e15).any())
        assert found is not None or huge


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_weights_that_are_none_are_left_to_torch(libraries: list[Library], bad: float) -> None:
    quantizer = trellis_quantizer(8)
    y, weight = tokens_of(quantizer, 1, 40, 8), torch.ones(1, 40, 2)
    weight[0, 39, 1] = bad
    for library in libraries:
        assert encode_trellis(library, quantizer.native_tables, y, weight) is None


def test_levels_beyond_what_it_knows_are_left_to_torch(libraries: list[Library]) -> None:
    quantizer = trellis_quantizer(9, bits=2)
    tables, y = quantizer.native_tables, tokens_of(quantizer, 1, 40, 9)
    for levels in (tables.levels * 1e15, tables.levels.flip(1).contiguous(), tables.levels * torch.nan):
        assert encode_trellis(libraries[0], replace(tables, levels=levels), y) is None


def test_gradients_are_left_to_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "FOLDER", folder)
    quantizer = trellis_quantizer(10, compensation=(0, 1))
    y = tokens_of(quantizer, 1, 40, 10).requires_grad_()
    coded, codes = quantizer.compensate(y)
    assert coded.requires_grad
    coefficients = quantizer.coefficients.requires_grad_()
    trained = quantizer.with_params(replace(quantizer.params, coefficients=coefficients))
    assert trained.compensate(y.detach())[0].requires_grad
    with torch.no_grad():
        assert torch.equal(trained.compensate(y)[1], codes)
        assert "native_tables" in trained.__dict__


def test_no_tokens_have_no_codes(libraries: list[Library]) -> None:
    quantizer = trellis_quantizer(11, compensation=(0, 1))
    for shape in ((0, 5, 32), (2, 0, 32)):
        found = encode_trellis(libraries[0], quantizer.native_tables, torch.empty(shape))
        assert found is not None
        assert found.codes.shape == shape


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("level_count", lambda x: x.long()),
        ("level_count", lambda x: x[:-1]),
        ("level_count", lambda x: x * 2),
        ("level_count", lambda x: x - 1),
        ("levels", lambda x: x[:-1]),
        ("levels", lambda x: x.double()),
        ("levels", lambda x: x[:, :-1].contiguous()),
        ("levels", lambda x: x.T.contiguous().T),
        ("shares", lambda x: x[:, :-1]),
        ("shares", lambda x: x.mT),
        ("refinement_shares", lambda x: x[..., :-1].contiguous()),
        ("refinement_shares", lambda x: None),
        ("size_edges", lambda x: x[:, :-1].contiguous()),
        ("size_edges", lambda x: None),
        ("class_weight", lambda x: x[:1]),
        ("class_weight", lambda x: x.to("meta")),
        ("feedback", lambda x: torch.zeros(2)),
        ("pair", lambda x: x + 8),
        ("pair", lambda x: x - 9),
        ("pair", lambda x: x * 0),
        ("pair", lambda x: x.long()),
        ("pair", lambda x: None),
        ("cosine", lambda x: x[:, :-1].contiguous()),
        ("sine", lambda x: x.T.contiguous().T),
        ("heads", lambda x: x + 1),
        ("size", lambda x: x + 1),
        ("states", lambda x: 2),
    ],
)
def test_tables_of_the_wrong_kind_are_refused(field: str, bad: object) -> None:
    quantizer = trellis_quantizer(12, max_bits=3, bits=3, compensation=(0, 1), weighting=True, rotation=True)
    tables = quantizer.native_tables
    assert callable(bad)
    with pytest.raises(ValueError, match=f"{field}|states|shares|level|pair"):
        replace(tables, **{field: bad(getattr(tables, field))})


@settings(deadline=None, max_examples=80)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    weight_shape=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int32]),
    by_size=st.booleans(),
)
def test_tensors_of_any_other_shape_are_refused(
    libraries: list[Library], shape: list[int], weight_shape: list[int], dtype: torch.dtype, by_size: bool
) -> None:
    tables = trellis_quantizer(13, size=3, weighting=True).native_tables
    y, weight = torch.zeros(shape, dtype=dtype), torch.zeros(weight_shape)
    right = (len(shape) == 3 and shape[2] == 6) or (len(shape) == 4 and (shape[1], shape[3]) == (2, 3))
    right = right and dtype == torch.float32 and weight_shape == [shape[0], shape[-2], 2]
    if right and not by_size:
        assert encode_trellis(libraries[0], tables, y, weight) is not None
    else:
        with pytest.raises(ValueError, match=r"x: |weight: |by_size: "):
            encode_trellis(libraries[0], tables, y, weight, by_size=by_size)


def test_other_strides_are_read_right(libraries: list[Library]) -> None:
    quantizer = trellis_quantizer(14, weighting=True)
    y = tokens_of(quantizer, 2, 60, 14)
    strided = y.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    check_equal(quantizer, strided, libraries)


@pytest.mark.skipif(not ARTIFACT.is_file(), reason="the artifact is not part of this distribution")
def test_the_benchmark_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "FOLDER", folder)
    monkeypatch.syspath_prepend(str(ARTIFACT.parents[2]))
    import encode_speed

    output = tmp_path / "speed.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/encode_speed.py"])
    with threads(1):
        encode_speed.main(["--tokens", "40", "--layer", "3", "--repeats", "2", "--output", str(output)])
    content = json.loads(output.read_text(encoding="utf-8"))
    assert [(row["kind"], row["tokens"]) for row in content["rows"]] == [("key", 40), ("value", 40)]
    for row in content["rows"]:
        assert list(row["seconds"]) == ["torch", *usable_isas(folder)]
        assert all(seconds["cpu"] > 0 for seconds in row["seconds"].values())
    assert output.with_suffix(".md").read_text(encoding="utf-8").strip() == capsys.readouterr().out.strip()


# ---------------------------------------------------------------- the loader


def foreign_library(folder: Path, isa: str, functions: dict[str, str]) -> None:
    """A library in place of ours whose functions return these constants."""
    lines = [
        f'extern "C" {"const char*" if value.startswith(chr(34)) else "int"} {name}() {{ return {value}; }}'
        for name, value in functions.items()
    ]
    source = folder / "other.cpp"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    compiler = compile_cpu.find_compiler()
    assert compiler is not None
    target = folder / compile_cpu.library_name(isa)
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(target)], check=True)


def test_the_switch_turns_it_off_and_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loader, "FOLDER", folder)
    monkeypatch.delenv("KVQ_CALIB_OPS", raising=False)
    monkeypatch.delenv("KVQ_CALIB_ISA", raising=False)
    best = loader.library()
    assert best is not None
    assert best.isa == next(usable_isas(folder))
    monkeypatch.setenv("KVQ_CALIB_OPS", "torch")
    assert loader.library() is None
    for backend in ("auto", "cuda", "one-of-my-own"):
        monkeypatch.setenv("KVQ_CALIB_OPS", backend)
        assert loader.library() is best
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    monkeypatch.setenv("KVQ_CALIB_OPS", "")
    assert loader.library() is None
    monkeypatch.setenv("KVQ_CALIB_OPS", "native")
    with pytest.raises(loader.ConfigError, match="no native library is there"):
        loader.library()


def test_an_instruction_set_is_taken_by_name_or_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "FOLDER", folder)
    monkeypatch.delenv("KVQ_CALIB_OPS", raising=False)
    for isa in usable_isas(folder):
        monkeypatch.setenv("KVQ_CALIB_ISA", isa)
        found = loader.library()
        assert found is not None
        assert found.isa == isa
    for other in ("sse9", "../x", "neon" if "neon" not in loader.ISAS else "x86-64-v4"):
        monkeypatch.setenv("KVQ_CALIB_ISA", other)
        with pytest.raises(loader.ConfigError, match=f"KVQ_CALIB_ISA is {other!r}.*leave it out") as refused:
            loader.library()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("functions", "reason"),
    [
        ({"kvq_abi": str(loader.ABI + 1), "kvq_runs_here": "1"}, "it has version"),
        ({"kvq_abi": str(loader.ABI), "kvq_isa": '"pdp-11"', "kvq_runs_here": "1"}, "was built for pdp-11"),
        (None, "is not a library of this package"),
    ],
)
def test_a_library_that_does_not_fit_is_named_once_and_torch_computes(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    functions: dict[str, str] | None,
    reason: str,
) -> None:
    isa = next(usable_isas(folder))
    foreign_library(
        tmp_path, isa, {"other": "1"} if functions is None else {"kvq_isa": f'"{isa}"', **functions}
    )
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    monkeypatch.delenv("KVQ_CALIB_OPS", raising=False)
    monkeypatch.delenv("KVQ_CALIB_ISA", raising=False)
    for _ in range(3):
        assert loader.library() is None
    assert [reason in line for line in caplog.messages] == [True]
    monkeypatch.setenv("KVQ_CALIB_ISA", isa)
    with pytest.raises(loader.ConfigError, match=reason):
        loader.library()


def test_a_set_that_the_processor_lacks_is_passed_over(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    isas = list(usable_isas(folder))
    mine = {"kvq_abi": str(loader.ABI), "kvq_isa": f'"{isas[0]}"', "kvq_runs_here": "0"}
    foreign_library(tmp_path, isas[0], mine)
    for isa in isas[1:]:
        (tmp_path / compile_cpu.library_name(isa)).symlink_to(folder / compile_cpu.library_name(isa))
    assert list(usable_isas(tmp_path)) == isas[1:]
    assert not caplog.messages


def test_a_compiler_that_fails_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for compiler in (str(tmp_path / "missing"), "false"):
        monkeypatch.setenv("CXX", compiler)
        made, problems = compile_cpu.compile_all(tmp_path / "libraries")
        assert not made
        assert len(problems) == 1
        assert "made no library" in problems[0]
        assert "\n" not in problems[0]
        assert not list((tmp_path / "libraries").iterdir())


def test_the_loader_needs_no_torch() -> None:
    code = "import sys, kvq_calib.native.loader; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------- under sanitizers


def test_nothing_is_read_or_written_beyond_its_end(folder: Path, tmp_path: Path) -> None:
    compiler = compile_cpu.find_compiler()
    assert compiler is not None
    preload = []
    for runtime in ("libasan.so", "libubsan.so"):
        asked = subprocess.run([*compiler, f"-print-file-name={runtime}"], capture_output=True, text=True)
        if not Path(asked.stdout.strip()).is_file():
            pytest.skip("the compiler has no sanitizers of its own")
        preload.append(asked.stdout.strip())
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1"]
    isa = next(usable_isas(folder))
    compile_cpu.compile_library(isa, tmp_path, compiler, extra=flags)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1",
    }
    for script in ("native_sanitized.py", "native_sanitized_reading.py", "native_sanitized_closing.py"):
        command = [sys.executable, str(Path(__file__).parent / script), isa, str(tmp_path), str(folder)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert "equal" in ran.stdout


def test_tables_are_checked_in_every_field() -> None:
    """A field that is added must be checked, too: the C structure and the class name the same."""
    of_class = {name for name in TrellisTables.__dataclass_fields__ if name not in ("size",)}
    of_struct = {name for name, *_ in loader.KvqTrellis._fields_} - {
        "head_dim",
        "level_stride",
        "size_classes",
        "pairs",
    }
    assert of_class == of_struct
