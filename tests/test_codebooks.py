"""Codebooks that channels share, against a codebook for every channel."""

import pytest
import torch
from statistic_helpers import normal

from kvq_calib.calibrate.codebooks import codebook_levels, level_curves, share_codebooks
from kvq_calib.codec.trellis import TrellisQuantizer
from kvq_calib.codec.trellis_params import codebook_table
from kvq_calib.fit.density import weighted_error
from kvq_calib.schema.geometry import HeadShape
from kvq_calib.schema.spec import TrellisSpec


def widths_to(bits: int, trellis: bool = False) -> TrellisSpec:
    return TrellisSpec(max_bits=bits, states=4 if trellis else 1)


def test_a_channel_without_weight_or_without_movement_is_no_special_case() -> None:
    points = torch.stack([torch.linspace(-1, 1, 50), torch.full((50,), 2.0)]).double()
    weights = torch.stack([torch.zeros(50), torch.ones(50)]).double()
    curves = level_curves(points, weights, widths_to(3))
    params = share_codebooks(curves, torch.tensor([3, 3], dtype=torch.uint8), 4, widths_to(3))
    assert bool(torch.isfinite(params.codebook).all())
    assert params.scale is not None
    assert bool((params.scale > 0).all())
    assert float(curves.distortion.max()) < 1e-20


def test_shared_codebooks_cost_little_against_a_codebook_for_every_channel() -> None:
    x, w = normal(12, 300).double().sort(1).values, torch.ones(12, 300, dtype=torch.float64)
    x[4:8] = x[4:8].sign() * x[4:8].abs().sqrt()  # two kinds of shapes
    x = (x * torch.linspace(0.1, 5, 12, dtype=torch.float64)[:, None]).sort(1).values + 2
    curves = level_curves(x, w, widths_to(4))
    widths = torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 4, 4, 3, 2], dtype=torch.uint8)
    own = sum(float(curves.distortion[c, int(b)]) for c, b in enumerate(widths) if b > 1)
    errors = []
    for most in (1, 2, 12):
        params = share_codebooks(curves, widths, most, widths_to(4))
        assert len(params.codebook) == codebook_levels(widths, most, widths_to(4))
        table = codebook_table(widths_to(4), params)
        assert bool((table.diff(dim=1) >= 0).all())
        assert params.scale is not None
        assert params.zero_point is not None
        levels = params.zero_point[:, None] + params.scale[:, None] * table[params.codebook_index.long()]
        error = weighted_error(levels.double(), x, w)
        torch.testing.assert_close(error[:2], curves.distortion[[0, 1], [0, 1]], rtol=1e-3, atol=0)
        errors.append(float(error[widths > 1].sum()))
    assert errors[1] < errors[0]
    assert errors[2] <= own * 1.02  # float16 levels
    assert errors[1] <= own * 1.5


def test_levels_for_a_trellis_have_less_error_on_paths_than_their_start() -> None:
    grid = torch.linspace(-5, 5, 1001, dtype=torch.float64)[None].expand(4, -1).contiguous()
    weights = torch.exp(-grid.square() / 2)
    spec = widths_to(3, trellis=True)
    curves = level_curves(grid, weights / weights.sum(1, keepdim=True), spec)
    assert [level.shape[1] for level in curves.levels] == [1, 4, 8, 16]
    # What is claimed of paths, and what they do: samples of the same distribution.
    params = share_codebooks(curves, torch.full((4,), 3, dtype=torch.uint8), 1, spec)
    x = normal(1, 1, 4096, 4, seed=5)
    error = (TrellisQuantizer(spec, params, HeadShape(1, 4))(x) - x).square().mean()
    assert error < 0.028  # 14.62 dB, 0.0345, is the least for nearest levels
    assert float(curves.distortion[0, 3]) == pytest.approx(float(error), rel=0.15)
