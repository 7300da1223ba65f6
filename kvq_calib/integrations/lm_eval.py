"""A model for lm-evaluation-harness whose keys and values are quantized by an artifact.

Log likelihoods come from one forward pass in which every key and value is quantized
(:mod:`kvq_calib.evaluate.prefill`), and generated text from the packed cache (:class:`kvq_calib.KVQCache`). An artifact
with a window of recent exact tokens is also scored through the packed cache, a few tokens per step, because one pass
would quantize tokens that are exact. The harness pads batches on the right for scoring, and on the left for generation.
Padding does not change the codes of real tokens. But it counts towards blocks of 32, so in the packed cache the batch
influences which of the newest tokens are exact.

Importing this module needs lm_eval, and registers the model under the name ``kvq``. ``kvq-lm-eval`` imports it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.errors import ConfigError
from kvq_calib.evaluate.decode import logits_through
from kvq_calib.evaluate.prefill import PrefillQuantizer
from kvq_calib.model.capture import intercept
from kvq_calib.model.compat import with_cache
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.load import load_model
from kvq_calib.runtime import KVQCache, attached

__all__ = ["KVQuantLM"]

_log = logging.getLogger("kvq_calib.integrations")

#: Arguments of HFLM that apply to a loaded model. The others concern loading.
_PASSED_ON = frozenset(
    {
        "add_bos_token",
        "batch_size",
        "chat_template_args",
        "enable_thinking",
        "logits_cache",
        "max_batch_size",
        "max_length",
        "mixed_precision_dtype",
        "prefix_token_id",
        "softmax_dtype",
        "think_end_token",
        "truncation",
    }
)


@register_model("kvq")
class KVQuantLM(HFLM):  # type: ignore[misc]
    """``--model kvq --model_args pretrained=MODEL,artifact=FILE``.

    Args:
        pretrained: hub id, local folder or ``.gguf`` file, as for the other commands.
        artifact: the artifact's file.
        device: "auto" or a torch device, from ``--device``. The harness's default is ``cuda:0``, which means the CPU if
            there is no GPU, as for ``--model hf``.
        dtype, device_map, trust_remote_code: as in :func:`kvq_calib.model.load.load_model`.
        options: arguments of ``HFLM`` that do not concern loading, such as ``batch_size`` and ``max_length``.

    Raises:
        ConfigError: an argument is missing or unknown.
        ArtifactError, ModelError, RuntimeMismatchError: the artifact or the model cannot be used, or they do not fit.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        artifact: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        device_map: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        for name, value in (("pretrained", pretrained), ("artifact", artifact)):
            if not isinstance(value, str):
                raise ConfigError(f"the model kvq needs {name}: --model_args pretrained=MODEL,artifact=FILE")
        unknown = sorted(options.keys() - _PASSED_ON)
        if unknown:
            raise ConfigError(
                f"the model kvq has no argument {unknown[0]!r}; it takes pretrained, artifact, device, dtype, "
                f"device_map, trust_remote_code, {', '.join(sorted(_PASSED_ON))}"
            )
        self.artifact = KVArtifact.load(str(artifact))
        loaded = load_model(
            str(pretrained),
            device=_available(device),
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )
        self.artifact.check_model(model_fingerprint(loaded.model))
        with attached(loaded.model):  # refuses an artifact that cannot be streamed, before hours of work
            self._packed = KVQCache(self.artifact, loaded.model)
        self._quantizer = PrefillQuantizer.of(self.artifact, loaded.model)
        self._names = {"kvq_model": loaded.name, "kvq_artifact": str(artifact)}
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", **options)

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """The hooks on the model while it scores; set once for all requests of a task."""
        scoring = attached(self.model) if self._streams else intercept(self.model, self._quantizer)
        with scoring:
            yield

    @property
    def _streams(self) -> bool:
        """Whether log likelihoods are computed through the packed cache."""
        return self.artifact.spec.recent_tokens > 0

    def loglikelihood(self, *args: Any, **kwargs: Any) -> Any:
        """Log likelihoods of continuations, with the cache quantized."""
        with self._scoring():
            return super().loglikelihood(*args, **kwargs)

    def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> Any:
        """Log likelihoods of whole texts, with the cache quantized."""
        with self._scoring():
            return super().loglikelihood_rolling(*args, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits ``[B, T, V]`` of token ids ``[B, T]``; called while scoring."""
        if not self._streams:
            logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
            return logits
        precision = self.mixed_precision_dtype
        try:
            with torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
                return logits_through(self.model, self._packed, inps)
        finally:
            self._packed.reset()

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Token ids ``[B, T + new]``, generated through the packed cache."""
        try:
            with attached(self.model):
                tokens: torch.Tensor = super()._model_generate(*args, **with_cache(self._packed), **kwargs)
        finally:
            self._packed.reset()
        return tokens

    def get_model_info(self) -> dict[str, Any]:
        """Information that the harness writes with its results, including the artifact and its bits at 4,096 tokens."""
        bits = self.artifact.bits_per_element(4096)
        return {**super().get_model_info(), **self._names, "kvq_bits_per_element_4096": bits}


def _available(device: str | None) -> str:
    """The device to load on: the requested one, or the CPU if the default ``cuda:0`` does not exist."""
    if device in ("cuda", "cuda:0") and not torch.cuda.is_available():
        _log.warning("there is no GPU here: the model runs on the CPU")
        return "auto"
    return device or "auto"
