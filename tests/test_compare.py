"""Rivals against independent formulas, the count of their bits, and the command that compares."""

import importlib.util
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from artifact_factory import artifact_for, recipe
from models_zoo import tiny_model, tiny_tokenizer, token_ids
from test_cli import assert_one_line, call

from kvq_calib.data import TokenWindows
from kvq_calib.errors import ConfigError
from kvq_calib.evaluate.compare import compare, frontier, runnable
from kvq_calib.evaluate.perplexity import PerplexityResult
from kvq_calib.evaluate.rivals import make_rivals, rival_names
from kvq_calib.evaluate.rivals.base import Rival, _WindowLayer, hadamard, uniform_roundtrip
from kvq_calib.evaluate.rivals.fp8 import FP8
from kvq_calib.evaluate.rivals.ggml import GGML
from kvq_calib.evaluate.rivals.kivi import KIVI
from kvq_calib.evaluate.rivals.kvarn import KVarN, balanced
from kvq_calib.evaluate.rivals.oscar import OscarStyle, attention_moments, calibrated_rotation
from kvq_calib.evaluate.rivals.transformers_cache import TransformersCache
from kvq_calib.evaluate.rivals.turboquant import TurboQuant, lloyd_max
from kvq_calib.model.compat import with_cache
from kvq_calib.model.inspect import inspect_model
from kvq_calib.model.intercept import intercept_calls
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry
from kvq_calib.schema.recipe import EvalConfig

pytestmark = pytest.mark.model

OWN = [name for name in rival_names() if make_rivals([name])[0].package is None]


def sample(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(count=1, length=64):
    return TokenWindows(token_ids(count, length), {"dataset": "random"})


def geometry(heads=8, width=128, layers=32):
    layer = LayerGeometry(num_query_heads=32, num_kv_heads=heads, head_dim=width)
    return KVGeometry(layers=(layer,) * layers)


def nearest(x, levels):
    """Round every number to the nearest level, one by one."""
    return np.array([levels[np.abs(levels - value).argmin()] for value in x])


def grid(x, bits):
    """The levels of an asymmetric uniform quantizer on its own numbers."""
    low, step = np.float16(x.min()), np.float16((x.max() - x.min()) / (2**bits - 1))
    return np.float64(low) + np.float64(step) * np.arange(2**bits)


def assert_nearest(actual, x, levels):
    """Ties and the last bits of float32 apart, every number went to the nearest level."""
    actual, x = actual.double().numpy(), x.double().numpy()
    assert np.abs(np.abs(actual - x) - np.abs(nearest(x, levels) - x)).max() < 1e-5
    assert np.abs(nearest(actual, levels) - actual).max() < 1e-5


def assert_nearest_within(actual, x, levels):
    """Every number went to a nearest level, but for the rounding of scales to float16."""
    step = levels[1] - levels[0] if len(levels) > 1 else 0
    assert np.abs(actual - x).max() <= step * 0.52 + 2e-3 * np.abs(x).max()
    assert np.abs(nearest(actual, levels) - actual).max() <= 2e-3 * np.abs(x).max()


# ------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_groups_keys_by_channel_and_values_by_token(bits):
    keys, values = sample(2, 3, 64, 16), sample(2, 3, 5, 64, seed=1)
    rival = KIVI(bits)
    done = rival.roundtrip(keys, "key", 0)
    for batch, head, channel, start in ((0, 0, 0, 0), (1, 2, 15, 32), (0, 1, 7, 32)):
        where = (batch, head, slice(start, start + 32), channel)
        assert_nearest(done[where], keys[where], grid(keys[where].double().numpy(), bits))
    done = rival.roundtrip(values, "value", 0)
    for batch, head, token, start in ((0, 0, 0, 0), (1, 2, 4, 32)):
        where = (batch, head, token, slice(start, start + 32))
        assert_nearest(done[where], values[where], grid(values[where].double().numpy(), bits))


def test_uniform_levels_of_a_constant_are_the_constant():
    x = torch.full((4, 8), 0.75)
    assert torch.equal(uniform_roundtrip(x, 2, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)), x)


@pytest.mark.parametrize("scope", ["tensor", "head"])
def test_fp8_rounds_to_e4m3_of_the_scaled_number(scope):
    # 4 exponent bits of bias 7, 3 of mantissa, subnormals below 2 ** -6; the largest is 448.
    positive = [m / 8 * 2**-6 for m in range(8)] + [
        (1 + m / 8) * 2 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
    ]
    levels = np.array(sorted({sign * value for sign in (-1, 1) for value in positive}))
    assert levels.max() == 448
    x = sample(1, 2, 3, 8) * torch.tensor([1.0, 30.0]).view(1, 2, 1, 1)
    done = FP8(scope).roundtrip(x, "key", 0)
    for head in range(2):
        scale = float((x if scope == "tensor" else x[:, head]).abs().max()) / 448
        assert_nearest(done[0, head].flatten(), x[0, head].flatten(), levels * scale)


@pytest.mark.parametrize("bits", [8, 5, 4])
def test_cache_types_of_llama_cpp_round_blocks_of_32_channels(bits):
    x = sample(1, 2, 3, 48) * 5
    x[0, :, 2] = 0  # a token of zeros
    done = GGML(bits).roundtrip(x, "key", 0)
    for token in range(3):  # 96 channels of two heads are three blocks
        row, found = (each[0, :, token].flatten().double().numpy() for each in (x, done))
        for start in (0, 32, 64):
            block = row[start : start + 32]
            top = block[np.abs(block).argmax()]
            if bits == 8:
                step = float(np.float16(abs(top) / 127))
                levels = np.arange(-127, 128) * step
            else:
                step = float(np.float16(top / -(2 ** (bits - 1))))
                levels = np.sort(np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * step)
            assert np.abs(found[start : start + 32][:, None] - levels).min(-1).max() < 1e-6
            # Half a step, and for 4 and 5 bits a whole one at the end that has no code.
            assert np.abs(found[start : start + 32] - block).max() <= (0.51 if bits == 8 else 1.01) * abs(
                step
            )
            assert found[start + np.abs(block).argmax()] == pytest.approx(top, rel=1e-3)


@pytest.mark.parametrize("bits", [4, 5])
def test_cache_types_with_a_minimum_round_between_the_ends_of_a_block(bits):
    x = sample(1, 2, 3, 48) * 5
    x[0, :, 2] = 0.75  # a token of equal numbers
    done = GGML(bits, offset=True).roundtrip(x, "key", 0)
    for token in range(3):
        row, found = (each[0, :, token].flatten().double().numpy() for each in (x, done))
        for start in (0, 32, 64):
            block = row[start : start + 32]
            assert_nearest_within(found[start : start + 32], block, grid(block, bits))


@pytest.mark.parametrize(("kind", "size"), [("key", 128), ("value", 64)])
def test_heads_are_rotated_as_llama_cpp_does(kind, size):
    """The rotated numbers of a head are what an unrotated head of the same numbers would round to."""
    x = sample(1, 1, 4, 128)
    signs = np.array([[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]) / size**0.5
    rotation = torch.tensor(np.kron(np.eye(128 // size), signs)).float()
    rotated = x @ rotation
    plain = GGML(4).roundtrip(rotated.reshape(1, 4, 4, 32).transpose(1, 2), kind, 0)  # four heads of 32
    expected = plain.transpose(1, 2).reshape(1, 1, 4, 128) @ rotation
    assert torch.allclose(GGML(4).roundtrip(x, kind, 0), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "offset", "stored"),
    [(8, False, 8.5), (5, False, 5.5), (4, False, 4.5), (5, True, 6.0), (4, True, 5.0)],
)
def test_cache_types_of_llama_cpp_take_one_or_two_halves_for_each_block(bits, offset, stored):
    assert GGML(bits, offset).bits_per_element(geometry(), 512) == stored


def test_kvarn_balances_tokens_and_channels():
    scales = torch.rand(2, 128, 1, generator=torch.Generator().manual_seed(1)) * 9 + 1
    tile = sample(2, 128, 64) * scales * torch.linspace(1, 5, 64)
    tokens, channels = balanced(tile)
    assert tokens.shape == (2, 128, 1)
    assert channels.shape == (2, 1, 64)
    even = tile / tokens / channels
    for along, limit in ((-1, 1.02), (-2, 1.6)):
        before, after = (each.std(along) for each in (tile, even))
        assert float((after.amax(-1) / after.amin(-1)).max()) < limit
        assert float((before.amax(-1) / before.amin(-1)).min()) > 4


def test_kvarn_rounds_keys_per_channel_and_values_per_token_of_a_tile():
    x = sample(1, 2, 256, 64) * torch.linspace(1, 20, 64)
    rotation = hadamard(64)
    tile = (x @ rotation)[0, 1, 128:]
    tokens, channels = balanced(tile)
    rival = KVarN(4, 2)
    keys = (rival.roundtrip(x, "key", 0)[0, 1, 128:] @ rotation) / tokens
    values = (rival.roundtrip(x, "value", 0)[0, 1, 128:] @ rotation) / channels
    for channel in (0, 63):
        line = (tile / tokens)[:, channel].double().numpy()
        assert_nearest_within(keys[:, channel].numpy(), line, grid(line, 4))
    for token in (0, 127):
        line = (tile / channels)[token].double().numpy()
        assert_nearest_within(values[token].numpy(), line, grid(line, 2))


def test_a_key_of_8_bits_in_turboquant_is_e4m3_without_a_scale():
    x = torch.tensor([[0.1, -3.3, 1000.0, 0.0]])
    assert TurboQuant(8, 4).roundtrip(x, "key", 0).tolist() == [[0.1015625, -3.25, 448.0, 0.0]]


def test_codebooks_are_those_of_max_1960():
    assert lloyd_max(2).tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=5e-4)
    assert lloyd_max(3)[4:].tolist() == pytest.approx([0.2451, 0.7560, 1.344, 2.152], abs=5e-4)
    assert lloyd_max(4)[8:].tolist() == pytest.approx(
        [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], abs=5e-4
    )


def test_turboquant_rounds_rotated_directions_and_keeps_norms():
    x = sample(1, 2, 5, 64) * 7
    rival = TurboQuant(3, 3)
    done = rival.roundtrip(x, "key", 0)
    assert torch.allclose(done.norm(dim=-1), x.norm(dim=-1), rtol=1e-3)  # float16 norms
    levels = lloyd_max(3).double().numpy() / 8
    for token in range(5):
        key = x[0, 1, token].double().numpy()
        rotation = np.array([[(-1) ** bin(i & j).count("1") for j in range(64)] for i in range(64)]) / 8
        rounded = nearest(key / np.linalg.norm(key) @ rotation, levels)
        expected = rotation @ (rounded / np.linalg.norm(rounded)) * np.linalg.norm(key)
        assert np.abs(done[0, 1, token].numpy() - expected).max() < 2e-2
    values = rival.roundtrip(x, "value", 0)
    assert_nearest(values[0, 0, 0], x[0, 0, 0], grid(x[0, 0, 0].double().numpy(), 3))


def test_turboquant_keeps_boundary_layers():
    model, ids, seen = tiny_model("llama", num_hidden_layers=6), token_ids(1, 24), {}

    def remember(call):
        seen[call.layer] = call.key.clone()

    rival = TurboQuant(3, 3)
    with intercept_calls(model, remember), torch.no_grad():
        rival.logits(model, ids)
    # A quantized key is its own quantized form; an exact one is not.
    again = {layer: rival.roundtrip(key, "key", layer) for layer, key in seen.items()}
    quantized = [torch.allclose(again[layer], seen[layer], rtol=1e-3, atol=1e-4) for layer in range(6)]
    assert quantized == [False, False, True, True, False, False]
    assert [rival.keeps(layer, 3) for layer in range(3)] == [True, False, True]
    assert not any(TurboQuant(3, 3, kept_layers=0).keeps(layer, 6) for layer in range(6))


def test_moments_weigh_keys_by_queries_and_values_by_scores():
    query, key, value = sample(2, 4, 5, 8), sample(2, 2, 5, 8, seed=1), sample(2, 2, 5, 8, seed=2)
    found = attention_moments(query, key, value)
    for_keys, for_values = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
    for head in range(2):
        rows = [query[b, 2 * head + g, t] for b in range(2) for g in range(2) for t in range(5)]
        for_keys[head] = sum(torch.outer(row, row) for row in rows) / len(rows)
        pairs = [(key[b, head, t], value[b, head, t]) for b in range(2) for t in range(5)]
        weights = torch.stack([k @ for_keys[head] @ k for k, _ in pairs])
        weights = weights / weights.mean()
        for_values[head] = sum(w * torch.outer(v, v) for w, (_, v) in zip(weights, pairs, strict=True)) / 10
    assert torch.allclose(found["key"].float(), for_keys.mean(0), atol=1e-5)
    assert torch.allclose(found["value"].float(), for_values.mean(0), atol=1e-5)


def test_calibrated_rotation_is_orthogonal_and_spreads_the_moment_evenly():
    half = sample(16, 16).double() * torch.arange(1, 17)
    moment = half @ half.T
    rotation = calibrated_rotation(moment).double()
    assert torch.allclose(rotation @ rotation.T, torch.eye(16).double(), atol=1e-6)
    # After the eigenvectors the moment is diagonal; a Hadamard matrix gives every coordinate the mean of it.
    spread = (rotation.T @ moment @ rotation).diagonal()
    assert torch.allclose(spread, moment.trace().expand(16) / 16, rtol=1e-5)


def test_oscar_clips_to_quantiles_of_the_rotated_token():
    model = tiny_model("llama")
    rival = OscarStyle()
    rival.prepare(model, text())
    width = inspect_model(model).layers[0].head_dim
    x = sample(1, 2, 3, width)
    done = rival.roundtrip(x, "value", 1)
    rotation = rival._rotations[1]["value"]
    token = (x[0, 1, 2] @ rotation).double().numpy()
    ordered = np.sort(token)
    kept = ordered[max(0, int(0.08 * width + 1e-9) - 1) : int(0.92 * width) + 1]
    expected = nearest(np.clip(token, kept[0], kept[-1]), grid(kept, 2))
    assert np.abs((done[0, 1, 2] @ rotation).double().numpy() - expected).max() < 5e-3


def test_hadamard_is_orthogonal():
    assert torch.allclose(hadamard(32) @ hadamard(32).T, torch.eye(32), atol=1e-6)


# ---------------------------------------------------------------------------------------------- windows


class Marked(KIVI):
    """Quantization that is seen at once: one is added per round trip."""

    def roundtrip(self, x, kind, layer):
        return x + 1


@pytest.mark.parametrize(
    ("rival", "key_history", "value_history"),
    [
        (Marked(2), lambda stored: stored - stored % 128, lambda stored: max(0, stored - 128)),
        (type("Sinks", (OscarStyle,), {"roundtrip": Marked.roundtrip})(), *[lambda n: max(0, n - 256)] * 2),
    ],
)
def test_history_is_quantized_once_and_windows_and_sinks_are_exact(rival, key_history, value_history):
    layer, exact = _WindowLayer(rival, 0), torch.empty(1, 2, 0, 4)
    for chunk in (100, 32, 1, 200, 32, 7, 64, 30):
        stored, new = exact.shape[2], sample(1, 2, chunk, 4, seed=chunk)
        exact = torch.cat([exact, new], 2)
        for read, history in zip(layer.update(new, new), (key_history, value_history), strict=True):
            expected = exact.clone()
            expected[:, :, rival.sinks : max(rival.sinks, history(stored))] += 1
            assert torch.equal(read, expected)
    assert stored > 400


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt_oss", "qwen3"])
def test_rivals_that_change_nothing_give_the_model_itself(family):
    model, ids = tiny_model(family), token_ids(1, 70)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        for base in (KIVI, FP8):
            rival = type("Same", (base,), {"roundtrip": lambda self, x, kind, layer: x})(
                "head" if base is FP8 else 2
            )
            assert torch.allclose(rival.logits(model, ids), expected, atol=2e-5)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


# ------------------------------------------------------------------------------------------------ bits


def test_bits_by_hand():
    shape = geometry()
    # 16 of 128 numbers are scale and zero point: a bit each. Windows: 63.5 keys and 128 values of 4096.
    window = (63.5 + 128) / 2 / 4096
    assert KIVI(2).bits_per_element(shape, 4096) == pytest.approx(3 + window * 13)
    assert KIVI(4).bits_per_element(shape, 4096) == pytest.approx(5 + window * 11)
    residual = 63.5 / 4096
    assert TransformersCache("hqq", 4).bits_per_element(shape, 4096) == pytest.approx(4.5 + residual * 11.5)
    assert FP8("tensor").bits_per_element(shape, 4096) == pytest.approx(8 + 32 / (4096 * 1024))
    assert FP8("head").bits_per_element(shape, 4096) == pytest.approx(8 + 32 / (4096 * 128))
    # vLLM's slot for a head of 128 at 3 bits: 48 + 2 bytes for the key, 48 + 4 for the value; 4 of 32 layers exact.
    slot = 8 * (50 + 52) / 256
    assert TurboQuant(3, 3).bits_per_element(shape, 4096) == pytest.approx(slot * 28 / 32 + 16 * 4 / 32)
    assert TurboQuant(3, 3, kept_layers=0).bits_per_element(shape, 4096) == pytest.approx(slot)
    # An e4m3 key of a head, and a value of 64 + 4 bytes.
    assert TurboQuant(8, 4, kept_layers=0).bits_per_element(shape, 4096) == pytest.approx(
        8 * (128 + 68) / 256
    )
    # 128 scales and 128 zero points of channels and 128 scales of tokens for a tile of 128 by 128, and an exact tail.
    tile = 16 * 3 * 128 / 128**2
    assert KVarN(2, 2).bits_per_element(shape, 1 << 30) == pytest.approx(2 + tile, rel=1e-6)
    assert KVarN(4, 2).bits_per_element(shape, 4096) == pytest.approx(3 + tile + residual * (13 - tile))
    assert OscarStyle().bits_per_element(shape, 131072) == pytest.approx(
        2.25 + 320 / 131072 * 13.75 + 16 * 128**2 / (2 * 1024 * 131072)
    )


@pytest.mark.parametrize("name", rival_names())
def test_what_is_shorter_than_the_windows_is_exact(name):
    (rival,) = make_rivals([name])
    bits = rival.bits_per_element(geometry(), 32)
    assert bits < 20.1  # a rotation that serves 32 tokens only weighs 4 bits
    assert rival.bits_per_element(geometry(), 1 << 20) <= bits


def test_a_sliding_window_bounds_what_is_stored_and_what_it_is_held_against():
    layer = LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=64, sliding_window=1024)
    shape = KVGeometry(layers=(layer, layer.model_copy(update={"sliding_window": None})))
    assert TurboQuant(4, 4, kept_layers=0).bits_per_element(shape, 4096) == pytest.approx(4 + 24 / 64)
    window = 2 * (63.5 + 128) / 2 / (1024 + 4096)
    assert KIVI(2).bits_per_element(shape, 4096) == pytest.approx(3 + window * 13)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_library_backends_run_and_hold_what_is_counted(backend, bits, monkeypatch):
    rival = TransformersCache(backend, bits)
    pytest.importorskip(rival.package[1])
    if backend == "quanto":
        from optimum.quanto.library.extensions import get_extension

        def unpack(packed, bits):
            return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])

        # In place of the C++ that it would compile.
        monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=unpack))
    model, ids = tiny_model("llama"), token_ids(1, 256)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        difference = (rival.logits(model, ids) - expected).abs().amax((0, 2))
        layer = _library_layer(rival, model.half(), token_ids(1, 128))
    assert difference[:32].max() < 1e-4  # the first call is exact
    assert difference[200:].min() > 1e-3
    held = sum(tensor.numel() * tensor.element_size() for part in layer for tensor in _tensors(part, backend))
    shape = inspect_model(model).layers[0]
    assert 8 * held == 128 * sum(rival.token_bits(shape, kind) for kind in ("key", "value"))


def _library_layer(rival, model, ids):
    """Stored keys and values of the first layer after one call, which quantizes everything."""
    from transformers import QuantizedCache

    axis = 1 if rival.backend == "hqq" else 0
    cache = QuantizedCache(rival.backend, model.config, nbits=rival.bits, axis_key=axis, axis_value=axis)
    model(input_ids=ids, **with_cache(cache))
    return cache.layers[0]._quantized_keys, cache.layers[0]._quantized_values


def _tensors(part, backend):
    if backend == "hqq":
        packed, meta = part
        return packed, meta["scale"], meta["zero"]
    return part._data._data, part._scale, part._shift


# ------------------------------------------------------------------------------- comparison and command


def result(name, bits, divergence):
    return PerplexityResult(
        name,
        "prefill",
        bits,
        1.0,
        1.0,
        divergence,
        1.0,
        ((0, 9, divergence),),
        (divergence,),
        1.0,
        tokens=10,
        seconds=0.0,
    )


def test_the_frontier_holds_what_nothing_beats():
    points = {"a": (2, 0.5), "b": (3, 0.1), "c": (3, 0.2), "d": (4, 0.1), "e": (8, 0.01), "f": (2.5, 0.5)}
    results = [result(name, *point) for name, point in points.items()]
    assert [one.name for one in frontier(results)] == ["a", "b", "e"]
    assert len(frontier([result("x", 3, 0.1), result("y", 3, 0.1)])) == 2


def test_one_run_measures_both_kinds_against_one_baseline():
    model = tiny_model("llama")
    artifact = artifact_for(model, recipe(key={"bits": 2}, value={"bits": 2}))
    rivals, skipped = runnable(make_rivals(OWN), model, True)
    assert not skipped
    passes = []
    hook = model.register_forward_hook(lambda module, inputs, output: passes.append(0))
    found = compare(model, {"ours": artifact}, rivals, text(2), EvalConfig(context=512), text())
    hook.remove()
    one_pass = sum(rival.mode == "prefill" for rival in rivals) + 1  # the artifact's
    chunks = sum(rival.mode == "decode" for rival in rivals) * 2
    # Two windows: baselines and contenders; and one pass that calibrates both rotations.
    assert len(passes) == 2 * (1 + one_pass + chunks) + 1
    assert [one.result.name for one in found.rivals] == OWN
    assert len({one.result.baseline_perplexity for one in (*found.artifacts, *found.rivals)}) == 1
    for one in found.rivals:
        assert math.isfinite(one.result.perplexity)
        assert one.bits_at[131072] <= one.result.bits_per_element
    by_name = {one.result.name: one.result.kl_mean for one in found.rivals}
    assert 0 < by_name["turboquant-4bit-all"] < by_name["turboquant-3bit-all"]
    assert by_name["fp8-head"] < by_name["turboquant-4bit-all"]


def test_an_artifact_with_a_recent_window_is_compared_in_decode_mode():
    model = tiny_model("llama")
    artifacts = {
        "recent": artifact_for(model, recipe(recent_tokens=64)),
        "plain": artifact_for(model, recipe()),
    }
    found = compare(model, artifacts, make_rivals(["fp8-head"]), text(), EvalConfig(context=512))
    recent, plain = found.artifacts
    assert (recent.result.mode, plain.result.mode) == ("decode", "prefill")
    assert recent.to_json()["mode"] == "decode"
    assert recent.result.kl_mean < 1e-5 < plain.result.kl_mean  # the text is as long as the window


def test_verdicts_name_winners_and_losers():
    model = tiny_model("llama")
    artifact = artifact_for(model, recipe(key={"bits": 8}, value={"bits": 8}))
    found = compare(model, {"eight": artifact}, make_rivals(["fp8-head"]), text(), EvalConfig(context=512))
    ours, theirs = found.artifacts[0].result, found.rivals[0].result
    lines = "\n".join(found.verdicts())
    assert ("fp8-head (reference) is on the frontier" in lines) == found.rivals[0].on_frontier
    beaten = theirs.bits_per_element <= ours.bits_per_element and theirs.kl_mean <= ours.kl_mean
    assert ("eight is beaten by fp8-head" in lines) == beaten
    assert found.rivals[0].on_frontier or found.artifacts[0].on_frontier


def test_obstacles_say_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = tiny_model("llama")
    _, skipped = runnable(make_rivals(["hqq-2bit", "quanto-4bit", "oscar-2bit", "kivi-2bit"]), model, False)
    assert dict(skipped) == {
        "hqq-2bit": "hqq is not installed: pip install hqq",
        "quanto-4bit": "optimum-quanto is not installed: pip install optimum-quanto",
        "oscar-2bit": "it is calibrated: name a text with --calibration",
    }
    monkeypatch.undo()
    _, skipped = runnable(make_rivals(["hqq-2bit"]), tiny_model("mistral"), True)
    assert dict(skipped) == {"hqq-2bit": "QuantizedCache supports no sliding windows"}
    odd = geometry(width=96)
    assert "no Hadamard matrix" in TurboQuant(4, 4).obstacle(odd, True)
    assert "no Hadamard matrix" in OscarStyle().obstacle(odd, True)
    assert "do not divide" in KIVI(2).obstacle(geometry(width=80), True)
    assert KIVI(2).obstacle(odd, True) is None


def test_a_library_that_fails_is_skipped_with_its_reason(monkeypatch):
    def fail(self, model, ids):
        raise OSError("no compiler\nmore of it")

    monkeypatch.setattr("kvq_calib.evaluate.rivals.base._installed", lambda module: True)
    monkeypatch.setattr(TransformersCache, "logits", fail)
    running, skipped = runnable(make_rivals(["quanto-2bit", "fp8-head"]), tiny_model("llama"), True)
    assert [rival.name for rival in running] == ["fp8-head"]
    assert skipped == [("quanto-2bit", "it fails here: no compiler more of it")]


def test_names_are_unique_and_unknown_ones_are_refused():
    assert len(set(rival_names())) == len(rival_names())
    assert [rival.name for rival in make_rivals(["kivi-2bit", "fp8-head", "kivi-2bit"])] == [
        "kivi-2bit",
        "fp8-head",
    ]
    assert all(isinstance(rival, Rival) and rival.settings and rival.source for rival in make_rivals())
    with pytest.raises(ConfigError, match="unknown rival 'x'; use one of fp8-tensor"):
        make_rivals(["x"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    model = tiny_model("llama")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for bits in (2, 4):
        spec = recipe(key={"bits": bits}, value={"bits": bits})
        artifact_for(model, spec).save(folder / f"nuq{bits}.kvq.safetensors")
    (folder / "text.txt").write_text(
        "".join(chr(97 + (i * i + i // 7) % 26) if i % 6 else " " for i in range(3000))
    )
    return folder


def run(place, *arguments):
    return call(
        "evaluate", "compare", str(place / "model"), "--artifact", str(place / "nuq4.kvq.safetensors"),
        "--artifact", str(place / "nuq2.kvq.safetensors"), "--dataset", str(place / "text.txt"), "--seqlen", "48",
        "--windows", "2", *arguments,
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_command_writes_table_json_and_chart(place, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("kvq_calib.evaluate.rivals.base._installed", lambda module: False)
    report, chart = tmp_path / "report.json", tmp_path / f"chart.{suffix}"
    status, out, err = run(
        place, "--calibration", str(place / "text.txt"), "--calibration-samples", "2", "--json", str(report),
        "--chart", str(chart),
    )  # fmt: skip
    assert status == 0, err
    assert "hqq-4bit: skipped, hqq is not installed: pip install hqq" in err.splitlines()
    content = json.loads(report.read_text())
    assert [one["name"] for one in content["artifacts"]] == ["nuq4", "nuq2"]
    assert [one["name"] for one in content["rivals"]] == OWN
    assert set(content["skipped"]) == set(rival_names()) - set(OWN)
    assert content["config"]["context"] == 48
    assert content["config"]["calibration_data"]["windows"] == 2
    everything = [*content["artifacts"], *content["rivals"]]
    for one in everything:
        assert {"perplexity", "kl_mean", "kl_p99", "top1_agreement", "mode", "origin", "settings"} <= set(one)
        beaten = any(
            other["bits_per_element"] <= one["bits_per_element"]
            and other["kl_mean"] <= one["kl_mean"]
            and (other["bits_per_element"], other["kl_mean"]) != (one["bits_per_element"], one["kl_mean"])
            for other in everything
        )
        assert one["on_frontier"] is not beaten
        assert re.search(rf"{re.escape(one['name'])} .*{one['bits_per_element']:.3f}", out)
    winners = [one["name"] for one in content["rivals"] if one["on_frontier"]]
    for name in winners:
        assert f"{name} (" in out
    data = chart.read_bytes()
    if suffix == "png":
        assert data.startswith(b"\x89PNG")
    else:
        drawn = data.decode()
        assert all(f">{one['name']}<" in drawn for one in everything)
        words = " ".join(re.sub(r"<[^>]*>", " ", drawn).split())
        note = f"rivals on the frontier: {', '.join(winners)}" if winners else "no rival is on the frontier"
        assert note in words


def test_mistakes_are_named_before_anything_is_measured(place, monkeypatch):
    status, _, err = run(place, "--rival", "nobody")
    assert status == 1
    assert_one_line(err, "unknown rival 'nobody'", "kivi-2bit")
    status, _, err = run(place, "--chart", "chart.pdf")
    assert status == 1
    assert_one_line(err, "chart.pdf", ".svg or .png")
    status, _, err = run(place, "--chart", str(place / "missing" / "chart.svg"))
    assert status == 1
    assert_one_line(err, "cannot write")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
    )
    status, _, err = run(place, "--chart", "chart.svg")
    assert status == 1
    assert_one_line(err, "pip install 'kvq-calib[report]'")
    assert "matplotlib" not in sys.argv
