"""The measured cost of each layer's errors, against differences, and what the allocation makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from artifact_factory import artifact_for
from models_zoo import tiny_model

from kvq_calib.calibrate.learn import divergence
from kvq_calib.calibrate.rate_distortion import correction
from kvq_calib.calibrate.sensitivity import error_sensitivity
from kvq_calib.spec import KINDS, KVCacheSpec, QuantSpec

pytestmark = pytest.mark.model

FINE = QuantSpec(bits=5, variable_bits=True, trellis=True)
SPEC = KVCacheSpec(key=FINE.model_copy(update={"phase": True, "feedback": True}), value=FINE, sink_tokens=1)


def test_sensitivity_is_the_derivative_of_the_divergence() -> None:
    model = tiny_model("llama").eval()
    artifact = artifact_for(model, SPEC)
    pieces = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    found = error_sensitivity(model, pieces, SPEC, artifact.geometry, artifact.layers)
    assert set(found) == {(layer, kind) for layer in range(len(artifact.layers)) for kind in KINDS}
    quantizers = artifact.quantizers()

    def at(place: tuple[int, str], factor: float) -> float:
        def through(layer: int, kind: str):
            quantizer = quantizers[layer][kind]
            a = factor if (layer, kind) == place else 1.0
            return lambda x: x + a * (quantizer(x) - x)

        quantize = [{kind: through(layer, kind) for kind in KINDS} for layer in range(len(quantizers))]
        with torch.no_grad():
            return sum(divergence(model, piece[None], SPEC, quantize) for piece in pieces) / len(pieces)

    step = 0.02
    # Behind the last layer no codes change with the factor, which the derivative takes for granted.
    for place in ((len(quantizers) - 1, kind) for kind in KINDS):
        difference = (at(place, 1 + step) - at(place, 1 - step)) / (2 * step)
        assert found[place] == pytest.approx(difference, rel=0.02)


def test_estimates_go_half_of_the_way_to_what_was_measured() -> None:
    factors = correction([1.0, 4.0, 100.0, 1.0, -0.1], [1.0, 1.0, 1.0, 1.0, 1.0])
    assert factors[:4] == pytest.approx([1.0, 2.0, 8.0, 1.0])  # at most 64 times, and the root of that
    assert math.isfinite(factors[4])
    assert factors[4] == pytest.approx(1 / 8)
