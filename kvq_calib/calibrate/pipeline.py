"""Calibration from a model and windows of text to artifacts, in two streaming passes.

Pass one (forward) sketches every channel, which gives static thresholds. Pass two (forward, and backward where
codebooks are Fisher-weighted) collects the weighted distribution of normalised values, which gives the codebooks. Recipes
with an allocation ask for one more (forward) between them, over the text with foreign tokens in it, and for text that
the model writes itself beside that of the calibration.
Several recipes share both passes: what two recipes have in common is measured once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact, LayerParams
from kvq_calib.calibrate.distributed import check_agreement, world
from kvq_calib.calibrate.distribution import ChannelMoments, WeightedHistogram, pair_channels
from kvq_calib.calibrate.error_compensation import GradientCovariance
from kvq_calib.calibrate.finetune import learn
from kvq_calib.calibrate.gradients import fisher_pass
from kvq_calib.calibrate.profiling import peak_resident_bytes
from kvq_calib.calibrate.rate_distortion import fit_layers, phase_of, spec_by_layer
from kvq_calib.calibrate.self_generated import WrittenText
from kvq_calib.calibrate.sensitivity import error_sensitivity
from kvq_calib.calibrate.statistics import ChannelHistogram, LevelHistogram, Magnitude, Statistics
from kvq_calib.calibrate.token_weighting import TokenImportance
from kvq_calib.calibrate.vocabulary_samples import strewn
from kvq_calib.codec.quantizer import Quantizer, QuantParams
from kvq_calib.data import TokenWindows
from kvq_calib.errors import CalibrationError, ConfigError
from kvq_calib.files import write_atomically
from kvq_calib.fit.levels import fit_levels, q_norm, storable
from kvq_calib.model.capture import LayerKV, capture
from kvq_calib.model.inspect import inspect_model
from kvq_calib.model.placement import input_device, is_offloaded
from kvq_calib.model.probe import check_generation
from kvq_calib.schema.geometry import KVGeometry
from kvq_calib.schema.recipe import CalibrationConfig
from kvq_calib.schema.spec import KINDS, Kind, KVCacheSpec, LayerSpec, QuantSpec

Progress = Callable[[str, int, int], None]
"""Called as ``(what, windows done, windows in all)``."""

#: Seconds between checkpoints: little work is lost, and writing the state stays negligible.
CHECKPOINT_SECONDS = 30.0
#: Raised when statistics change their names or meaning: what an earlier version saved is then refused.
_CHECKPOINT_VERSION = 2
#: A channel that never moves still needs a positive scale.
_SMALLEST_SCALE = 1e-8
#: Name of the text that the model writes itself, among the statistics.
_WRITTEN = "written"
#: Text on which the cost of a fit's errors is measured: windows, and tokens of each.
_SENSITIVITY_PIECES = 4
_SENSITIVITY_TOKENS = 768


@dataclass(frozen=True)
class Calibrated:
    """What a run produced.

    Attributes:
        artifacts: by the name of their recipe.
        seconds: wall time by part of the run.
        statistics_seconds: of those, what statistics took beside the model's passes.
        statistics_bytes: held by the statistics of this rank; the same for any amount of text.
        peak_bytes: peak resident memory of the process up to the end of each part.
    """

    artifacts: dict[str, KVArtifact]
    seconds: dict[str, float]
    statistics_seconds: dict[str, float]
    statistics_bytes: int
    peak_bytes: dict[str, int]


def calibrate(
    model: Any,
    windows: TokenWindows,
    configs: Mapping[str, CalibrationConfig],
    *,
    model_id: str,
    model_config: Mapping[str, Any],
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    deliver: Callable[[Mapping[str, KVArtifact]], None] | None = None,
) -> Calibrated:
    """Calibrate one model for one or several recipes.

    Args:
        model: a causal language model in eval mode.
        windows: token ids int64 ``[N, T]`` and where they come from.
        configs: recipes by name. Settings of the run (data, seed, recompute) must agree.
        model_id, model_config: recorded in the artifacts; see :func:`kvq_calib.model.fingerprint.model_fingerprint`.
        checkpoint: file that keeps the statistics of a run; removed when it is complete.
        resume: go on from ``checkpoint`` if it is there. The result is the same as without interruption.
        progress: told after every window.
        deliver: called with the artifacts on rank 0 while the checkpoint is still there, so that a disk that is full
            when they are saved costs no work.

    Raises:
        CalibrationError: activations that are not finite, or a checkpoint of another run.
        ConfigError: settings that contradict each other or the model.
        ModelError: the model cannot be captured.
    """
    if not configs:
        raise ConfigError("nothing to calibrate: name at least one recipe")
    run = _Run(model, windows, configs, model_config, checkpoint, progress)
    if resume:
        run.resume()
    run.write()
    run.first_pass()
    run.foreign_pass()
    run.second_pass()
    artifacts = run.fit(model_id, model_config)
    if deliver is not None and world()[0] == 0:
        deliver(artifacts)
    if checkpoint is not None:
        run.checkpoint_file().unlink(missing_ok=True)
    held = sum(t.nbytes for each in run.statistics.values() for t in each.state().values())
    return Calibrated(artifacts, run.seconds, run.statistics_seconds, held, run.peaks)


def _select(kv: LayerKV, kind: Kind, pre_rope: bool) -> Tensor:
    """The tensor that is quantized, ``[B, H, T, D]``."""
    if kind == "value":
        return kv.values
    return kv.keys if pre_rope else kv.rotated_keys


@dataclass(frozen=True, eq=False)
class _Subject:
    """One layer's keys or values under one recipe."""

    config: CalibrationConfig
    layer: int
    kind: Kind
    spec: QuantSpec

    @property
    def allocated(self) -> bool:
        """Whether widths and levels come from the weighted distribution of every channel."""
        return self.config.allocation is not None

    @property
    def sketch(self) -> str:
        """Name of the statistics of pass one: channel moments, or the sketch its thresholds come from."""
        if self.allocated:
            return f"moments.{self.layer}.{self.kind}.{self.config.cache.sink_tokens}.{self._written}"
        pre_rope = self.spec.pre_rope if self.kind == "key" else True
        return f"channels.{self.layer}.{self.kind}.{'pre' if pre_rope else 'post'}.{self.config.cache.sink_tokens}"

    @property
    def weighted(self) -> bool:
        """Whether its codebook needs gradients."""
        return self.config.fit.weights == "fisher" and self.fitted

    @property
    def fitted(self) -> bool:
        """Whether its codebook depends on the data."""
        return self.allocated or self.spec.datatype not in ("uniform", "normal_float")

    @property
    def histogram(self) -> str:
        """Name of the statistics of pass two: everything that decides them, in one string."""
        weights = "fisher" if self.weighted else "uniform"
        if self.allocated:
            return f"weighted.{self._turned}.{weights}"
        spec = self.spec.model_dump(exclude={"bits", "datatype", "q_norm"})
        facts = [spec, self.config.cache.sink_tokens, self.config.cache.storage_dtype]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return f"levels.{self.layer}.{self.kind}.{digest}.{weights}"

    @property
    def _turned(self) -> str:
        turned = "turned" if self.spec.phase else "plain"
        return f"{self.layer}.{self.kind}.{self.config.cache.sink_tokens}.{turned}.{self._written}"

    @property
    def _written(self) -> str:
        """What text of the model's own it is fitted to."""
        settings = self.config.allocation
        if settings is None:
            return "0.0"
        return f"{settings.written}{'.repeats' if settings.written and settings.repeats else ''}"

    @property
    def covariance(self) -> str:
        """Name of the statistics of its gradients, where errors are fed back."""
        return f"covariance.{self._turned}"

    @property
    def importance(self) -> str:
        """Name of the statistics of its tokens' sizes and gradients, where paths weigh them."""
        return f"importance.{self._turned}"

    @property
    def foreign(self) -> str:
        """Name of the distribution of its values for tokens drawn from the vocabulary."""
        return f"foreign.{self._turned}"

    @property
    def wants_foreign(self) -> bool:
        """Whether it takes up that distribution."""
        settings = self.config.allocation
        return settings is not None and settings.foreign > 0 and settings.shrinkage > 0

    @property
    def needs_histogram(self) -> bool:
        """Whether pass two has anything to find out for it."""
        return self.fitted or self.spec.outliers.fraction > 0


class _Run:
    """State of one calibration run."""

    def __init__(
        self,
        model: Any,
        windows: TokenWindows,
        configs: Mapping[str, CalibrationConfig],
        model_config: Mapping[str, Any],
        checkpoint: Path | None,
        progress: Progress | None,
    ) -> None:
        self.model = model
        self.windows = windows
        self.configs = dict(configs)
        self.checkpoint = checkpoint
        self.progress = progress or (lambda what, done, total: None)
        self.geometry: KVGeometry = inspect_model(model).geometry
        check_generation(model, self.geometry)
        self.recompute = shared_setting(self.configs, "recompute")
        self.seed = shared_setting(self.configs, "seed")
        self.subjects = [
            _Subject(config, layer, kind, spec.of(kind))
            for config in self.configs.values()
            for layer, spec in enumerate(self._resolved(config))
            for kind in KINDS
        ]
        self.statistics: dict[str, Statistics] = {}
        self.totals: dict[str, Statistics] = {}
        self.done: dict[str, int] = {}
        #: The one that is under way.
        self.window = 0
        self.seconds: dict[str, float] = {}
        self.statistics_seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.identity = self._identity(model_config)
        check_agreement(self.identity, len(windows.ids))
        self.saved_at = time.monotonic()
        self.saving = 0.0

    def _resolved(self, config: CalibrationConfig) -> tuple[LayerSpec, ...]:
        try:
            return config.cache.resolved(len(self.geometry.layers))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    # ---------------------------------------------------------- checkpoints

    def _identity(self, model_config: Mapping[str, Any]) -> str:
        """What a checkpoint must share with this run."""
        facts = {
            "version": _CHECKPOINT_VERSION,
            "configs": {name: config.model_dump(mode="json") for name, config in self.configs.items()},
            "data": self.windows.source,
            "model": dict(model_config),
            "dtype": str(self.model.dtype),
            "ranks": world()[1],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def checkpoint_file(self) -> Path:
        """This rank's checkpoint."""
        assert self.checkpoint is not None
        rank, ranks = world()
        return (
            self.checkpoint if ranks == 1 else self.checkpoint.with_name(f"{self.checkpoint.name}.rank{rank}")
        )

    def resume(self) -> None:
        """Take up the statistics of an interrupted run, if there is one."""
        if self.checkpoint is None or not self.checkpoint_file().exists():
            return
        file = self.checkpoint_file()
        try:
            with safetensors.safe_open(file, "pt") as opened:
                header = json.loads((opened.metadata() or {})["kvq_checkpoint"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise CalibrationError(
                f"{file} is not a checkpoint; remove it, or run without --resume"
            ) from error
        if header["identity"] != self.identity:
            raise CalibrationError(
                f"{file} belongs to a run with other settings, data, model or version; remove it, or run without --resume"
            )
        self.done = header["done"]
        for name in header["names"]:
            prefix = f"{name}/"
            state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            statistics = self._new(name)
            statistics.load(state)
            self.statistics[name] = statistics

    def _save(self, at_once: bool = False) -> None:
        started = time.monotonic()
        # Large states are written less often: saving takes a thirtieth of the time at most.
        wait = 0.0 if at_once else CHECKPOINT_SECONDS * max(1.0, self.saving)
        if self.checkpoint is None or started - self.saved_at < wait:
            return
        tensors = {
            f"{name}/{part}": tensor.detach().cpu().contiguous()
            for name, statistics in self.statistics.items()
            for part, tensor in statistics.state().items()
        }
        header = {"identity": self.identity, "done": self.done, "names": list(self.statistics)}
        write_atomically(
            self.checkpoint_file(), safetensors.torch.save(tensors, {"kvq_checkpoint": json.dumps(header)})
        )
        self.saved_at = time.monotonic()
        self.saving = self.saved_at - started

    # --------------------------------------------------------------- passes

    def _new(self, name: str) -> Statistics:
        """An empty accumulator for a name that a subject gave."""
        if name == _WRITTEN:
            return self._written_text()
        family, layer, rest = name.split(".", 2)
        geometry = self.geometry.layers[int(layer)]
        if family == "channels":
            return ChannelHistogram(geometry.channels)
        if family == "moments":
            rope = self.geometry.rope_of(int(layer)) if rest.startswith("key") else None
            return ChannelMoments(
                geometry.channels, *pair_channels(rope, geometry.num_kv_heads, geometry.head_dim)
            )
        if family in ("weighted", "foreign"):
            return WeightedHistogram(geometry.channels)
        if family == "covariance":
            return GradientCovariance(geometry.num_kv_heads, geometry.head_dim)
        if family == "importance":
            return TokenImportance(geometry.num_kv_heads)
        if family == "magnitude":
            return Magnitude()
        return LevelHistogram(weighted=rest.endswith(".fisher"))

    def _each_window(
        self, what: str, names: Iterable[str], step: Callable[[Tensor], None], text: Tensor | None = None
    ) -> None:
        """Run ``step`` on this rank's windows that are not done yet, then add up what ``names`` lists over ranks.

        Windows are those of the calibration text and what of the written text anything takes up, or rows of ``text``,
        int64 ``[N, T]``.
        """
        if text is None:
            text = torch.cat((self.windows.ids, *(self._own(at, n) for at, n in self._own_windows().items())))
        rank, ranks = world()
        mine = range(rank, len(text), ranks)
        started = time.monotonic()
        for number, index in enumerate(mine):
            if number < self.done.get(what, 0):
                continue
            self.window = index
            step(text[index : index + 1].to(input_device(self.model)))
            self.done[what] = number + 1
            self.progress(what, number + 1, len(mine))
            # What follows the last window may take long: learning, the next part of a large model.
            self._save(at_once=number + 1 == len(mine))
        self._add_up(names)
        self._finished(what, started)

    def _finished(self, what: str, started: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - started
        self.peaks[what] = peak_resident_bytes()

    def _clocked(self, what: str, observe: Callable[..., None]) -> Callable[..., None]:
        """``observe``, with its time counted as that of statistics; they end on the CPU, so GPUs are waited for."""

        def run(*arguments: Any) -> None:
            started = time.monotonic()
            observe(*arguments)
            spent = time.monotonic() - started
            self.statistics_seconds[what] = self.statistics_seconds.get(what, 0.0) + spent

        return run

    def _add_up(self, names: Iterable[str]) -> None:
        """Totals over all ranks.

        What a rank has seen itself stays apart, so that a checkpoint means the same whichever rank died when.
        """
        _, ranks = world()
        for name in sorted(names):
            total = self.statistics[name]
            if ranks > 1:
                total = self._new(name)
                total.load({part: tensor.clone() for part, tensor in self.statistics[name].state().items()})
                total.all_reduce()
            self.totals[name] = total

    def _written_windows(self, config: CalibrationConfig) -> int:
        """Windows of its own text that the model writes for a recipe."""
        return 0 if config.allocation is None else round(config.allocation.written * len(self.windows.ids))

    def _own_windows(self) -> dict[bool, int]:
        """Windows of that text that passes see, for all recipes together: without repeats, then with them."""
        most = {False: 0, True: 0}
        for config in self.configs.values():
            if config.allocation is not None:
                repeats = config.allocation.repeats
                most[repeats] = max(most[repeats], self._written_windows(config))
        return most

    def _written_text(self) -> WrittenText:
        bos = self.windows.source.get("bos")
        return WrittenText(
            self._own_windows(),
            self.windows.ids.shape[1],
            prefix=() if bos is None else (bos,),
            vocabulary=self._vocabulary,
            seed=self.seed,
        )

    @property
    def _vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    def _own(self, repeats: bool, count: int) -> Tensor:
        """The first ``count`` windows that the model wrote, int64 ``[count, T]``."""
        if count == 0:
            return self.windows.ids[:0]
        text = self.totals[_WRITTEN]
        assert isinstance(text, WrittenText)
        return text.windows(count, repeats=repeats)

    def _own_of(self, config: CalibrationConfig) -> Tensor:
        """A recipe's share of that, int64 ``[N, T]``."""
        repeats = config.allocation is not None and config.allocation.repeats
        return self._own(repeats, self._written_windows(config))

    def _text(self, config: CalibrationConfig) -> Tensor:
        """What a recipe is fitted to: the calibration text, then its share of the model's own, int64 ``[N, T]``."""
        return torch.cat((self.windows.ids, self._own_of(config)))

    def _looking(self, by_layer: Mapping[int, Sequence[_Subject]], layer: int) -> list[_Subject]:
        """The subjects of a layer that take up the window that is under way."""
        subjects = by_layer.get(layer, ())
        own = self.window - len(self.windows.ids)
        if own < 0:
            return list(subjects)
        plain = self._own_windows()[False]
        repeats = own >= plain
        number = own - plain if repeats else own
        return [
            s
            for s in subjects
            if s.config.allocation is not None
            and s.config.allocation.repeats == repeats
            and number < self._written_windows(s.config)
        ]

    def write(self) -> None:
        """Let the model write what recipes ask for."""
        if not any(map(self._written_windows, self.configs.values())):
            return
        if is_offloaded(self.model):
            raise ConfigError(
                "to write text, a model whose weights wait on disk or in CPU memory reads all of them for every token; "
                "leave that out with --set allocation.written=0"
            )
        (name,) = self._prepare([_WRITTEN])
        text = self.statistics[name]
        assert isinstance(text, WrittenText)

        def step(_: Tensor) -> None:
            try:
                text.write(self.model, self.window)
            except CalibrationError:
                self.window = 0
                self._prepare(self._magnitudes())
                with torch.no_grad(), capture(self.model, self._look):  # it may know the layer
                    self._forward(self.windows.ids[:1].to(input_device(self.model)))
                raise

        self._each_window("writing", [name], step, text.beginnings)

    def first_pass(self) -> None:
        """Sketch every channel whose thresholds are static."""
        subjects = _unique(
            (subject for subject in self.subjects if subject.spec.static_channels),
            lambda subject: subject.sketch,
        )
        if not subjects:
            return
        by_layer = _by_layer(subjects)

        def observe(kv: LayerKV) -> None:
            self._look(kv)
            for subject in self._looking(by_layer, kv.layer):
                x = _select(kv, subject.kind, subject.spec.pre_rope)[:, :, subject.config.cache.sink_tokens :]
                statistics = self.statistics[subject.sketch]
                assert isinstance(statistics, ChannelHistogram | ChannelMoments)
                statistics.update(x.float().transpose(1, 2).flatten(2).flatten(0, 1).cpu())

        names = self._prepare([*(subject.sketch for subject in subjects), *self._magnitudes()])
        with torch.no_grad(), capture(self.model, self._clocked("thresholds", observe)):
            self._each_window("thresholds", names, self._forward)

    def _forward(self, ids: Tensor) -> None:
        """A forward pass for the hooks alone: the body suffices, logits are nobody's business."""
        self.model.base_model(input_ids=ids, use_cache=False)

    def foreign_pass(self) -> None:
        """Collect the distribution of values for tokens drawn from the vocabulary, strewn into the text."""
        subjects = _unique(
            (subject for subject in self.subjects if subject.wants_foreign), lambda subject: subject.foreign
        )
        if not subjects:
            return
        by_layer = _by_layer(subjects)
        weigh = {subject: self._weigh(subject, subject.foreign) for subject in subjects}
        text = strewn(self.windows.ids, self._vocabulary, self.seed)

        def observe(kv: LayerKV) -> None:
            for subject in by_layer.get(kv.layer, ()):
                first = subject.config.cache.sink_tokens | 1  # drawn tokens stand at odd places
                weigh[subject](_select(kv, subject.kind, subject.spec.pre_rope)[:, :, first::2], None)

        names = self._prepare(subject.foreign for subject in subjects)
        with torch.no_grad(), capture(self.model, self._clocked("foreign tokens", observe)):
            self._each_window("foreign tokens", names, self._forward, text)

    def second_pass(self) -> None:
        """Collect the distribution of normalised values, weighted by squared gradients where wanted."""
        subjects = _unique(
            (subject for subject in self.subjects if subject.needs_histogram),
            lambda subject: subject.histogram,
        )
        if not subjects:
            return
        quantizers = {subject: self._quantizer(subject) for subject in subjects if not subject.allocated}
        weigh = {
            subject: self._weigh(subject, subject.histogram) for subject in subjects if subject.allocated
        }
        forward = _by_layer(subject for subject in subjects if not subject.weighted)
        backward = _by_layer(subject for subject in subjects if subject.weighted)

        def collect(kv: LayerKV, subject: _Subject, gradient: Tensor | None) -> None:
            sinks = subject.config.cache.sink_tokens
            if subject.allocated:
                x = _select(kv, subject.kind, subject.spec.pre_rope)[:, :, sinks:]
                weigh[subject](x, None if gradient is None else gradient[:, :, sinks:])
                return
            quantizer = quantizers[subject].to(kv.values.device)
            values = quantizer.normalise(_select(kv, subject.kind, subject.spec.pre_rope)[:, :, sinks:])
            if not bool(torch.isfinite(values.normalised.sum())):
                raise _not_finite(kv.layer, subject.kind)
            weights = None
            if gradient is not None:
                # A gradient of y times the step of the codebook: the weights of errors on the codebook's scale.
                weights = (quantizer.transform(gradient[:, :, sinks:]) * values.scale).square()
                if subject.spec.channel_normalized:
                    weights = weights * quantizer.scale.square()
                weights = weights.flatten(0, 1)
            statistics = self.statistics[subject.histogram]
            assert isinstance(statistics, LevelHistogram)
            outliers = None if values.outliers is None else values.outliers.flatten(0, 1)
            statistics.update(values.normalised.flatten(0, 1), outliers, weights)

        def observe(kv: LayerKV) -> None:
            self._look(kv)
            for subject in self._looking(forward, kv.layer):
                collect(kv, subject, None)

        def observe_gradients(kv: LayerKV, grad_keys: Tensor, grad_values: Tensor) -> None:
            rotated = None
            for subject in self._looking(backward, kv.layer):
                gradient = grad_keys if subject.kind == "key" else grad_values
                if subject.kind == "key" and not subject.spec.pre_rope:
                    rotated = kv.rotation.rotate(grad_keys) if rotated is None else rotated
                    gradient = rotated
                collect(kv, subject, gradient)

        # Recipes that share a distribution need not all ask for what is collected beside it.
        fed = {subject.covariance for subject in self.subjects if subject.spec.feedback}
        weighed = {subject.importance for subject in self.subjects if subject.spec.importance}
        names = self._prepare([*(s.histogram for s in subjects), *fed, *weighed, *self._magnitudes()])
        in_forward, in_backward = (self._clocked("codebooks", each) for each in (observe, observe_gradients))
        if backward:

            def step(ids: Tensor) -> None:
                fisher_pass(self.model, ids, in_backward, on_forward=in_forward, recompute=self.recompute)

            self._each_window("codebooks", names, step)
        else:
            with torch.no_grad(), capture(self.model, in_forward):
                self._each_window("codebooks", names, self._forward)

    def _weigh(self, subject: _Subject, name: str) -> Callable[[Tensor, Tensor | None], None]:
        """Adds ``[B, H, T, D]`` values and their gradients to the distribution ``name`` of the subject's channels."""
        geometry = self.geometry.layers[subject.layer]
        rope = self.geometry.rope_of(subject.layer)
        moments = self.totals[subject.sketch]
        assert isinstance(moments, ChannelMoments)
        phase = phase_of(moments, subject.spec, rope)
        mean, deviation = moments.turned(phase)
        idle = torch.zeros(geometry.channels, dtype=torch.uint8)  # only the transform is used
        params = QuantParams(idle, torch.zeros(1, 1), idle, phase=phase)
        transform = Quantizer(subject.spec, params, geometry, rope).transform
        unit = moments.squared_size(geometry.num_kv_heads)

        def add(x: Tensor, gradient: Tensor | None) -> None:
            y = transform(x.cpu()).flatten(0, 1)
            if not bool(torch.isfinite(y.sum())):
                raise _not_finite(subject.layer, subject.kind)
            weights = torch.ones_like(y)
            if gradient is not None:
                gradient = transform(gradient.cpu()).flatten(0, 1)
                weights = gradient.double().square()
                covariance = self.statistics.get(subject.covariance)
                if covariance is not None:
                    assert isinstance(covariance, GradientCovariance)
                    covariance.update(gradient)
                importance = self.statistics.get(subject.importance)
                if importance is not None:
                    assert isinstance(importance, TokenImportance)
                    importance.update(y, gradient, unit)
            statistics = self.statistics[name]
            assert isinstance(statistics, WeightedHistogram)
            statistics.update(y, weights, mean, deviation)

        return add

    def _magnitudes(self) -> list[str]:
        """Names of the largest magnitudes by layer and kind, which every pass over the text looks at."""
        return [_magnitude(layer, kind) for layer in range(len(self.geometry.layers)) for kind in KINDS]

    def _look(self, kv: LayerKV) -> None:
        """Note magnitudes, and name the first layer that gives something else than numbers; later ones only follow it."""
        # What is recorded does not depend on the recipes that are calibrated together, so on no text that some asked for.
        if self.window >= len(self.windows.ids):
            return
        for kind, x in zip(KINDS, (kv.rotated_keys, kv.values), strict=True):
            magnitude = self.statistics[_magnitude(kv.layer, kind)]
            assert isinstance(magnitude, Magnitude)
            if not magnitude.update(x):
                raise _not_finite(kv.layer, kind)

    def _amax(self) -> dict[str, Any]:
        """Per kind the largest magnitude of each layer, as far as the text was looked at."""
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for layer in range(len(self.geometry.layers)):
            for kind in KINDS:
                magnitude = self.totals.get(_magnitude(layer, kind))
                if magnitude is None:
                    return {}
                assert isinstance(magnitude, Magnitude)
                found[kind].append(float(magnitude.largest))
        return {"amax": found}

    def _prepare(self, names: Iterable[str]) -> list[str]:
        """Make the accumulators that are not there from a checkpoint."""
        wanted = list(names)
        for name in wanted:
            if name not in self.statistics:
                self.statistics[name] = self._new(name)
        return wanted

    # ------------------------------------------------------------------ fit

    def _thresholds(self, subject: _Subject) -> tuple[Tensor | None, Tensor | None]:
        """Static scale and zero point per channel, or ``None`` where the spec has none."""
        if not subject.spec.static_channels:
            return None, None
        sketch = self.totals[subject.sketch]
        assert isinstance(sketch, ChannelHistogram)
        tail = subject.spec.outliers.fraction / 2
        low, high = sketch.quantile(tail), sketch.quantile(1 - tail)
        return ((high - low) / 2).clamp(min=_SMALLEST_SCALE), (high + low) / 2

    def _quantizer(
        self, subject: _Subject, levels: np.ndarray[Any, np.dtype[np.float64]] | None = None
    ) -> Quantizer:
        """The subject's quantizer; without ``levels`` it normalises only."""
        geometry = self.geometry.layers[subject.layer]
        scale, zero_point = self._thresholds(subject)
        codebook = np.zeros((1, 1 << subject.spec.bits)) if levels is None else levels[None]
        params = QuantParams.uniform(
            subject.spec.bits,
            geometry.channels,
            torch.tensor(codebook, dtype=torch.float32),
            scale=scale,
            zero_point=zero_point,
        )
        rope = self.geometry.rope_of(subject.layer)
        return Quantizer(subject.spec, params, geometry, rope, subject.config.cache.storage_dtype)

    def _levels(self, subject: _Subject) -> np.ndarray[Any, np.dtype[np.float64]]:
        config = subject.config
        if not subject.needs_histogram:
            return fit_levels(subject.spec.datatype, subject.spec.bits, np.zeros(1), np.zeros(1))
        histogram = self.totals[subject.histogram]
        assert isinstance(histogram, LevelHistogram)
        levels = fit_levels(
            subject.spec.datatype,
            subject.spec.bits,
            histogram.points.cpu().numpy(),
            histogram.weights.cpu().numpy(),
            solver=config.fit.solver,
            seed=config.seed,
        )
        if subject.spec.q_norm:
            levels = storable(q_norm(levels, histogram.points.cpu().numpy(), histogram.counts.cpu().numpy()))
        return levels

    def _outliers_per_token(self, subject: _Subject) -> float:
        if subject.spec.outliers.fraction == 0:
            return 0.0
        histogram = self.totals[subject.histogram]
        assert isinstance(histogram, LevelHistogram)
        return histogram.outliers_per_token

    def _fit_layers(
        self, config: CalibrationConfig, subjects: Mapping[tuple[int, Kind], _Subject]
    ) -> tuple[KVCacheSpec, tuple[LayerParams, ...]]:
        """What every layer stores, from the statistics alone, and the spec that says so."""
        if config.allocation is None:
            params = {at: self._quantizer(s, self._levels(s)).params for at, s in subjects.items()}
            return config.cache, tuple(
                LayerParams(params[n, "key"], params[n, "value"]) for n in range(len(self.geometry.layers))
            )
        moments, histograms, covariances, importances, foreign = {}, {}, {}, {}, {}
        for at, subject in subjects.items():
            first, second = self.totals[subject.sketch], self.totals[subject.histogram]
            assert isinstance(first, ChannelMoments)
            assert isinstance(second, WeightedHistogram)
            moments[at], histograms[at] = first, second
            if subject.spec.feedback:
                third = self.totals[subject.covariance]
                assert isinstance(third, GradientCovariance)
                covariances[at] = third
            if subject.spec.importance:
                fourth = self.totals[subject.importance]
                assert isinstance(fourth, TokenImportance)
                importances[at] = fourth
            if subject.wants_foreign:
                fifth = self.totals[subject.foreign]
                assert isinstance(fifth, WeightedHistogram)
                foreign[at] = fifth

        cache = spec_by_layer(config.cache, config.allocation, self.geometry, covariances)

        def measure(layers: tuple[LayerParams, ...]) -> dict[tuple[int, Kind], Tensor]:
            own = self._own_of(config)[: _SENSITIVITY_PIECES // 2]
            rows = torch.cat((self.windows.ids[: _SENSITIVITY_PIECES - len(own)], own))
            pieces = rows[:, :_SENSITIVITY_TOKENS]
            return error_sensitivity(
                self.model, pieces, cache, self.geometry, layers, recompute=self.recompute
            )

        return cache, fit_layers(
            cache,
            config.allocation,
            self.geometry,
            moments,
            histograms,
            covariances,
            importances,
            foreign,
            measure,
        )

    def _learn(
        self, name: str, config: CalibrationConfig, cache: KVCacheSpec, layers: tuple[LayerParams, ...]
    ) -> tuple[tuple[LayerParams, ...], dict[str, Any]]:
        """Train what was fitted, and what that brought on windows that were not trained on."""
        assert config.learn is not None
        started = time.monotonic()

        def progress(what: str, done: int, total: int) -> None:  # each recipe is a part of its own
            self.progress(f"{what} {name}", done, total)

        text = self._text(config)
        # What comes last is not trained on: a window of each kind.
        last = sorted({len(self.windows.ids) - 1, len(text) - 1})
        rest = [row for row in range(len(text)) if row not in last]
        learned = learn(
            self.model,
            text[rest + last],
            cache,
            self.geometry,
            layers,
            steps=config.learn.steps,
            seqlen=config.learn.seqlen,
            learning_rate=config.learn.learning_rate,
            held_out=len(last),
            seed=config.seed,
            recompute=self.recompute,
            progress=progress,
        )
        self._finished("learning", started)
        return learned.layers, {
            "learning": {
                "kl_before": learned.before,
                "kl_after": learned.after,
                "fraction": learned.fraction,
            }
        }

    def fit(self, model_id: str, model_config: Mapping[str, Any]) -> dict[str, KVArtifact]:
        """Codebooks from the statistics, and the artifacts."""
        started = time.monotonic()
        artifacts = {}
        for name, config in self.configs.items():
            subjects = {(s.layer, s.kind): s for s in self.subjects if s.config is config}
            layers = range(len(self.geometry.layers))
            cache, fitted = self._fit_layers(config, subjects)
            learning: dict[str, Any] = {}
            if config.learn is not None:
                fitted, learning = self._learn(name, config, cache, fitted)
            artifacts[name] = KVArtifact(
                spec=cache,
                geometry=self.geometry,
                layers=fitted,
                model={"id": model_id, "config": dict(model_config)},
                calibration={
                    "recipe": name,
                    "settings": config.record(),
                    "data": dict(self.windows.source),
                    **self._amax(),
                    **learning,
                    "versions": {
                        "kvq-calib": _version("kvq-calib"),
                        "torch": torch.__version__,
                        "transformers": _version("transformers"),
                    },
                },
                outliers_per_token={
                    kind: [self._outliers_per_token(subjects[layer, kind]) for layer in layers]
                    for kind in KINDS
                },
            )
        self._finished("fit", started + self.seconds.get("learning", 0.0))
        return artifacts


def shared_setting(configs: Mapping[str, CalibrationConfig], name: str) -> Any:
    """A setting of the run that all recipes calibrated together must agree on."""
    values = {config_name: getattr(config, name) for config_name, config in configs.items()}
    if len(set(values.values())) > 1:
        raise ConfigError(f"recipes calibrated together must agree on {name}, not {values}")
    return next(iter(values.values()))


def _unique(subjects: Iterable[_Subject], name: Callable[[_Subject], str]) -> list[_Subject]:
    """One subject for each name."""
    return list({name(subject): subject for subject in subjects}.values())


def _by_layer(subjects: Iterable[_Subject]) -> dict[int, list[_Subject]]:
    grouped: dict[int, list[_Subject]] = {}
    for subject in subjects:
        grouped.setdefault(subject.layer, []).append(subject)
    return grouped


def _magnitude(layer: int, kind: Kind) -> str:
    """Name of the statistics of rotated keys or of values as they are."""
    return f"magnitude.{layer}.{kind}"


def _not_finite(layer: int, kind: Kind) -> CalibrationError:
    return CalibrationError(
        f"layer {layer} gives {kind}s that are not finite; try --dtype float32 or bfloat16, or check the checkpoint"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
