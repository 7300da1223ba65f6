"""Checks from calibration to generation that every kind of model must pass."""

from __future__ import annotations

from array import array
from statistics import median

import pytest
import torch
from models_zoo import tiny_model, token_ids
from transformers import AutoConfig

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.run import calibrate
from kvq_calib.codec.packing import BLOCK_TOKENS
from kvq_calib.data import TokenWindows
from kvq_calib.evaluate.perplexity import EvalConfig, measure_perplexity
from kvq_calib.model.compat import with_cache
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import check_generation, inspect_model, next_pass
from kvq_calib.runtime import KVQCache
from kvq_calib.schema.recipe import calibration_config

#: Exact tokens are stored in float16 or bfloat16 unless the recipe's dtype is wider; results are those of it.
ROUNDING = 0.02
EVERYTHING = 10**6


def calibrated(model, recipe: str = "kvq4", assignments=()) -> KVArtifact:
    """An artifact of a model, calibrated on random tokens and read again from its own bytes."""
    made = calibrate(
        model,
        TokenWindows(token_ids(2, 64, seed=1), {"sha256": ""}),
        {recipe: calibration_config(recipe, assignments=assignments)},
        model_id=model.config.model_type,
        model_config=model_fingerprint(model),
    ).artifacts[recipe]
    read = KVArtifact.from_bytes(made.to_bytes())
    assert read.geometry == made.geometry
    return read


def takes_single_tokens(model, artifact: KVArtifact) -> bool:
    """Whether the model continues a text by one token at a time only, with its own cache too."""
    return check_generation(model, artifact.geometry).single_tokens


def assert_modes_agree(model, artifact: KVArtifact) -> None:
    """Evaluation in one pass and through the packed cache give the same KL, within a tenth, in the median window.

    Where experts are chosen, a rounding error may choose another one, so single windows can differ by far more. A
    model that takes single tokens would see up to 31 exact neighbours of each in the cache, and its states would
    include less error. So it gets the whole text in its first pass.
    """
    ids = token_ids(16, 96, seed=5)
    chunk = ids.shape[1] if takes_single_tokens(model, artifact) else BLOCK_TOKENS
    prefill, decode = (
        measure_perplexity(model, {"x": artifact}, TokenWindows(ids, {"sha256": ""}), config)[0].kl_windows
        for config in (EvalConfig(mode="prefill"), EvalConfig(mode="decode", chunk=chunk))
    )
    assert min(prefill) > 1e-4, "nothing was quantized"
    assert 0.9 < median(b / a for a, b in zip(prefill, decode, strict=True)) < 1.1, (prefill, decode)


@torch.no_grad()
def assert_passes_are_exact(model, artifact: KVArtifact, cache=None) -> None:
    """With all tokens exact, a text in several passes gives the logits of one."""
    parts = (38, 1, 1) if takes_single_tokens(model, artifact) else (17, 22, 1)
    ids = token_ids(2, sum(parts), seed=2)
    cache = KVQCache(artifact, model, recent_tokens=EVERYTHING) if cache is None else cache
    got = through(model, cache, ids, parts)
    want = model(input_ids=ids, use_cache=False).logits
    assert float((got - want).abs().max() / want.abs().max()) < ROUNDING


def assert_generates_alike(model, artifact: KVArtifact, **options) -> None:
    """With all tokens exact, generation gives the tokens of the model's own cache, one row being left-padded.

    That of MiniMax does not reorder its states for beams, and does not know how long the text is if its first layer
    keeps a state. Then the tokens are those without a cache.
    """
    ids = token_ids(2, 29, seed=3)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    cache = KVQCache(artifact, model, recent_tokens=EVERYTHING)
    ours, own, without = (
        model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8, **given, **options)
        for given in (with_cache(cache), {}, {"use_cache": False})
    )
    assert torch.equal(ours, without if model.config.model_type == "minimax" else own)
    assert cache.get_seq_length() == ours.shape[1] - 1


@torch.no_grad()
def logits_after(model, cache, ids: torch.Tensor) -> torch.Tensor:
    """Logits of more tokens."""
    alone = cache.single_tokens and cache.get_seq_length()
    return through(model, cache, ids, [1] * ids.shape[1] if alone else [ids.shape[1]])


@torch.no_grad()
def through(model, cache, ids: torch.Tensor, parts) -> torch.Tensor:
    """Logits of a text that goes through a cache in parts of these lengths."""
    start = cache.get_seq_length()
    logits = []
    for part in ids.split(list(parts), dim=1):
        logits.append(model(**next_pass(model, part, cache, start)).logits)
        start += part.shape[1]
    return torch.cat(logits, dim=1)


def assert_the_whole_chain(model) -> KVArtifact:
    """All of it; the artifact."""
    artifact = calibrated(model)
    assert artifact.geometry == inspect_model(model)
    assert_modes_agree(model, artifact)
    assert_passes_are_exact(model, artifact)
    assert_generates_alike(model, artifact)
    assert_generates_alike(model, artifact, num_beams=2)
    return artifact


def assert_go_on_alike(model, cache, other) -> None:
    """Two caches give the same logits for what comes next."""
    more = token_ids(2, 5, seed=6)
    got, want = (logits_after(model, each, more) for each in (cache, other))
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))


def bytes_in(roots, without=()) -> int:
    """Bytes of all tensors and arrays that are reachable from some objects, and not from others."""

    def tensors(todo):
        found, seen = {}, set()
        while todo:
            item = todo.pop()
            if id(item) in seen or isinstance(item, torch.nn.Module | type):
                continue
            seen.add(id(item))
            if isinstance(item, torch.Tensor):
                found[item.data_ptr(), item.shape] = item.nbytes
            elif isinstance(item, array):
                found[id(item), None] = len(item) * item.itemsize
            elif isinstance(item, dict):
                todo += item.values()
            elif isinstance(item, list | tuple):
                todo += item
            elif hasattr(item, "__dict__"):
                todo += vars(item).values()
        return found

    apart = tensors(list(without))
    return sum(size for key, size in tensors(list(roots)).items() if key not in apart)


def assert_memory_is_what_buffers_hold(cache) -> None:
    """What a cache says of the memory that its tokens take is what all its tensors hold."""
    others = [layer for layer in cache.layers if layer not in cache.packed]
    states = [layer for layer in others if "layer" not in vars(layer)]  # that which only stands for another
    states += [vars(layer)["state"] for layer in cache.packed if "state" in vars(layer)]
    own = [] if cache.states.own is None else vars(cache.states.own.cache)
    held = bytes_in([cache.contents.table, cache.contents.storages, states, own], [cache.quantizers])
    assert held == sum(size for kind, size in cache.memory().items() if kind not in ("parameters", "tables"))


def assert_crops(model, artifact: KVArtifact, tokens: int = 100) -> None:
    """A cropped cache goes on as one that never saw more."""
    ids = token_ids(2, tokens, seed=4)
    cache, other = KVQCache(artifact, model), KVQCache(artifact, model)
    logits_after(model, cache, ids)
    logits_after(model, other, ids[:, :-4])
    cache.crop(-4)
    assert cache.get_seq_length() == tokens - 4
    assert_go_on_alike(model, cache, other)


def model_of(family: str, **settings):
    """A tiny model; the test is skipped where this transformers does not have the family."""
    try:
        AutoConfig.for_model(family)
    except ValueError:
        pytest.skip("this transformers does not have it")
    return tiny_model(family, **settings)
