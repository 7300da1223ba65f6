"""Native libraries compiled from the present sources, and trellis quantizers with any numbers, for tests."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvq_calib.codec.computed_levels import has_coefficient, store_levels
from kvq_calib.codec.trellis import TrellisQuantizer
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.native.loader import Library, library_of, usable_isas
from kvq_calib.schema.geometry import HeadShape, RopeSpec
from kvq_calib.schema.spec import ErrorCompensationSpec, TrellisSpec

ROOT = Path(__file__).parent.parent


def _compile_cpu() -> Any:
    """The script that compiles; its folder is no package here."""
    spec = importlib.util.spec_from_file_location("compile_cpu", ROOT / "kernels" / "compile_cpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compile_cpu = _compile_cpu()


def built_folder(config: pytest.Config) -> Path:
    """Folder of the libraries for this machine, compiled once for each state of the sources.

    Skips where there is no compiler or no kernel for the machine.
    """
    compiler = compile_cpu.find_compiler()
    if compiler is None or platform.machine().lower() not in compile_cpu.TARGETS:
        pytest.skip("no C++ compiler, or no native kernels for this machine")
    state = hashlib.sha256((ROOT / "kernels" / "compile_cpu.py").read_bytes())
    for file in sorted(compile_cpu.SOURCES.iterdir()):
        state.update(file.read_bytes())
    folder = Path(config.cache.mkdir("native")) / state.hexdigest()[:16]
    if not folder.is_dir() or len(list(folder.iterdir())) < len(
        compile_cpu.TARGETS[platform.machine().lower()]
    ):
        made, problems = compile_cpu.compile_all(folder)
        assert made, problems
    return folder


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def libraries(request: pytest.FixtureRequest) -> list[Library]:
    """Of every instruction set that runs here."""
    folder = built_folder(request.config)
    found = [library_of(isa, folder) for isa in usable_isas(folder)]
    assert found
    return found


def trellis_quantizer(
    seed: int,
    *,
    heads: int = 2,
    size: int = 16,
    max_bits: int = 3,
    bits: int | None = None,
    states: int = 4,
    compensation: tuple[int, int] | None = None,
    weighting: bool = False,
    shaping: bool = False,
    rotation: bool = False,
    steps: float = 0.0,
) -> TrellisQuantizer:
    """A quantizer with random numbers.

    Args:
        seed: of everything random.
        heads, size: of its shape.
        max_bits: of the widest channel.
        bits: of every channel; any from 0 to ``max_bits`` by default.
        states: of the trellis.
        compensation: rank and refinement passes, or ``None``.
        weighting: of tokens, with zeros and large numbers among the weights.
        shaping: of noise.
        rotation: of RoPE pairs, half as many as there could be.
        steps: offsets and slopes of levels are multiples of this, so that many things tie; 0 for any.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator)
        return (x / steps).round() * steps if steps else x.half().float()

    channels = heads * size
    spec = TrellisSpec(
        max_bits=max_bits,
        states=states,
        error_compensation=None
        if compensation is None
        else ErrorCompensationSpec(rank=compensation[0], refinement_passes=compensation[1]),
        token_weighting=weighting,
        noise_shaping=shaping,
        pair_rotation=rotation,
    )
    widths = torch.randint(0, max_bits + 1, (channels,), generator=generator, dtype=torch.uint8)
    if bits is not None:
        widths.fill_(bits)
    # Offset and slope are anything, what bends the levels leaves them in order.
    slope = drawn(channels).abs() + (steps or 0.25)
    bend = torch.randint(-1, 2, (channels,), generator=generator) / 4
    powers = (slope, slope * bend, slope * bend.abs(), slope * bend / 8, slope * bend.abs() / 2)
    coefficients = torch.stack((drawn(channels), *powers), dim=-1) * has_coefficient(spec, widths)
    parts: dict[str, torch.Tensor] = {}
    if spec.error_compensation is not None:
        entries = spec.error_compensation.entries(size)
        parts["compensation"] = torch.randint(
            -127, 128, (heads, entries), generator=generator, dtype=torch.int8
        )
        rank = compensation[0] if compensation else 0
        parts["compensation_scale"] = torch.full((heads,), 0.9 / 127 / (rank**0.5 if rank else 2.0))
        if spec.error_compensation.needs_error_weight:
            parts["error_weight"] = (torch.rand(heads, size, generator=generator) + 0.01).half()
    rope = None
    if rotation:
        order = torch.randperm(size, generator=generator).tolist()
        pairs = tuple(zip(order[: size // 4], order[size // 4 : size // 4 * 2], strict=True))
        rope = RopeSpec(pairs=pairs, inv_freq=(1.0,) * len(pairs))
        parts["pair_angle"] = torch.randn(heads, len(pairs), generator=generator).half()
    if weighting:
        weight = torch.randn(heads, 32, generator=generator).exp()
        weight[:, ::5] = 0
        weight[:, ::7] *= 10000
        parts["token_weight"] = weight.clamp(max=65504).half()
        parts["token_size_unit"] = torch.rand(heads, generator=generator) * size + 0.1
    if shaping:
        parts["error_feedback"] = torch.rand(heads, generator=generator).mul(1.9).sub(0.95).half()
    params = TrellisParams(widths, **parts).with_levels(store_levels(spec, widths, coefficients))
    return TrellisQuantizer(spec, params, HeadShape(heads, size), rope)
