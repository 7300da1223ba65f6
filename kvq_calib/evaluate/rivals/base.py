"""The base of all rivals: hooks into the model, exact tokens, and the count of bits.

A rival without a window of recent exact tokens is measured in one forward pass ("prefill"), like artifacts: every query
reads quantized keys and values, including those of its token. A rival with a window gets the text in short chunks
("decode"): a query reads the tokens quantized so far, and the other tokens and its chunk exactly, as in use.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvq_calib.data import TokenWindows
from kvq_calib.evaluate.decode import logits_through
from kvq_calib.evaluate.text_pass import Mode
from kvq_calib.model.intercept import AttentionCall, intercept_calls
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, cache_elements
from kvq_calib.schema.spec import KINDS, Kind

__all__ = ["QuantizerRival", "Rival", "hadamard", "uniform_roundtrip"]

#: Bits of an exact number, a scale or a zero point, as in a half-precision model.
HALF = 16


class Rival(ABC):
    """One method with one setting.

    Attributes:
        name: name on the command line and in tables.
        origin: ``library`` (the original library runs), ``reference`` (written here from the paper), or
            ``in the style of`` (a part of the method; ``settings`` says what is left out).
        source: paper or library.
        settings: how numbers are stored, in one line.
        package: argument of ``pip install``, and the name of its module; ``None`` if nothing is needed.
        calibrated: whether :meth:`prepare` needs text.
    """

    name: str
    origin: Literal["library", "reference", "in the style of"]
    source: str
    settings: str
    package: tuple[str, str] | None = None
    calibrated = False
    sinks = 0
    recent = 0

    @property
    def mode(self) -> Mode:
        """How it is measured; see the description of the module."""
        return "decode" if self.recent else "prefill"

    def obstacle(self, geometry: KVGeometry, has_text: bool) -> str | None:
        """Why it cannot run here and what to do, in a few words; ``None`` if it can.

        Args:
            geometry: geometry of the model.
            has_text: whether there is calibration text.
        """
        if self.package is not None and not _installed(self.package[1]):
            return f"{self.package[0]} is not installed: pip install {self.package[0]}"
        if geometry.attends_to or geometry.held_state(1):
            return "it is written for models whose layers cache keys and values and nothing else"
        if self.calibrated and not has_text:
            return "it is calibrated: name a text with --calibration"
        return None

    def prepare(self, model: Any, text: TokenWindows | None) -> None:  # noqa: B027 (most need nothing)
        """Calibrate on windows of token ids, int64 ``[N, T]``."""

    @abstractmethod
    def logits(self, model: Any, ids: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of ``ids`` (int64 ``[B, T]``) with the cache quantized. The model is left unchanged."""

    @abstractmethod
    def token_bits(self, layer: LayerGeometry, kind: Kind) -> float:
        """Bits of the keys or values of one quantized token in one layer: codes, scales, zero points, norms."""

    def exact_tokens(self, kind: Kind, context: int) -> float:
        """Exact tokens among ``context``; the mean, where a window of exact tokens fills and is emptied at once."""
        return float(min(self.sinks + self.recent, context))

    def keeps(self, index: int, layers: int) -> bool:
        """Whether layer ``index`` of ``layers`` layers is left unquantized."""
        return False

    def constant_bits(self, layer: LayerGeometry, kind: Kind) -> float:
        """Bits that do not depend on the length: a scale per tensor, a rotation."""
        return 0.0

    def bits_per_element(self, geometry: KVGeometry, context: int) -> float:
        """All bits stored at ``context`` tokens, divided by the numbers in an unquantized cache.

        Exact numbers, scales and zero points take 16 bits. A layer with a sliding window stores that window.
        """
        stored = 0.0
        for index, layer in enumerate(geometry.layers):
            tokens = layer.held_tokens(context)
            for kind in KINDS:
                channels = layer.shape(kind).channels
                if self.keeps(index, len(geometry.layers)):
                    stored += HALF * channels * tokens
                    continue
                exact = self.exact_tokens(kind, tokens)
                stored += exact * HALF * channels + (tokens - exact) * self.token_bits(layer, kind)
                stored += self.constant_bits(layer, kind)
        return stored / cache_elements(geometry.layers, context)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


class QuantizerRival(Rival):
    """A rival that is a function on keys (after RoPE, as in caches) and a function on values."""

    _layers = 0

    @abstractmethod
    def roundtrip(self, x: Tensor, kind: Kind, layer: int) -> Tensor:
        """Quantize and dequantize float32 ``[B, H, T, D]``, with ``H`` key-value heads."""

    def history(self, kind: Kind, stored: int) -> int:
        """How many of the oldest of ``stored`` tokens are quantized (or sinks) when the next tokens arrive."""
        return max(0, stored - self.recent)

    def logits(self, model: Any, ids: Tensor) -> Tensor:
        """As :class:`Rival` says."""
        self._layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
        if self.mode == "decode":
            layers = [_WindowLayer(self, index) for index in range(self._layers)]
            return logits_through(model, Cache(layers=layers), ids)
        with intercept_calls(model, self._replace):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    def _replace(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        return self._through(call.key, "key", call.layer), self._through(call.value, "value", call.layer)

    def _through(self, x: Tensor, kind: Kind, layer: int) -> Tensor:
        return torch.cat([x[:, :, : self.sinks], self.read(x[:, :, self.sinks :], kind, layer)], dim=2)

    def read(self, x: Tensor, kind: Kind, layer: int) -> Tensor:
        """The round trip in the model's dtype. A layer that :meth:`keeps` names is unchanged."""
        if self.keeps(layer, self._layers):
            return x
        return self.roundtrip(x.float(), kind, layer).to(x.dtype)


class _WindowLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer that gives attention a quantized history. Each token is quantized once."""

    def __init__(self, rival: QuantizerRival, index: int) -> None:
        super().__init__()
        self.rival, self.index = rival, index
        self.quantized: dict[Kind, list[Tensor]] = {kind: [] for kind in KINDS}
        self.done: dict[Kind, int] = dict.fromkeys(KINDS, rival.sinks)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values. Return those of all tokens as attention reads them."""
        stored = int(self.get_seq_length())
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return self._read("key", keys, stored), self._read("value", values, stored)

    def _read(self, kind: Kind, exact: Tensor, stored: int) -> Tensor:
        done, until = self.done[kind], self.rival.history(kind, stored)
        if until > done:
            self.quantized[kind].append(self.rival.read(exact[:, :, done:until], kind, self.index))
            self.done[kind] = until
        sinks = exact[:, :, : self.rival.sinks]
        return torch.cat([sinks, *self.quantized[kind], exact[:, :, self.done[kind] :]], dim=2)


def uniform_roundtrip(x: Tensor, bits: int, low: Tensor, high: Tensor) -> Tensor:
    """Quantize to ``2 ** bits`` levels from ``low`` to ``high``. Step and offset are rounded to float16.

    Args:
        x: float32, any shape.
        bits: bits of a code.
        low, high: ends of the range, broadcast to ``x``; values outside are clipped.
    """
    top = (1 << bits) - 1
    scale = ((high - low) / top).half().float().clamp(min=2.0**-24)
    offset = low.half().float()
    return ((x - offset) / scale).round().clamp(0, top) * scale + offset


def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix of Sylvester's construction, float32 ``[size, size]``; ``size`` a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)
