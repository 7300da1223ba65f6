"""One small artifact of each codec with everything it can store, and with the same numbers on every machine.

``tests/golden/`` has their files. After a change of the format, write these again with ``to_bytes``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.computed_levels import has_coefficient, store_levels
from kvq_calib.codec.params import LayerParams
from kvq_calib.codec.scalar import ScalarParams
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec
from kvq_calib.schema.spec import KVCacheSpec, TrellisSpec

GOLDEN = Path(__file__).parent / "golden"
#: The second layer has no rotary embedding, a sliding window, and values of another head size than its keys.
GEOMETRY = KVGeometry(
    layers=(
        LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=4, rope=0),
        LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=4, value_head_dim=6, sliding_window=16),
    ),
    ropes=(RopeSpec(pairs=((0, 2), (1, 3)), inv_freq=(1.0, 0.01)),),
)
LEVELS = [-1, -0.5, -0.25, -0.125, 0, 0.25, 0.5, 1.0]
SCALAR = KVCacheSpec.model_validate(
    {
        "key": {"bits": 3, "outliers": {"fraction": 0.01}, "q_norm": True},
        "value": {"bits": 2, "thresholds": "token", "levels": "normal_float", "outliers": {"fraction": 0.05}},
        "layers": {
            1: {
                "key": {"bits": 2, "thresholds": "token_normalized", "pre_rope": False},
                "value": {"bits": 1, "levels": "uniform"},
            }
        },
        "storage_dtype": "bfloat16",
    }
)
TRELLIS = KVCacheSpec.model_validate(
    {
        "key": {"codec": "trellis", "max_bits": 3, "pair_rotation": True, "noise_shaping": True},
        "value": {"codec": "trellis", "max_bits": 2, "states": 1, "error_compensation": {}},
        "layers": {
            -1: {
                "key": {
                    "codec": "trellis",
                    "max_bits": 3,
                    "pair_rotation": True,
                    "error_compensation": {"rank": 1, "refinement_passes": 1},
                    "token_weighting": True,
                },
                "value": {
                    "codec": "trellis",
                    "max_bits": 2,
                    "states": 1,
                    "error_compensation": {"refinement_passes": 2},
                },
            }
        },
        "sink_tokens": 2,
        "recent_tokens": 3,
    }
)
KEY_WIDTHS = [3, 2, 1, 0, 3, 2, 1, 3]


def tiny_scalar() -> KVArtifact:
    """Thresholds of all kinds that are stored, and of none."""
    scale, zero_point = torch.arange(1, 9) / 8, torch.arange(8) / 16
    first = LayerParams(
        key=ScalarParams(torch.tensor([LEVELS]), scale, zero_point),
        value=ScalarParams(torch.tensor([[-1, -0.25, 0.25, 1.0]])),
    )
    second = LayerParams(
        key=ScalarParams(torch.tensor([[-1, -0.5, 0.5, 1.0]]), scale.clone(), zero_point.clone()),
        value=ScalarParams(torch.tensor([[-0.5, 0.5]]), torch.arange(1, 13) / 4, -torch.arange(12) / 8),
    )
    return _artifact(SCALAR, first, second, {"key": [0.5, 0.25], "value": [2.0, 0.0]})


def tiny_trellis() -> KVArtifact:
    """Widths from 0 on, angles of pairs, error compensation with and without a rank, token weighting, noise shaping."""
    first = LayerParams(
        key=_params(
            KEY_WIDTHS,
            4,
            pair_angle=torch.tensor([[0.5, -0.25], [0.0, 1.0]]).half(),
            error_feedback=torch.tensor([0.25, -0.5]).half(),
        ),
        value=_params(
            [2, 1, 0, 2, 1, 2, 0, 2],
            1,
            compensation=torch.arange(-6, 6).to(torch.int8).view(2, 6),
            compensation_scale=torch.tensor([0.03125, 0.0625]),
        ),
    )
    second = LayerParams(
        key=_params(
            KEY_WIDTHS,
            4,
            compensation=torch.arange(-4, 4).to(torch.int8).view(2, 4),
            compensation_scale=torch.tensor([0.125, 0.25]),
            error_weight=torch.tensor([[1.0, 0.5, 0.25, 0.125], [0.75, 1.0, 1.0, 0.5]]).half(),
            token_weight=(torch.arange(64) / 16).half().view(2, 32),
            token_size_unit=torch.tensor([4.0, 0.5]),
        ),
        value=_params(
            [2, 1, 0, 2, 1, 2, 0, 2, 1, 1, 2, 0],
            1,
            compensation=torch.arange(-15, 15).to(torch.int8).view(2, 15),
            compensation_scale=torch.tensor([0.0, 0.0625]),
            error_weight=(torch.arange(12) / 8).half().view(2, 6),
        ),
    )
    return _artifact(TRELLIS, first, second, {"key": [0.0, 0.0], "value": [0.0, 0.0]})


#: By codec.
TINY = {"scalar": tiny_scalar, "trellis": tiny_trellis}


def golden_file(codec: str) -> Path:
    """The file of a codec in the present format."""
    return GOLDEN / f"{codec}-8.kvq.safetensors"


def _artifact(spec: KVCacheSpec, first: LayerParams, second: LayerParams, rates: dict) -> KVArtifact:
    return KVArtifact(
        spec,
        GEOMETRY,
        (first, second),
        model={"id": "tiny", "config": {"model_type": "llama", "vocab_size": 7}},
        calibration={"recipe": "none", "seed": 0},
        outliers_per_token=rates,
    )


def _params(widths: list[int], states: int, **others: Tensor) -> TrellisParams:
    """Levels that are the same on every machine: an offset, a slope, and a little of higher powers."""
    spec, bits = TrellisSpec(max_bits=3, states=states), torch.tensor(widths, dtype=torch.uint8)
    step = torch.arange(1, len(widths) + 1)
    most = torch.stack((step / 16, step / 8, step / 64, step / 32, 0 * step, step / 128), dim=-1)
    exact = most * has_coefficient(spec, bits)
    return TrellisParams(bits, **others).with_levels(store_levels(spec, bits, exact))
