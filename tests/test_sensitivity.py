"""The measured cost of each head's errors, against finite differences, and its use in the allocation."""

from __future__ import annotations

import pytest
import torch
from artifact_factory import artifact_for
from models_zoo import tiny_model, token_ids

from kvq_calib.calibrate.divergence import divergence
from kvq_calib.calibrate.rate_distortion import correction
from kvq_calib.calibrate.run import calibrate
from kvq_calib.calibrate.sensitivity import ErrorSensitivity
from kvq_calib.data import TokenWindows
from kvq_calib.schema.recipe import calibration_config
from kvq_calib.schema.spec import KINDS, ErrorCompensationSpec, KVCacheSpec, TrellisSpec

pytestmark = pytest.mark.model

SPEC = KVCacheSpec(
    key=TrellisSpec(max_bits=5, pair_rotation=True, error_compensation=ErrorCompensationSpec()),
    value=TrellisSpec(max_bits=5),
    sink_tokens=1,
)


def test_sensitivity_is_the_derivative_of_the_divergence() -> None:
    model = tiny_model("llama").eval()
    artifact = artifact_for(model, SPEC)
    pieces = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    sensitivity = ErrorSensitivity(model, pieces)
    found = sensitivity.measure(artifact)
    # What is kept of the first measurement changes nothing.
    again = sensitivity.measure(artifact)
    assert all(torch.equal(found[place], again[place]) for place in found)
    assert set(found) == {(layer, kind) for layer in range(len(artifact.layers)) for kind in KINDS}
    quantizers = artifact.quantizers()

    def at(place: tuple[int, str], head: int, factor: float) -> float:
        def through(layer: int, kind: str):
            quantizer = quantizers[layer][kind]
            a = torch.ones(artifact.geometry.layers[layer].num_kv_heads, 1, 1)
            if (layer, kind) == place:
                a[head] = factor
            return lambda x: x + a * (quantizer(x) - x)

        quantize = [{kind: through(layer, kind) for kind in KINDS} for layer in range(len(quantizers))]
        with torch.no_grad():
            return sum(divergence(model, piece[None], SPEC, quantize) for piece in pieces) / len(pieces)

    step = 0.02
    # Behind the last layer no codes change with the factor, which the derivative takes for granted.
    for place in ((len(quantizers) - 1, kind) for kind in KINDS):
        assert found[place].shape == (artifact.geometry.layers[place[0]].num_kv_heads,)
        for head, derivative in enumerate(found[place]):
            difference = (at(place, head, 1 + step) - at(place, head, 1 - step)) / (2 * step)
            assert float(derivative) == pytest.approx(difference, rel=0.03, abs=1e-6)


def test_estimates_go_half_of_the_way_to_what_was_measured() -> None:
    measured = [torch.tensor([1.0, 4.0]), torch.tensor([100.0, 1.0, -0.1])]
    factors = correction(measured, [torch.ones(2), torch.tensor([1.0, 1.0, 1.0])])
    assert [len(each) for each in factors] == [2, 3]
    # The roots, and those of at most 64 times and at least an eighth.
    expected = torch.tensor([1.0, 2.0, 8.0, 1.0, 8**-0.5], dtype=torch.float64)
    torch.testing.assert_close(torch.cat(factors), expected)


def test_the_budget_goes_to_the_heads_that_cost(monkeypatch) -> None:
    """A head whose errors are said to cost most gets wider channels than without a correction, others narrower ones."""
    model = tiny_model("llama").eval()
    windows = TokenWindows(token_ids(4, 24, 0), {"dataset": "random", "seqlen": 24})
    dear = (1, "key"), 1

    def said(self, draft):
        costs = {
            (layer, kind): torch.ones(shape.num_kv_heads, dtype=torch.float64)
            for layer, shape in enumerate(draft.geometry.layers)
            for kind in KINDS
        }
        costs[dear[0]][dear[1]] = 1e6
        return costs

    monkeypatch.setattr(ErrorSensitivity, "measure", said)
    settings = ("learn=null", "allocation.context=65536", "allocation.self_generated=0")
    recipes = {
        str(rounds): calibration_config("kvq3", assignments=(*settings, f"allocation.corrections={rounds}"))
        for rounds in (0, 1)
    }
    made = calibrate(model, windows, recipes, model_id="", model_config={}).artifacts
    (layer, kind), head = dear

    def widths(name: str) -> tuple[int, int]:
        """Sum of the widths of that head, and of all others."""
        own = made[name].layers[layer].of(kind).bits.view(2, -1)[head]
        every = sum(int(each.of(k).bits.sum()) for each in made[name].layers for k in KINDS)
        return int(own.sum()), every - int(own.sum())

    before, after = (widths(name) for name in recipes)
    assert after[0] > before[0]
    assert after[1] < before[1]
    assert made["1"].bits_per_element(65536) <= 3.4
