"""What must hold for a model of any kind, from calibration to generation: the same checks for all of them."""

from __future__ import annotations

import torch
from models_zoo import token_ids

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows
from kvq_calib.evaluate.perplexity import EvalConfig, measure_perplexity
from kvq_calib.model.compat import with_cache
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import check_generation
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
    """Evaluation in one pass and through the packed cache give the same KL, within a tenth.

    Single tokens see up to 31 exact neighbours more, so there it is less.
    """
    data = TokenWindows(token_ids(6, 96, seed=5), {"sha256": ""})
    kl = []
    for config in (EvalConfig(mode="prefill"), EvalConfig(mode="decode", chunk=32)):
        (found,) = measure_perplexity(model, {"x": artifact}, data, config)
        kl.append(found.kl_mean)
    assert kl[0] > 1e-4, "nothing was quantized"
    least = 0.2 if takes_single_tokens(model, artifact) else 0.9
    assert least < kl[1] / kl[0] < 1.1, kl


@torch.no_grad()
def assert_passes_are_exact(model, artifact: KVArtifact, cache=None) -> None:
    """With all tokens exact, a text in several passes gives the logits of one."""
    parts = (38, 1, 1) if takes_single_tokens(model, artifact) else (17, 22, 1)
    ids = token_ids(2, sum(parts), seed=2)
    cache = KVQCache(artifact, model, recent_tokens=EVERYTHING) if cache is None else cache
    got = torch.cat([model(input_ids=part, **with_cache(cache)).logits for part in ids.split(parts, 1)], 1)
    want = model(input_ids=ids, use_cache=False).logits
    assert float((got - want).abs().max() / want.abs().max()) < ROUNDING


def assert_generates_alike(model, artifact: KVArtifact, **options) -> None:
    """With all tokens exact, generation gives the tokens of the model's own cache, one row being left-padded."""
    ids = token_ids(2, 29, seed=3)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    cache = KVQCache(artifact, model, recent_tokens=EVERYTHING)
    ours, own = (
        model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=8, **with_cache(each), **options
        )
        for each in (cache, None)
    )
    assert torch.equal(ours, own)
    assert cache.get_seq_length() == ours.shape[1] - 1


@torch.no_grad()
def logits_after(model, cache, ids: torch.Tensor) -> torch.Tensor:
    """Logits of more tokens."""
    parts = ids.split(1, dim=1) if cache.single_tokens and cache.get_seq_length() else (ids,)
    return torch.cat([model(input_ids=part, **with_cache(cache)).logits for part in parts], dim=1)
