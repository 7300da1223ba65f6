"""The Python side of the kernels on a pretended GPU: devices do not mix, and no decode step waits for one."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import test_kernels
import torch
from artifact_factory import artifact_for, recipe, trellis
from models_zoo import tiny_model, token_ids
from pretended.device import pretended_cuda, watched
from pretended.drivers import Machine, installed, write_nvcc
from shim.host import HostLauncher, compiler

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.compat import with_cache
from kvq_calib.runtime import KVQCache, detach
from kvq_calib.runtime.cuda import launcher as launchers
from kvq_calib.runtime.visibility import AttentionRequest, Visibility

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Iterator[Machine]:
    write_nvcc(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("KVQ_CALIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launchers, "_launchers", {})
    made = Machine()
    with installed(made, "pycuda"), pretended_cuda():
        yield made


@pytest.fixture
def machine(gpu) -> test_kernels.Machine:
    return test_kernels.Machine(launchers.launcher_for(GPU), GPU)


def test_devices_do_not_mix(gpu) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert (
        there.device == (there + 1).device == there.half().device == torch.cat((there, there)).device == GPU
    )
    assert there.cpu().device == torch.empty_like(here).device == torch.device("cpu")
    for mixed in (lambda: here + there, lambda: torch.cat((here, there)), lambda: there @ here):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    there[1:] = here[1:]
    assert (there * torch.tensor(2.0)).device == GPU
    with watched() as waits:
        for read in (
            lambda: bool(there.any()),
            lambda: there.tolist(),
            lambda: there[there > 0],
            lambda: there.to("cpu"),
        ):
            before = len(waits)
            read()
            assert len(waits) == before + 1
        there + 1
        assert len(waits) == 4


@pytest.mark.parametrize(
    "test",
    [
        test_kernels.test_a_cache_in_many_steps,
        test_kernels.test_a_cache_with_error_compensation_and_a_trellis,
        test_kernels.test_masks,
        test_kernels.test_sliding_window,
        test_kernels.test_nothing_visible_is_zero,
    ],
)
def test_a_cache_on_the_gpu(machine, test) -> None:
    test(machine)


@pytest.mark.parametrize("name", ["crowded", "token-no-outliers"])
def test_append_on_the_gpu(machine, name) -> None:
    test_kernels.test_append_is_bit_equal(machine, name, 64)


@pytest.mark.parametrize("name", ["3bit-128-g4", "mixed6-96-g4-softcap-sink", "trellis4-64-g3-bfloat16"])
def test_decode_on_the_gpu(machine, name) -> None:
    test_kernels.test_decode_and_dequantize(machine, name)


@pytest.mark.model
@pytest.mark.parametrize(
    "spec",
    [recipe(key=trellis(4), value=trellis(4), sink_tokens=2), recipe(key={"bits": 4}, value={"bits": 4})],
    ids=["trellis", "outliers"],
)
def test_steps_wait_only_where_a_block_is_packed(gpu, spec) -> None:
    model = tiny_model("llama", head_dim=16).half()
    artifact = artifact_for(model, spec)
    model.to(GPU)
    cache = KVQCache(artifact, model)
    assert cache.backend == "cuda"
    ids = token_ids(1, 110, seed=2).to(GPU)
    waited = []
    with torch.no_grad():
        model(ids[:, :40], **with_cache(cache))
        for step in range(40, 110):
            with watched() as waits:
                model(ids[:, step : step + 1], **with_cache(cache))
            waited += [step] if waits else []
    # A step that completes a block looks at its numbers, and the step that reads it first looks at its positions.
    assert waited == [40, 63, 64, 95, 96]
    assert cache.table.blocks == 3
    launches = [note[1] for note in gpu.notes if note[0] == "launch"]
    assert launches.count("decode_attention") == 70 * model.config.num_hidden_layers
    detach(model)


@pytest.mark.model
def test_wrong_angles_are_found_by_the_next_block(gpu) -> None:
    """Steps of one token do not look; the step that would pack their block does, and is undone."""
    model = tiny_model("llama", head_dim=16).half()
    artifact = artifact_for(model, recipe(key=trellis(4), value=trellis(4)))
    model.to(GPU)
    cache = KVQCache(artifact, model)
    ids = token_ids(1, 64, seed=2).to(GPU)
    with torch.no_grad():
        model(ids[:, :40], **with_cache(cache))
        model.model.rotary_emb.inv_freq *= 1.5
        for step in range(40, 63):
            model(ids[:, step : step + 1], **with_cache(cache))
        with pytest.raises(RuntimeMismatchError, match="other angles than at calibration"):
            model(ids[:, 63:], **with_cache(cache))
        assert cache.get_seq_length() == 63
        cache.reset()
        with pytest.raises(RuntimeMismatchError, match="other angles than at calibration"):
            model(ids[:, :2], **with_cache(cache))
    detach(model)


class Idle(HostLauncher):
    """Launches nothing."""

    def constant(self, source: str, defines: tuple[str, ...], name: str) -> int:
        return {"decode_shared_bytes": 60_000, "decode_resident_blocks": 3}[name]

    def kernel(self, *arguments):
        return lambda *call: None


@pytest.mark.parametrize("heads", [2, 32])
def test_a_step_takes_few_calls_on_the_host(heads: int) -> None:
    """The host's time for the attention of a layer: 30 microseconds and less with 70 calls of Python and C."""
    here = test_kernels.Machine(Idle(132), torch.device("cpu"))
    cache = test_kernels.Cache(here, test_kernels.SMALL, test_kernels.geometry(64, heads, 1), 1)
    cache.table.append(torch.arange(300)[None], None)
    keys, values = (cache.layer.tokens(kind, 1, 300) for kind in ("key", "value"))
    storage = cache.storages[0]
    storage.append(keys, values, cache.table, cache.theirs.pack)
    query = torch.zeros(1, heads, 1, 64, dtype=torch.float16)
    request = AttentionRequest(query, Visibility(None, 300, 1, None), 0.125)
    calls = 0

    def count(frame, event, argument) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    for _ in range(2):  # the first compiles, and makes tables
        calls = 0
        sys.setprofile(count)
        try:
            cache.ours.attend(request, storage, cache.table)
        finally:
            sys.setprofile(None)
    assert calls <= 70
