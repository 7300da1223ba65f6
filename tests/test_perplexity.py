"""Evaluation in prefill mode: results follow from the logits only."""

import math
from types import SimpleNamespace

import pytest
import torch
from artifact_factory import artifact_for
from models_zoo import FAMILIES, tiny_model, token_ids

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.data import TokenWindows
from kvq_calib.evaluate import prefill
from kvq_calib.evaluate.contenders import DecodeContender, artifact_contenders, forced_to_decode
from kvq_calib.evaluate.decode import AttachedHooks, logits_through
from kvq_calib.evaluate.perplexity import measure, measure_perplexity
from kvq_calib.evaluate.prefill import PrefillQuantizer
from kvq_calib.evaluate.text_pass import NotFiniteError
from kvq_calib.model.capture import intercept
from kvq_calib.runtime import KVQCache, attached
from kvq_calib.schema.recipe import EvalConfig
from kvq_calib.schema.spec import KVCacheSpec, OutlierSpec, ScalarSpec

pytestmark = pytest.mark.model


def spec(bits=3, **cache):
    return KVCacheSpec(
        key=ScalarSpec(bits=bits, outliers=OutlierSpec(fraction=0.02)),
        value=ScalarSpec(bits=bits, thresholds="token", outliers=OutlierSpec(fraction=0.02)),
        **cache,
    )


def windows(count=2, seqlen=40):
    return TokenWindows(token_ids(count, seqlen), {"dataset": "random"})


class Known:
    """A contender whose predictions are given."""

    mode, hooks, remedy = "prefill", None, "try another"

    def __init__(self, *logits):
        self.rows = iter(logits)

    def logits(self, ids):
        return next(self.rows)[None]

    def bits_per_element(self, context):
        return 3.0


class Said:
    """A model that says what it is told to."""

    device = torch.device("cpu")

    def __init__(self, *logits):
        self.rows = iter(logits)

    def __call__(self, input_ids, use_cache):
        return SimpleNamespace(logits=next(self.rows)[None].clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_are_those_of_the_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (300,), generator=generator)
    base, other = (3 * torch.randn(300, 11, generator=generator).to(dtype) for _ in range(2))
    contenders = {"x": Known(other), "same": Known(base)}
    result, same = measure(Said(base), contenders, TokenWindows(ids[None], {}), 512)
    p, q = base[:-1].double().log_softmax(-1), other[:-1].double().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    rows = torch.arange(299)
    assert result.tokens == 299
    assert result.perplexity == pytest.approx(math.exp(-q[rows, ids[1:]].mean()), rel=1e-5)
    assert result.baseline_perplexity == pytest.approx(math.exp(-p[rows, ids[1:]].mean()), rel=1e-5)
    assert result.kl_mean == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert result.kl_p99 == pytest.approx(float(divergence.quantile(0.99)), rel=1e-4)
    assert result.kl_windows == pytest.approx([result.kl_mean])
    parts = [(n * 299 // 16, (n + 1) * 299 // 16) for n in range(16)]
    for (first, last, kl), (start, end) in zip(result.kl_positions, parts, strict=True):
        assert (first, last + 1) == (start, end)
        assert kl == pytest.approx(float(divergence[start:end].mean()), rel=1e-4)
    assert result.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert (same.kl_mean, same.top1_agreement, same.perplexity) == (0.0, 1.0, result.baseline_perplexity)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_predictions_that_are_not_finite_are_refused_by_name(bad):
    fine = torch.zeros(1, 20, 11)
    broken = fine.clone()
    broken[0, 7, 3] = bad
    windows = TokenWindows(torch.zeros(2, 20, dtype=torch.int64), {})
    told = []
    with pytest.raises(NotFiniteError, match=r"^a gives predictions that are not finite; try another$"):
        measure(Said(fine[0], fine[0]), {"a": Known(fine[0], broken[0])}, windows, 512, finished=told.append)
    assert len(told) == 1  # the window before it
    with pytest.raises(
        NotFiniteError, match="unquantized model's predictions are not finite; try --dtype float32"
    ):
        measure(Said(broken[0]), {"a": Known(fine[0])}, windows, 512)


def test_many_large_logits_are_finite():
    """Their sum is not, in float16."""
    logits = torch.full((40, 2000), 8.0, dtype=torch.float16)
    windows = TokenWindows(torch.zeros(1, 40, dtype=torch.int64), {})
    (result,) = measure(Said(logits), {"a": Known(logits)}, windows, 512)
    assert result.perplexity == pytest.approx(2000, rel=1e-3)


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
    with intercept(model, PrefillQuantizer.of(artifact, model)), torch.no_grad():
        a = model(input_ids=one.ids, use_cache=False).logits
    changed.ids[0, -1] = (changed.ids[0, -1] + 1) % 100
    with intercept(model, PrefillQuantizer.of(artifact, model)), torch.no_grad():
        b = model(input_ids=changed.ids, use_cache=False).logits
    assert torch.equal(a[:, :-1], b[:, :-1])


def test_outliers_are_counted():
    model = tiny_model("llama")
    artifact = artifact_for(model, spec())
    quantizer = PrefillQuantizer.of(artifact, model)
    with intercept(model, quantizer), torch.no_grad():
        model(input_ids=token_ids(2, 30), use_cache=False)
    counts = quantizer.counts
    rates = counts.per_token()
    assert counts.tokens == [58] * len(artifact.layers)
    assert all(0 < rate <= artifact.quantizers()[0]["value"].outlier_cap for rate in rates["value"])


def test_decode_mode_agrees_with_prefill_mode():
    model = tiny_model("llama")
    artifacts = {"x": artifact_for(model, spec(4))}
    # 96 tokens: three whole blocks, so nothing but the sink is exact in either mode.
    data = windows(2, 96)
    (prefill,) = measure_perplexity(model, artifacts, data, EvalConfig(mode="prefill"))
    (decode,) = measure_perplexity(model, artifacts, data, EvalConfig(mode="decode", chunk=32))
    assert decode.perplexity == pytest.approx(prefill.perplexity, rel=2e-3)
    assert decode.kl_mean == pytest.approx(prefill.kl_mean, rel=0.05)


def test_quantizers_and_hooks_are_made_once(monkeypatch):
    model = tiny_model("llama")
    artifacts = {name: artifact_for(model, spec(bits)) for name, bits in (("a", 2), ("b", 3))}
    made, hooked = [], []
    quantizers, put = KVArtifact.quantizers, prefill.intercept
    monkeypatch.setattr(
        KVArtifact, "quantizers", lambda self, *device: made.extend(device) or quantizers(self, *device)
    )
    monkeypatch.setattr(prefill, "intercept", lambda *args: hooked.append(args) or put(*args))
    measure_perplexity(model, artifacts, windows(3), EvalConfig())
    assert len(made) == 2  # sizes are asked of quantizers without a device
    assert len(hooked) == 1


def test_decoding_reuses_one_cache_and_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    artifact = artifact_for(model, spec(3))
    ids = token_ids(2, 70)
    implementation = model.config._attn_implementation
    hooks = AttachedHooks(model)
    contender = DecodeContender(artifact, hooks, model, 17)
    assert model.config._attn_implementation == implementation
    with hooks.in_place():
        once, again = contender.logits(ids), contender.logits(ids)
    assert model.config._attn_implementation == implementation
    with attached(model):
        fresh = logits_through(model, KVQCache(artifact, model), ids, 17)
    assert torch.equal(once, fresh)
    assert torch.equal(again, fresh)


# A window of recent exact tokens: bits count it, so what is measured must have it.


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_text_that_fits_the_exact_window_is_exact(mode):
    model = tiny_model("llama")
    artifact = artifact_for(model, spec(1, recent_tokens=64, storage_dtype="float16"))
    (result,) = measure_perplexity(model, {"x": artifact}, windows(2, 64), EvalConfig(mode=mode))
    assert result.mode == "decode"
    assert result.kl_mean < 1e-5
    assert result.top1_agreement == 1.0


def test_the_last_queries_read_the_recent_window_exactly():
    """By hand, in a model of one layer, whose keys and values do not depend on what attention reads."""
    model = tiny_model("llama", num_hidden_layers=1)
    artifact = artifact_for(model, spec(2, recent_tokens=32, storage_dtype="float16"))
    quantizer, ids = PrefillQuantizer.of(artifact, model), token_ids(1, 128)

    def last_queries(packed):
        """Logits of the last 32 tokens with as many of the oldest tokens quantized."""

        def transform(kv):
            keys, values = quantizer(kv)
            return (
                torch.cat([keys[:, :, :packed], kv.keys[:, :, packed:]], 2),
                torch.cat([values[:, :, :packed], kv.values[:, :, packed:]], 2),
            )

        with intercept(model, transform):
            return model(input_ids=ids, use_cache=False).logits[0, 96:]

    contender = artifact_contenders(model, {"x": artifact}, EvalConfig(mode="prefill"))["x"]
    with torch.no_grad():
        with contender.hooks.in_place():
            found = contender.logits(ids)[0, 96:]
        errors = {packed: float((found - last_queries(packed)).abs().mean()) for packed in (0, 64, 96, 128)}
    # What is left is float16, in which tokens wait before they are packed.
    assert errors[96] < 0.1 * min(errors[packed] for packed in (0, 64, 128))


def test_only_artifacts_with_a_recent_window_leave_the_mode_asked_for():
    model = tiny_model("llama")
    artifacts = {
        "plain": artifact_for(model, spec(3)),
        "recent": artifact_for(model, spec(3, recent_tokens=32)),
    }
    data = windows(2, 96)
    plain, recent = measure_perplexity(model, artifacts, data, EvalConfig())
    assert (plain.mode, recent.mode) == ("prefill", "decode")
    (alone,) = measure_perplexity(model, {"plain": artifacts["plain"]}, data, EvalConfig())
    assert plain.kl_windows == alone.kl_windows  # whatever runs beside it
    assert forced_to_decode(artifacts, EvalConfig()) == [
        "recent: measured in decode mode, 32 tokens per step: its newest 32 tokens are exact, "
        "which prefill mode would quantize"
    ]
    assert not forced_to_decode(artifacts, EvalConfig(mode="decode"))
