"""Evaluation in prefill mode: what is reported follows from the logits, and from nothing else."""

import math

import pytest
import torch
from artifact_factory import artifact_for
from models_zoo import FAMILIES, tiny_model, token_ids

from kvq_calib.data import TokenWindows
from kvq_calib.errors import KVQError
from kvq_calib.evaluate.perplexity import Comparison, measure_perplexity
from kvq_calib.evaluate.prefill import quantized_prefill
from kvq_calib.schema.recipe import EvalConfig
from kvq_calib.schema.spec import KVCacheSpec, OutlierSpec, QuantSpec

pytestmark = pytest.mark.model


def spec(bits=3, **cache):
    return KVCacheSpec(
        key=QuantSpec(bits=bits, outliers=OutlierSpec(fraction=0.02)),
        value=QuantSpec(bits=bits, granularity="token", dynamic=True, outliers=OutlierSpec(fraction=0.02)),
        **cache,
    )


def windows(count=2, seqlen=40):
    return TokenWindows(token_ids(count, seqlen), {"dataset": "random"})


def test_figures_are_those_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (300,), generator=generator)
    base, other = (3 * torch.randn(300, 11, generator=generator) for _ in range(2))
    comparison = Comparison()
    comparison.add(base, other, ids)
    result = comparison.result("x", 3.0)
    p, q = base[:-1].double().log_softmax(-1), other[:-1].double().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    rows = torch.arange(299)
    assert result.tokens == 299
    assert result.perplexity == pytest.approx(math.exp(-q[rows, ids[1:]].mean()), rel=1e-5)
    assert result.baseline_perplexity == pytest.approx(math.exp(-p[rows, ids[1:]].mean()), rel=1e-5)
    assert result.kl_mean == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert result.kl_p99 == pytest.approx(float(divergence.quantile(0.99)), rel=1e-4)
    assert result.kl_windows == pytest.approx([result.kl_mean])
    assert result.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_evaluated_and_left_as_it_was(family):
    model = tiny_model(family)
    ids = token_ids(1, 24)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
    artifacts = {"coarse": artifact_for(model, spec(2)), "fine": artifact_for(model, spec(8))}
    coarse, fine = measure_perplexity(model, artifacts, windows(), EvalConfig(context=512))
    assert 0 < fine.kl_mean < coarse.kl_mean
    assert fine.baseline_perplexity == coarse.baseline_perplexity
    assert fine.tokens == 2 * 39
    assert coarse.bits_per_element < fine.bits_per_element
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_every_window_is_told_with_those_before_it():
    model = tiny_model("llama")
    artifacts = {"x": artifact_for(model, spec(2))}
    told = []
    (whole,) = measure_perplexity(model, artifacts, windows(3), EvalConfig(), finished=told.append)
    assert [results[0].kl_windows for results in told] == [whole.kl_windows[: n + 1] for n in range(3)]
    assert told[2] == [whole]
    assert whole.kl_mean == pytest.approx(sum(whole.kl_windows) / 3)
    two = TokenWindows(windows(3).ids[:2], {})
    (first_two,) = measure_perplexity(model, artifacts, two, EvalConfig())
    assert {**first_two.to_json(), "seconds": 0} == {**told[1][0].to_json(), "seconds": 0}


def test_all_tokens_exact_is_the_baseline():
    model = tiny_model("llama")
    artifact = artifact_for(model, spec(1, sink_tokens=64, storage_dtype="float16"))
    (result,) = measure_perplexity(model, {"exact": artifact}, windows(), EvalConfig())
    assert result.kl_mean < 1e-5
    assert result.top1_agreement == 1.0


def test_the_last_token_of_a_window_does_not_count():
    model = tiny_model("llama")
    artifact = artifact_for(model, spec())
    one = windows(1)
    changed = TokenWindows(one.ids.clone(), one.source)
    with quantized_prefill(model, artifact), torch.no_grad():
        a = model(input_ids=one.ids, use_cache=False).logits
    changed.ids[0, -1] = (changed.ids[0, -1] + 1) % 100
    with quantized_prefill(model, artifact), torch.no_grad():
        b = model(input_ids=changed.ids, use_cache=False).logits
    assert torch.equal(a[:, :-1], b[:, :-1])


def test_outliers_are_counted():
    model = tiny_model("llama")
    artifact = artifact_for(model, spec())
    with quantized_prefill(model, artifact) as counts, torch.no_grad():
        model(input_ids=token_ids(2, 30), use_cache=False)
    rates = counts.per_token()
    assert counts.tokens == [58] * len(artifact.layers)
    assert all(0 < rate <= artifact.quantizers()[0]["value"].outlier_cap for rate in rates["value"])


def test_predictions_that_are_not_finite_are_refused():
    model = tiny_model("llama")
    artifact = artifact_for(model, spec())
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(KVQError, match="not finite"):
        measure_perplexity(model, {"x": artifact}, windows(), EvalConfig())


def test_decode_mode_agrees_with_prefill_mode():
    model = tiny_model("llama")
    artifacts = {"x": artifact_for(model, spec(4))}
    # 96 tokens: three whole blocks, so nothing but the sink is exact in either mode.
    data = windows(2, 96)
    (prefill,) = measure_perplexity(model, artifacts, data, EvalConfig(mode="prefill"))
    (decode,) = measure_perplexity(model, artifacts, data, EvalConfig(mode="decode", chunk=32))
    assert decode.perplexity == pytest.approx(prefill.perplexity, rel=2e-3)
    assert decode.kl_mean == pytest.approx(prefill.kl_mean, rel=0.05)
