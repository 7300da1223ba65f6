"""A whole model with the kernels: KVQCache with their host build against KVQCache with torch."""

from __future__ import annotations

import pytest
import torch
from artifact_factory import artifact_for, recipe
from models_zoo import tiny_model, token_ids
from shim.host import HostLauncher, compiler

from kvq_calib.codec.packing import PageLayout
from kvq_calib.model.compat import with_cache
from kvq_calib.runtime import KVQCache, detach
from kvq_calib.runtime import ops as backends
from kvq_calib.runtime.cuda.ops import CudaOps, ops_with

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler"),
]

#: Rounding an activation otherwise moves a code now and then; at 8 bits a step is small.
SPEC = recipe(key={"bits": 8}, value={"bits": 8}, sink_tokens=2)


@pytest.fixture
def host_kernels(monkeypatch):
    """Let "cuda" mean the host build."""
    launcher = HostLauncher()
    host = backends.Backend(
        "cuda", lambda quantizers, device: ops_with(quantizers, launcher), lambda device: True
    )
    monkeypatch.setattr(backends, "_backends", dict(backends._backends))
    backends.register(host)
    return launcher


@pytest.mark.parametrize("starts", [torch.int16, torch.int32])
@pytest.mark.parametrize("padding", [(0,), (0, 19)])
def test_logits_agree_with_torch(host_kernels, monkeypatch, padding, starts) -> None:
    monkeypatch.setattr(PageLayout, "start_dtype", lambda layout, batch: starts)
    model = tiny_model("llama", head_dim=16).half()
    artifact = artifact_for(model, SPEC)
    ids = token_ids(len(padding), 110, seed=2)
    mask = (torch.arange(110) >= torch.tensor(padding)[:, None]).long()
    found = []
    for backend in ("cuda", "torch"):
        cache = KVQCache(artifact, model, backend=backend)
        logits = []
        with torch.no_grad():
            for start, stop in [(0, 90), *((i, i + 1) for i in range(90, 110))]:
                extra = {"attention_mask": mask[:, :stop]} if any(padding) else {}
                out = model(ids[:, start:stop], **with_cache(cache), **extra)
                logits.append(out.logits)
        found.append(torch.cat(logits, dim=1).float()[mask.bool()])
        detach(model)
    assert host_kernels.launches.count("decode_attention") == 20 * model.config.num_hidden_layers
    ours, theirs = found
    assert (ours - theirs).norm() <= 5e-3 * theirs.norm()


def test_the_backend_says_its_name(host_kernels) -> None:
    model = tiny_model("llama", head_dim=16)
    cache = KVQCache(artifact_for(model, SPEC), model, backend="cuda")
    assert cache.backend == CudaOps.name == "cuda"
    with torch.no_grad():
        model(token_ids(1, 40), **with_cache(cache))
    assert "append_blocks" in host_kernels.launches
    assert cache.nbytes == sum(cache.memory().values())
    detach(model)
