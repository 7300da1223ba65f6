"""``KVQCache``: a transformers cache with packed keys and values."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.compat import crop_takes_removed
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.intercept import attention_modules, layer_of
from kvq_calib.model.own_cache import join, own_state
from kvq_calib.model.rope import rope_switch
from kvq_calib.model.states import States, cache_layers
from kvq_calib.runtime.attention import attach
from kvq_calib.runtime.cache_layer import KVQCacheLayer
from kvq_calib.runtime.checkpoint import load_contents, save_contents
from kvq_calib.runtime.contents import CacheContents
from kvq_calib.runtime.forward_pass import ForwardPass
from kvq_calib.runtime.materialized_layer import MaterializedLayer
from kvq_calib.runtime.ops import Ops, choose_ops
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.visibility import Visibility
from kvq_calib.schema.geometry import KVGeometry

__all__ = ["KVQCache"]

_log = logging.getLogger("kvq_calib.runtime")


class KVQCache(Cache):  # type: ignore[misc]
    """A packed key-value cache for one model.

    Use it like any transformers cache: ``model.generate(**inputs, cache=KVQCache(artifact, model))`` (before 5.24 the
    argument is ``past_key_values``). The constructor attaches the model, so that its attention can read packed storage;
    calls without a packed cache are unchanged. :func:`kvq_calib.runtime.detach` undoes that.

    Args:
        artifact: an artifact for this model; or its path or hub id, as in :meth:`KVArtifact.from_pretrained`.
        model: a transformers causal language model, on one device.
        recent_tokens: number of newest tokens that stay exact; by default the artifact's.
        max_tokens: largest number of tokens; by default the model's ``max_position_embeddings``.
        backend: ``"torch"``, ``"native"``, ``"cuda"`` or ``"auto"``. ``"auto"`` uses the kernels for the device if they
            can run, else torch. The default is the environment variable ``KVQ_CALIB_OPS``, or ``"auto"``.

    Attributes:
        artifact: the artifact.
        backend: name of the backend in use.

    Raises:
        RuntimeMismatchError: model and artifact do not fit, the recipe cannot be streamed, or the backend cannot be
            used here.
        ArtifactModelError: the artifact is for another model; the message names the field that differs.
    """

    def __init__(
        self,
        artifact: KVArtifact | str | os.PathLike[str],
        model: nn.Module,
        *,
        recent_tokens: int | None = None,
        max_tokens: int | None = None,
        backend: str | None = None,
    ) -> None:
        artifact = _artifact(artifact, model)
        artifact.check_model(model_fingerprint(model))
        _check_streamable(artifact)
        geometry = artifact.geometry
        modules = _attention_modules(model, geometry)
        self.device = _single_device(modules)
        self.quantizers = artifact.quantizers(self.device)
        ops, note = choose_ops(self.quantizers, self.device, backend)
        config: Any = model.config
        limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        serving = attach(model, geometry)
        if serving.materialized:  # any module may run for a layer that attends
            modules = set(attention_modules(model, unnumbered=True))
        self.artifact = artifact
        self.backend = ops[0].name
        self.contents = CacheContents(
            [(pair["key"], pair["value"]) for pair in self.quantizers],
            [layer.sliding_window for layer in geometry.layers],
            artifact.spec.sink_tokens,
            artifact.spec.recent_tokens if recent_tokens is None else recent_tokens,
            self.device,
        )
        layers: list[Any] = []
        self.states = States(config, layers, own_state(model))
        self.forward_pass = ForwardPass(
            self.contents,
            ops,
            modules,
            limit if max_tokens is None else max_tokens,
            rope_switch(config),
            self.states,
            last_number=geometry.last_number,
            single_tokens=serving.single_tokens,
        )
        # For each rotary embedding, one layer checks in every pass that the angles are those of the artifact.
        ropes = [layer.rope for layer in geometry.layers]
        checking = {ropes.index(rope) for rope in set(ropes) if rope is not None}
        layers += cache_layers(
            model,
            geometry,
            [
                self._layer((index, number, op, self.forward_pass, index in checking), serving.materialized)
                for index, (number, op) in enumerate(zip(geometry.numbers, ops, strict=True))
            ],
        )
        super().__init__(layers=layers)
        if self.states.own is not None:
            join(self, self.states.own)
        _log.info(
            "packed cache of %d layers: %s operations on %s%s", len(ops), self.backend, self.device, note
        )

    def _layer(self, arguments: tuple[int, int, Ops, ForwardPass, bool], materialized: bool) -> KVQCacheLayer:
        if not materialized:
            return KVQCacheLayer(*arguments)
        index = arguments[0]
        pair = self.quantizers[index]
        swapped = self.artifact.geometry.layers[index].swapped
        return MaterializedLayer(*arguments, quantizers=(pair["key"], pair["value"]), swapped=swapped)

    @property
    def packed(self) -> list[KVQCacheLayer]:
        """The layers with packed keys and values, in order; ``layers`` also has the model's other layers."""
        return [layer for layer in self.layers if isinstance(layer, KVQCacheLayer)]

    @property
    def table(self) -> SlotTable | None:
        """Positions, blocks and sinks, shared by all layers; ``None`` while empty."""
        return self.contents.table

    @property
    def single_tokens(self) -> bool:
        """Whether the model can continue a text only by single tokens."""
        return self.forward_pass.single_tokens

    @property
    def recent_tokens(self) -> int:
        """Number of newest tokens that stay exact."""
        return self.contents.recent_tokens

    @property
    def max_tokens(self) -> int | None:
        """Largest number of tokens."""
        return self.forward_pass.max_tokens

    def __bool__(self) -> bool:
        """False for a model that switches its RoPE frequencies, else true.

        ``generate`` of Phi-3 replaces a cache that is true by an unquantized one, if a text passes the switch or is
        longer from the start. This cache serves the latter, and refuses the former.
        """
        return self.forward_pass.rope_switch is None

    def __repr__(self) -> str:
        """A short description of the contents."""
        held = f"{len(self.packed)} layers, {self.get_seq_length()} tokens, {self.nbytes} bytes"
        return f"KVQCache({held}, {self.backend})"

    def __deepcopy__(self, memo: dict[int, Any]) -> KVQCache:
        """Copy the contents. Artifact, tables and model are shared."""
        self.contents.settle()
        shared: list[Any] = [self.artifact, self.quantizers, self.contents.stored, self.forward_pass.modules]
        shared += [self.states.config, *(layer.ops for layer in self.packed)]
        shared += [quantizer.layout for pair in self.quantizers for quantizer in pair.values()]
        memo.update({id(item): item for item in shared})
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def append(self, layers: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Store tokens without a forward pass, at the next positions.

        Args:
            layers: keys and values of each packed layer in order, ``[B, H, T, D]`` each. Keys are before RoPE if the
                recipe quantizes them so, else as attention uses them.

        Raises:
            RuntimeMismatchError: they do not fit the cache, which is unchanged; or the model has layers with other
                states.
        """
        forward_pass = self.forward_pass
        if self.states:
            raise RuntimeMismatchError(
                "other layers of this model keep a state that only a forward pass can bring up to date; pass the cache "
                "to the model instead"
            )
        with forward_pass.undone_on_failure():
            for layer, (keys, values) in zip(self.packed, layers, strict=True):
                batch, _, tokens, _ = keys.shape
                seen = Visibility(None, layer.length + tokens, tokens, None)
                storage, table = forward_pass.enter(layer.index, batch, seen)
                layer.store(storage, keys, values, table)
            forward_pass.end()

    # ------------------------------------------------------- other methods of Cache

    @property
    def is_initialized(self) -> bool:
        """Whether there are tokens."""
        return self.table is not None

    def crop(self, count: int) -> None:
        """Drop the newest tokens. Packed tokens stay packed.

        Args:
            count: a length to keep where positive, minus the number of tokens to forget where negative. 0 means what it
                means in the transformers in use: keep all (newer), forget all (older).

        Raises:
            RuntimeMismatchError: a sliding window has freed tokens that would be visible again; or another layer of the
                model has a state from which tokens cannot be removed, and no recorded pass began there.
        """
        self.forward_pass.roll_back()
        length = self.contents.length
        if count > 0:
            kept = count
        elif count < 0:
            kept = max(length + count, 0)
        else:
            kept = length if crop_takes_removed() else 0
        self.states.check()
        if kept >= length:
            self.states.settle()
        elif kept == 0:
            self.reset()
        else:
            self.contents.check_crop(kept)
            self.states.crop(kept, length - kept)
            self.contents.crop(kept)

    def reset(self) -> None:
        """Free everything. The cache can then be used again, also with another batch size."""
        self.contents.reset()
        self.states.reset()
        self.forward_pass.forget()
        for layer in self.packed:
            layer.ops.forget()

    def _select(self, rows: Tensor) -> None:
        self.forward_pass.roll_back()
        self.contents.select(rows)
        if self.is_initialized:
            self.states.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row ``i`` by row ``beam_idx[i]`` (beam search)."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (numbers, or one bool per sequence)."""
        indices = torch.as_tensor(indices)
        self._select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        if self.table is not None:
            self._select(torch.arange(self.table.batch).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Let states record what :meth:`crop` needs, until it is called. Keys and values do not need that.

        Afterwards, the cache can be cropped to where a forward pass began. If all states are of convolutions, it can be
        cropped to any length in newer releases of transformers (5.24; not 5.5).
        """
        self.states.record()

    # ------------------------------------------------------------------ memory

    def _fixed_memory(self) -> dict[str, int]:
        """Bytes that do not depend on the tokens: the artifact's parameters, and derived tables."""
        counted: set[int] = set()

        def count(tensors: list[Tensor]) -> int:
            total = 0
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in counted and tensor.numel():
                    counted.add(storage.data_ptr())
                    total += storage.nbytes()
            return total

        sizes = {"parameters": 0, "tables": 0}
        for pair in self.quantizers:
            for quantizer in pair.values():
                sizes["parameters"] += quantizer.params.held_bytes
                counted.update(t.untyped_storage().data_ptr() for t in quantizer.params.tensors().values())
        for layer in self.packed:
            sizes["tables"] += count(layer.ops.tables())
            if isinstance(layer, MaterializedLayer):
                sizes["tables"] += count(layer.tables())
        return sizes

    def memory(self) -> dict[str, int]:
        """Bytes in use by kind: the kinds of :meth:`kvq_calib.artifact.artifact.KVArtifact.storage`, and ``tables``.

        ``states`` are unquantized states of layers beside keys and values, if the model has such layers.
        """
        states = {"states": self.states.nbytes} if self.states else {}
        return {**self._fixed_memory(), **self.contents.memory(), **states}

    @property
    def nbytes(self) -> int:
        """All bytes in use."""
        return sum(self.memory().values())

    def outliers(self) -> dict[str, list[int]]:
        """Number of outlier entries, per kind and layer."""
        self.contents.settle()
        return {
            kind: [
                0 if layer.storage is None else getattr(layer.storage, kind).outlier_entries
                for layer in self.packed
            ]
            for kind in ("key", "value")
        }

    # ------------------------------------------------------------ save and load

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the contents to one safetensors file, atomically.

        Raises:
            RuntimeMismatchError: the cache is empty.
        """
        self.states.check()
        self.contents.settle()
        save_contents(self.contents, self.artifact, path, self.states.tensors())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        artifact: KVArtifact | str | os.PathLike[str],
        model: nn.Module,
        **options: Any,
    ) -> KVQCache:
        """Make a cache from a file that :meth:`save` wrote.

        Args:
            path: the file.
            artifact, model: the artifact and model with which the cache was filled.
            options: further arguments of the constructor.

        Raises:
            RuntimeMismatchError: the file is damaged, or belongs to another artifact.
        """
        cache = cls(artifact, model, **options)
        cache.states.fill(load_contents(cache.contents, cache.artifact, path, cache.max_tokens))
        return cache


def _artifact(artifact: Any, model: Any) -> KVArtifact:
    """The artifact from the constructor's arguments.

    Raises:
        RuntimeMismatchError: the arguments are swapped, or are not an artifact and a model.
        ArtifactError: it cannot be read.
    """
    if isinstance(artifact, nn.Module):
        raise RuntimeMismatchError("the arguments are swapped; write KVQCache(artifact, model)")
    if not isinstance(model, nn.Module):
        raise RuntimeMismatchError(
            f"{type(model).__name__} is no model of transformers; write KVQCache(artifact, model)"
        )
    if isinstance(artifact, str | os.PathLike):
        return KVArtifact.from_pretrained(artifact)
    if not isinstance(artifact, KVArtifact):
        raise RuntimeMismatchError(
            f"{type(artifact).__name__} is no artifact; write KVQCache(artifact, model) with a KVArtifact, or the path "
            "of its file"
        )
    return artifact


def _check_streamable(artifact: KVArtifact) -> None:
    for index, quantizers in enumerate(artifact.quantizers()):
        rope = artifact.geometry.rope_of(index)
        for kind, quantizer in quantizers.items():
            reason = quantizer.cannot_stream()
            if reason is not None:
                raise RuntimeMismatchError(f"layer {index}, {kind}s: {reason}")
        if quantizers["key"].spec.pre_rope and rope is not None and rope.length_dependent:
            raise RuntimeMismatchError(
                f"layer {index}: the rotary embedding depends on the length of the text; "
                "calibrate with --set cache.key.pre_rope=false"
            )


def _attention_modules(model: nn.Module, geometry: KVGeometry) -> set[nn.Module]:
    """The attention modules, as a set that hashes by identity."""
    return {
        module
        for module in attention_modules(model)
        if (number := layer_of(module)) < geometry.model_layers and geometry.index_of(number) is not None
    }


def _single_device(modules: set[nn.Module]) -> torch.device:
    devices = {parameter.device for module in modules for parameter in module.parameters()}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices))) or "none"
        raise RuntimeMismatchError(
            f"the attention layers are on several devices ({names}); load the model on one"
        )
    return devices.pop()
