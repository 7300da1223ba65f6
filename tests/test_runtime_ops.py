"""The choice of a cache's operations: by argument, by environment, by availability; and the protocol."""

from __future__ import annotations

import logging

import pytest
import torch
from artifact_factory import RECIPES, artifact_for
from models_zoo import tiny_model, token_ids
from native_factory import built_folder

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.compat import with_cache
from kvq_calib.native import loader
from kvq_calib.runtime import KVQCache, ops
from kvq_calib.runtime.cuda.ops import CudaOps
from kvq_calib.runtime.torch_ops import TorchOps

pytestmark = pytest.mark.model

CPU = torch.device("cpu")


class ToyOps:
    """Operations of another backend, which asks torch to do its work and takes notes."""

    name = "toy"
    closer = None

    def __init__(self, pair, calls):
        self._torch, self._calls = TorchOps(pair["key"], pair["value"]), calls
        self.rope = self._torch.rope

    def join(self, storage, keys, values, rotation):
        return None

    def pack(self, storage, keys, values):
        self._calls.append("pack")
        self._torch.pack(storage, keys, values)

    def attend(self, request, storage, table):
        self._calls.append("attend")
        return self._torch.attend(request, storage, table)

    def tables(self):
        return self._torch.tables()


@pytest.fixture
def registry(monkeypatch):
    """A registry of backends that is put back, without the native one, which is there or not."""
    others = {name: backend for name, backend in ops._backends.items() if name != "native"}
    monkeypatch.setattr(ops, "_backends", others)
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    ops._warn_once.cache_clear()


@pytest.fixture
def toy(registry):
    calls: list[str] = []

    def make(quantizers, device):
        return [ToyOps(pair, calls) for pair in quantizers]

    ops.register(ops.Backend("toy", make, lambda device: device.type == "cpu"))
    return calls


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def artifact(model):
    return artifact_for(model, RECIPES["nuq4-1p"])


def logits(model, cache):
    ids = token_ids(2, 80)
    with torch.no_grad():
        return torch.cat([model(part, **with_cache(cache)).logits for part in ids.split([70, 1, 9], 1)], 1)


def test_torch_is_always_there_and_last(toy):
    assert ops.backends() == ("cuda", "toy", "torch")


def test_a_registered_backend_runs_a_whole_cache(toy, model, artifact):
    cache = KVQCache(artifact, model)
    assert cache.backend == "toy"
    found = logits(model, cache)
    assert toy.count("pack") == len(cache.layers)
    assert toy.count("attend") == 3 * len(cache.layers)
    assert torch.equal(found, logits(model, KVQCache(artifact, model, backend="torch")))


def test_an_argument_wins_over_the_environment(toy, model, artifact, monkeypatch):
    monkeypatch.setenv("KVQ_CALIB_OPS", "torch")
    assert KVQCache(artifact, model).backend == "torch"
    assert KVQCache(artifact, model, backend="toy").backend == "toy"
    assert KVQCache(artifact, model, backend="auto").backend == "toy"
    monkeypatch.setenv("KVQ_CALIB_OPS", "")
    assert KVQCache(artifact, model).backend == "toy"


@pytest.fixture
def native(request, monkeypatch):
    """Libraries as the sources stand, and no variable set."""
    monkeypatch.setattr(loader, "FOLDER", built_folder(request.config))
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    monkeypatch.delenv("KVQ_CALIB_ISA", raising=False)
    ops._warn_once.cache_clear()


def test_native_kernels_are_what_a_cpu_gets(native, model, artifact, monkeypatch):
    cache = KVQCache(artifact, model)
    assert cache.backend == "native"
    found = logits(model, cache)
    monkeypatch.setenv("KVQ_CALIB_OPS", "torch")
    plain = KVQCache(artifact, model)
    assert plain.backend == "torch"
    theirs = logits(model, plain)
    assert float((found - theirs).abs().max()) < 1e-4 * float(theirs.std())
    held = [(layer.storage.key, layer.storage.value) for layer in cache.layers]
    others = [(layer.storage.key, layer.storage.value) for layer in plain.layers]
    for ours, torchs in zip(held, others, strict=True):
        for mine, other in zip(ours, torchs, strict=True):
            for page, same in zip(mine.pages, other.pages, strict=True):
                for name, tensor in page.tensors().items():
                    assert torch.equal(tensor.view(torch.uint8), same.tensors()[name].view(torch.uint8)), name


def test_native_kernels_that_are_not_there(native, model, artifact, monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    assert KVQCache(artifact, model).backend == "torch"
    with pytest.raises(
        RuntimeMismatchError, match="the native operations cannot be used: no native library is"
    ):
        KVQCache(artifact, model, backend="native")
    monkeypatch.setenv("KVQ_CALIB_OPS", "native")
    with pytest.raises(RuntimeMismatchError, match="KVQ_CALIB_OPS: the native operations cannot be used: "):
        KVQCache(artifact, model)
    monkeypatch.setenv("KVQ_CALIB_OPS", "torch")
    with pytest.raises(RuntimeMismatchError, match="cannot be used: KVQ_CALIB_OPS is 'torch'"):
        KVQCache(artifact, model, backend="native")


def test_a_name_from_the_environment_that_cannot_be_used_says_where_it_comes_from(
    registry, model, artifact, monkeypatch
):
    monkeypatch.setenv("KVQ_CALIB_OPS", "rocm")
    with pytest.raises(RuntimeMismatchError) as caught:
        KVQCache(artifact, model)
    assert str(caught.value) == "KVQ_CALIB_OPS: unknown backend 'rocm'; use one of auto, cuda, torch"
    monkeypatch.setenv("KVQ_CALIB_OPS", "cuda")
    if not torch.cuda.is_available():
        with pytest.raises(
            RuntimeMismatchError, match="KVQ_CALIB_OPS: the cuda operations cannot be used: there"
        ):
            KVQCache(artifact, model)


def test_what_cannot_run_is_passed_over_with_one_warning(registry, model, artifact, caplog):
    def make(quantizers, device):
        raise RuntimeMismatchError("no such instructions")

    ops.register(ops.Backend("toy", make, lambda device: True))
    caplog.set_level(logging.INFO, "kvq_calib.runtime")
    with pytest.warns(RuntimeWarning) as caught:
        caches = [KVQCache(artifact, model) for _ in range(2)]
    assert [cache.backend for cache in caches] == ["torch", "torch"]
    assert "torch operations on cpu (no toy: no such instructions)" in caplog.text
    (warning,) = caught
    assert warning.filename == __file__
    assert "toy operations cannot be used here, others take their place: no such" in str(warning.message)
    with pytest.raises(RuntimeMismatchError, match="the toy operations cannot be used: no such instructions"):
        KVQCache(artifact, model, backend="toy")


def test_what_does_not_serve_a_device_is_not_tried(registry, model, artifact):
    def make(quantizers, device):
        raise AssertionError("tried")

    ops.register(ops.Backend("toy", make, lambda device: False))
    assert KVQCache(artifact, model).backend == "torch"


def test_no_backend_is_another_one():
    assert not issubclass(CudaOps, TorchOps)
    assert CudaOps.__mro__[1:] == TorchOps.__mro__[1:] == (object,)


def test_tokens_can_be_stored_without_a_forward_pass(model, artifact):
    """Keys and values computed elsewhere, here by another cache of the same recipe."""
    ids = token_ids(2, 75)
    first, second = (KVQCache(artifact, model, backend="torch") for _ in range(2))
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in first.layers:

        def store(storage, keys, values, table, inner=layer.store):
            calls.append((keys, values))
            inner(storage, keys, values, table)

        layer.store = store
    with torch.no_grad():
        for part in ids.split([40, 30, 5], 1):
            model(part, **with_cache(first))
    layers = len(first.layers)
    for start in range(0, len(calls), layers):
        second.append(calls[start : start + layers])
    assert second.get_seq_length() == 75
    assert second.memory() == first.memory()
    with torch.no_grad():
        more = [model(ids[:, :1], **with_cache(cache)).logits for cache in (first, second)]
    assert torch.equal(*more)


@pytest.mark.parametrize("fault", ["too few layers", "another batch", "numbers that do not fit"])
def test_tokens_that_do_not_fit_leave_the_cache_as_it_was(model, artifact, fault):
    cache = KVQCache(artifact, model)
    logits(model, cache)
    before = cache.memory()
    tokens = [tuple(torch.randn(2, 2, 2, 40, 16)) for _ in cache.layers]
    if fault == "too few layers":
        tokens.pop()
    elif fault == "another batch":
        tokens[1] = tuple(torch.randn(2, 3, 2, 40, 16))
    else:
        tokens[1][1][0, 0, 3] = torch.inf
    with pytest.raises(ValueError if fault == "too few layers" else RuntimeMismatchError):
        cache.append(tokens)
    assert cache.memory() == before
    assert cache.get_seq_length() == 80
