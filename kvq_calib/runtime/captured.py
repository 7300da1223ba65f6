"""Decode steps as a CUDA graph: a step is captured once and replayed for every further token.

Everything that changes from token to token is on the device (:mod:`kvq_calib.runtime.cuda.step`), so the host has no
work per layer. It copies the inputs, replays the graph, and counts. It never waits, not even for a step that packs a
block. Therefore, errors in a step are noticed only a block or two later.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS
from kvq_calib.model.compat import with_cache
from kvq_calib.runtime.cache import KVQCache
from kvq_calib.runtime.cache_layer import KVQCacheLayer
from kvq_calib.runtime.cuda.ops import CudaOps
from kvq_calib.runtime.step_cache import StepCache

__all__ = ["CapturedSteps", "captured_steps"]

#: Smallest number of blocks to allocate when steps begin.
ROOM = 128
#: Options of a forward pass that make its results more than logits.
_MORE = ("labels", "output_attentions", "output_hidden_states")


@contextmanager
def captured_steps(model: nn.Module, cache: KVQCache) -> Iterator[CapturedSteps]:
    """Run a model's steps of one token over a cache as a CUDA graph, also in ``model.generate``::

        with captured_steps(model, cache):
            model.generate(**inputs, cache=cache)

    The prompt, and everything else that is not a step of one token, runs as usual. A step stores and attends to the
    same numbers with or without a graph. If the cache does not support graphs, a warning says why, and all steps run as
    usual.

    Args:
        model: the model of the cache.
        cache: a cache with the backend ``"cuda"``.

    Raises:
        RuntimeMismatchError: a step found an error: numbers that are not finite in the storage dtype, positions that do
            not follow each other, other angles than at calibration, or a changed mask. Then the cache is empty.
    """
    steps = CapturedSteps(model, cache)
    reason = _cannot(steps.signature, cache)
    if reason:
        warnings.warn(f"steps are not captured: {reason}", RuntimeWarning, stacklevel=3)
        yield steps
        return
    before = vars(model).get("forward")

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return steps.forward(*args, **kwargs)

    model.forward = forward
    try:
        yield steps
        cache.contents.settle()
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


def _cannot(signature: inspect.Signature, cache: KVQCache) -> str:
    """Why steps of a cache cannot be captured, or an empty string."""
    ops = [layer.ops for layer in cache.packed]
    reasons = [op.reason for op in ops if isinstance(op, CudaOps) and op.reason]
    if cache.backend != CudaOps.name:
        return f"the cache runs on {cache.backend}, not on CUDA kernels"
    if reasons:
        return reasons[0]
    if any(type(layer) is not KVQCacheLayer for layer in cache.packed):
        return "this model needs dequantized keys and values"
    if cache.states:
        return "other layers of this model keep a state of their own"
    if cache.forward_pass.rope_switch is not None:
        return "this model changes its rotary angles with the length of the text"
    if "position_ids" not in signature.parameters:
        return "this model takes no position_ids"
    return ""


class CapturedSteps:
    """The forward pass of a model within :func:`captured_steps`.

    Args:
        model: the model.
        cache: its cache.

    Attributes:
        replayed: number of steps that ran as a graph.
        captured: number of graphs that were captured.
    """

    def __init__(self, model: nn.Module, cache: KVQCache) -> None:
        self.cache = cache
        self.replayed = self.captured = 0
        self.signature = inspect.signature(model.forward)
        self._forward: Callable[..., Any] = model.forward
        self._steps: StepCache | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Any = None
        self._tensors: dict[str, Tensor] = {}
        self._options: dict[str, Any] = {}
        self._can_capture = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; steps of one token over the cache run as a graph."""
        given = {**self.signature.bind_partial(*args, **kwargs).arguments}
        given.update(given.pop(self._rest, {}))
        if not self._serves(given):
            return self._forward(*args, **kwargs)
        mask = given.pop("attention_mask", None)
        steps = self._opened(mask)
        if steps is None:
            return self._forward(*args, **kwargs)
        try:
            self._take(given, steps)
            steps.before(self._tensors["position_ids"], mask)
            output = self._run(steps)
            steps.after()
        except BaseException:
            self._steps = None
            steps.abandon()
            raise
        return type(output)(**{name: x.clone() if isinstance(x, Tensor) else x for name, x in output.items()})

    @functools.cached_property
    def _rest(self) -> str:
        """The name of the forward's parameter for other keyword arguments."""
        kinds = self.signature.parameters.values()
        return next((each.name for each in kinds if each.kind is each.VAR_KEYWORD), "")

    def _serves(self, given: dict[str, Any]) -> bool:
        """Whether this call is a step of one token that can be captured."""
        cache, table = self.cache, self.cache.table
        ids, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        (name,) = with_cache(cache)
        if given.get(name) is not cache or table is None or torch.is_grad_enabled() or table.missing_sinks:
            return False
        if any(given.get(option) for option in _MORE) or given.get("return_dict") is False:
            return False
        shape = (table.batch, 1)
        if ids is None or ids.shape != shape or given.get("inputs_embeds") is not None:
            return False
        if positions is not None and (positions.ndim != 2 or positions.shape[0] not in (1, table.batch)):
            return False
        if mask is not None and (mask.ndim != 2 or mask.shape != (table.batch, table.length + 1)):
            return False
        return cache.max_tokens is None or table.length < cache.max_tokens

    def _opened(self, mask: Tensor | None) -> StepCache | None:
        """The storage for steps of the current cache, or ``None`` if they cannot be captured."""
        cache = self.cache
        if self._steps is None or not self._steps.goes_on(mask):
            cache.contents.settle()
            self._steps, self._graph = None, None
            assert cache.table is not None
            room = max(2 * cache.table.blocks, cache.table.blocks + ROOM)
            if cache.max_tokens is not None:
                room = min(room, cache.table.blocks + -(-cache.max_tokens // BLOCK_TOKENS))
            self._steps = StepCache.of(cache, mask, -(-room // PAGE_BLOCKS) * PAGE_BLOCKS)
        return self._steps

    def _take(self, given: dict[str, Any], steps: StepCache) -> None:
        """Copy the inputs to the tensors that the graph reads."""
        table = self.cache.table
        assert table is not None
        device = given["input_ids"].device
        if given.get("position_ids") is None:
            given["position_ids"] = torch.full((1, 1), table.length, device=device)
        given["position_ids"] = given["position_ids"].expand(table.batch, 1)
        if given.get("cache_position") is None and "cache_position" in self.signature.parameters:
            given["cache_position"] = torch.full((1,), table.length, device=device)
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        options = {name: x for name, x in given.items() if name not in tensors}
        known = {name: (x.shape, x.dtype) for name, x in self._tensors.items()}
        if options != self._options or known != {name: (x.shape, x.dtype) for name, x in tensors.items()}:
            self._tensors = {name: torch.empty_like(x).contiguous() for name, x in tensors.items()}
            self._options, self._graph = options, None
        for name, x in tensors.items():
            self._tensors[name].copy_(x)

    def _run(self, steps: StepCache) -> Any:
        """Run a step. The first one runs uncaptured, so that everything is loaded; later ones are captured and
        replayed.
        """

        def step() -> Any:
            with steps.in_place():
                return self._forward(**self._tensors, **self._options)

        if steps.taken == 0 or not self._can_capture:
            # On another stream, as in the capture, so that all objects of a stream exist.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                output = step()
            torch.cuda.current_stream().wait_stream(side)
            return output
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self._output = step()
            except RuntimeError as error:
                self._can_capture = False
                reason = str(error).splitlines()[0]
                warnings.warn(
                    f"a step cannot be captured ({reason}); steps run without", RuntimeWarning, stacklevel=4
                )
                return self._run(steps)
            self._graph = graph
            self.captured += 1
        self._graph.replay()
        self.replayed += 1
        return self._output
