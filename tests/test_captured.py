"""Decode steps as a CUDA graph, on a pretended GPU: the graph does again what was captured, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from artifact_factory import artifact_for, recipe, trellis
from models_zoo import tiny_model, token_ids
from pretended.device import PROPERTIES, pretended_cuda, watched
from pretended.drivers import Machine, installed, write_nvcc
from shim.host import compiler
from test_kernels import assert_same_pages
from torch import Tensor

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.compat import with_cache
from kvq_calib.runtime import KVQCache, captured_steps, detach
from kvq_calib.runtime.cuda import launcher as launchers

pytestmark = [pytest.mark.model, pytest.mark.skipif(compiler() is None, reason="no C++ compiler")]

GPU = torch.device("cuda", 0)
SPECS = {
    "trellis": recipe(key=trellis(3), value=trellis(4), sink_tokens=2, recent_tokens=3),
    "outliers": recipe(key={"bits": 4}, value={"bits": 4}, sink_tokens=2),
}


@pytest.fixture(params=["cuda-bindings"])
def gpu(request, monkeypatch, tmp_path) -> Iterator[Machine]:
    write_nvcc(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("KVQ_CALIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launchers, "_launchers", {})
    monkeypatch.setattr(
        PROPERTIES, "multi_processor_count", 1
    )  # pages are divided alike, so sums are equal bit for bit
    made = Machine()
    with installed(made, request.param), pretended_cuda():
        yield made


def on_gpu(spec: Any, family: str = "llama") -> tuple[Any, KVQCache, KVQCache]:
    """A model on the pretended GPU, and two caches for it."""
    model = tiny_model(family, head_dim=16).half()
    artifact = artifact_for(model, spec)
    model.to(GPU)
    return model, KVQCache(artifact, model), KVQCache(artifact, model)


def assert_same_caches(ours: KVQCache, theirs: KVQCache) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    mine, other = ours.memory(), theirs.memory()  # lets the storages have everything, too
    assert {**mine, "tables": 0} == {
        **other,
        "tables": 0,
    }  # addresses of pages are remembered by steps as ever
    for mine, other in zip(ours.contents.storages, theirs.contents.storages, strict=True):
        assert_same_pages(mine.key, other.key)
        assert_same_pages(mine.value, other.value)
        assert torch.equal(mine.tail_key, other.tail_key)
        assert torch.equal(mine.tail_value, other.tail_value)


@pytest.mark.parametrize("name", SPECS)
def test_a_graph_does_what_steps_do(gpu, name) -> None:
    """Over ends of blocks and of a page: the same logits, codes and outliers, and the host never waits."""
    model, ours, theirs = on_gpu(SPECS[name])
    ids = token_ids(2, 310, seed=2).to(GPU)
    with torch.no_grad():
        for cache in (ours, theirs):
            model(ids[:, :248], **with_cache(cache))
        with captured_steps(model, ours) as steps:
            for step in range(248, 300):
                new = ids[:, step : step + 1]
                with watched() as waits:
                    found = model(new, **with_cache(ours)).logits
                assert not waits or step == 248, (step, waits)
                want = model(new, **with_cache(theirs)).logits
                assert torch.equal(found, want), step
            assert (steps.captured, steps.replayed) == (1, 51)
        assert_same_caches(ours, theirs)
        for start, stop in ((300, 301), (301, 310)):  # as ever
            found, want = (model(ids[:, start:stop], **with_cache(c)).logits for c in (ours, theirs))
            assert torch.equal(found, want)
    detach(model)


@pytest.mark.parametrize(
    ("gpu", "padding"), [("pycuda", (0, 0)), ("cuda-bindings", (0, 23))], indirect=["gpu"]
)
def test_generate(gpu, padding) -> None:
    """The tokens that ``generate`` finds without, with and without padding."""
    model, ours, theirs = on_gpu(SPECS["trellis"])
    ids = token_ids(2, 50, seed=3).to(GPU)
    mask = (torch.arange(50) >= torch.tensor(padding)[:, None]).long().to(GPU)
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 45,
        "do_sample": False,
        "pad_token_id": 0,
    }
    want = model.generate(ids, **with_cache(theirs), **options)
    with captured_steps(model, ours) as steps:
        found = model.generate(ids, **with_cache(ours), **options)
        assert (steps.captured, steps.replayed) == (1, 43)
    assert torch.equal(found, want)
    assert_same_caches(ours, theirs)
    detach(model)


def test_windows(gpu) -> None:
    """Layers that see a window beside layers that see all."""
    model, ours, theirs = on_gpu(SPECS["outliers"], "gemma3_text")
    assert len(set(ours.contents.windows)) == 2
    ids = token_ids(1, 110, seed=2).to(GPU)
    with torch.no_grad():
        for cache in (ours, theirs):
            model(ids[:, :60], **with_cache(cache))
        with captured_steps(model, ours) as steps:
            for step in range(60, 100):
                new = ids[:, step : step + 1]
                found, want = (model(new, **with_cache(cache)).logits for cache in (ours, theirs))
                assert (found - want).norm() <= 2e-3 * want.norm(), step
        assert steps.replayed == 39
    detach(model)


def test_the_cache_is_its_own_between_steps(gpu) -> None:
    """Cropped, copied, asked for its size, given several tokens; other calls of the model go on as ever."""
    model, ours, theirs = on_gpu(SPECS["outliers"])
    ids = token_ids(1, 120, seed=4).to(GPU)

    def both(start: int, stop: int) -> None:
        found, want = (model(ids[:, start:stop], **with_cache(cache)).logits for cache in (ours, theirs))
        assert torch.equal(found, want), start

    with torch.no_grad(), captured_steps(model, ours) as steps:
        both(0, 60)
        for step in range(60, 64):
            both(step, step + 1)
        assert_same_caches(ours, theirs)  # the last step has completed a block
        for step in range(64, 66):
            both(step, step + 1)
        for cache in (ours, theirs):
            cache.crop(-2)
        for step in range(64, 70):
            both(step, step + 1)
        assert_same_caches(ours, theirs)
        both(70, 75)
        both(75, 76)
        assert (steps.captured, steps.replayed) == (3, 9)
        ours.reset(), theirs.reset()
        both(0, 40)
        both(40, 41)
        assert torch.equal(model(ids).logits, model(ids).logits)
    detach(model)


def test_without_a_graph(gpu, monkeypatch) -> None:
    """Where a step cannot be captured it runs by itself; where the cache is not CUDA's, as without."""
    model, ours, theirs = on_gpu(SPECS["trellis"])
    ids = token_ids(1, 60, seed=2).to(GPU)
    rotary = model.model.rotary_emb.forward

    def reading(x: Tensor, position_ids: Tensor) -> Any:
        position_ids.max().item()
        return rotary(x, position_ids)

    monkeypatch.setattr(model.model.rotary_emb, "forward", reading)
    with torch.no_grad():
        for cache in (ours, theirs):
            model(ids[:, :40], **with_cache(cache))
        with captured_steps(model, ours) as steps, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(40, 50):
                new = ids[:, step : step + 1]
                found, want = (model(new, **with_cache(cache)).logits for cache in (ours, theirs))
                assert torch.equal(found, want)
        assert steps.replayed == 0
        assert len(caught) == 1
        assert "not permitted when stream is capturing" in str(caught[0].message)
        other = KVQCache(ours.artifact, model, backend="torch")
        with pytest.warns(RuntimeWarning, match="runs on torch"), captured_steps(model, other):
            model(ids[:, :40], **with_cache(other))
    assert "forward" not in vars(model)
    detach(model)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("angles", "other angles"),
        ("numbers", "not finite"),
        ("mask", "mask hides"),
        ("positions", "follow each other"),
    ],
)
def test_what_steps_find_wrong(gpu, fault, message) -> None:
    """Found a block or two later, or when the cache is asked for; it is empty then."""
    model, ours, _ = on_gpu(SPECS["trellis"])
    ids = token_ids(1, 130, seed=2).to(GPU)
    mask = torch.ones(1, 130, dtype=torch.long, device=GPU)

    def take(start: int, stop: int, jump: int = 0) -> None:
        for step in range(start, stop):
            options = {"attention_mask": mask[:, : step + 1], **with_cache(ours)}
            positions = torch.full((1, 1), step + jump, device=GPU)
            model(ids[:, step : step + 1], position_ids=positions, **options)

    with torch.no_grad(), captured_steps(model, ours):
        model(ids[:, :40], **with_cache(ours))
        take(40, 45)
        if fault == "angles":
            model.model.rotary_emb.inv_freq *= 1.5
        elif fault == "numbers":
            model.model.layers[0].self_attn.v_proj.weight.fill_(60000.0)
        elif fault == "mask":
            mask[:, 3] = 0
        take(45, 60, int(fault == "positions"))
        with pytest.raises(RuntimeMismatchError, match=message):
            take(60, 129, int(fault == "positions"))
    assert ours.get_seq_length() == 0
    detach(model)


def test_a_step_that_fails(gpu) -> None:
    """The first leaves the cache as it was; after others there is no way back."""
    model, ours, theirs = on_gpu(SPECS["outliers"])
    ids = token_ids(1, 60, seed=2).to(GPU)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), captured_steps(model, ours):
        for cache in (ours, theirs):
            model(ids[:, :39], **with_cache(cache))
        for count in range(2):
            hook = model.model.layers[-1].register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, 39 + count : 40 + count], **with_cache(ours))
            hook.remove()
            if count == 0:
                assert_same_caches(ours, theirs)
                model(ids[:, 39:40], **with_cache(ours))
        assert ours.get_seq_length() == 0
    detach(model)
