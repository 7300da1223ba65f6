"""Loading of language models."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvq_calib.errors import ModelError, one_line
from kvq_calib.model.compat import softcap_implementation
from kvq_calib.model.explain import check_files, check_shapes, explain, listed
from kvq_calib.model.hub import hub_reachable, quiet

__all__ = [
    "LoadedModel",
    "check_length",
    "check_tokens",
    "load_configuration",
    "load_model",
    "vocabulary_of",
]

_log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode with frozen parameters, and its tokenizer.

    Attributes:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        name: name as the user gave it; for local folders and files, the last part of the path.
    """

    model: Any
    tokenizer: Any
    name: str


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: hub id, local folder, or path of a `.gguf` file.
        device: "auto" (CUDA if available, else CPU) or a torch device; not used with `device_map`.
        dtype: "auto" (float32 on the CPU, else the checkpoint's), "float32", "bfloat16" or "float16".
        trust_remote_code: whether to run code from the checkpoint.
        device_map: spreads a model over devices, as in transformers (needs accelerate).
        max_memory: largest number of bytes of weights on each device of an automatic map ("cpu", or the number of a
            GPU), as a number or as text ("20GiB"). Other weights are read from disk when they are used: from the
            checkpoint if it has the right format, else from a temporary folder that is deleted with the model.

    Raises:
        ModelError: the model is not found, not readable, or not a causal language model; weights are missing or have
            wrong shapes; the tokenizer or accelerate is missing. Unused weights are ignored, with a logged warning.
    """
    if max_memory is not None and device_map is None:
        raise ModelError("max_memory limits the devices of a device_map; give --device-map auto with it")
    if dtype != "auto" and dtype not in _DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; use auto, {', '.join(_DTYPES)}")
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ModelError("spreading a model over devices needs one more package: pip install accelerate")
    target = _device(device)
    location, label, source = _find(name)
    check_files(name, location, source.get("gguf_file"))
    source["trust_remote_code"] = trust_remote_code

    spread: dict[str, Any] = {}
    if device_map is not None:
        offloaded = tempfile.TemporaryDirectory(prefix="kvq-offload-")
        spread = {"device_map": device_map, "offload_folder": offloaded.name}
        if max_memory is not None:
            spread["max_memory"] = dict(max_memory)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(location, **source)
        except Exception as error:
            raise ModelError(explain(name, source, error)) from error
        try:  # first, because weights take longer
            tokenizer = AutoTokenizer.from_pretrained(location, **source)
        except Exception as error:
            raise ModelError(explain(name, source, error, "the tokenizer of ")) from error
        try:
            # Mismatched sizes are refused below, with their names.
            arguments = {**source, "output_loading_info": True, "ignore_mismatched_sizes": True}
            if "gguf_file" not in source:
                arguments["use_safetensors"] = True  # never unpickle a checkpoint
            if implementation := softcap_implementation(config):
                arguments["attn_implementation"] = implementation
            on_cpu = device_map is None and target.type == "cpu"
            arguments["dtype"] = _DTYPES.get(dtype, torch.float32 if on_cpu else "auto")
            model, loading = AutoModelForCausalLM.from_pretrained(
                location, config=config, **spread, **arguments
            )
        except Exception as error:
            raise ModelError(explain(name, source, error)) from error
    _check_weights(name, loading)
    if device_map is not None:
        weakref.finalize(model, offloaded.cleanup)
    else:
        try:
            model.to(target)
        except RuntimeError as error:
            raise ModelError(f"cannot put {name} on device {device!r}: {one_line(error)}") from error
    return LoadedModel(model.eval().requires_grad_(False), tokenizer, label)


def load_configuration(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load only the configuration of a model. Arguments are as in :func:`load_model`.

    Raises:
        ModelError: it is not found or not readable.
    """
    location, _, source = _find(name)
    source["trust_remote_code"] = trust_remote_code
    with quiet():
        try:
            return AutoConfig.from_pretrained(location, **source)
        except Exception as error:
            raise ModelError(explain(name, source, error)) from error


def _find(name: str) -> tuple[str, str, dict[str, Any]]:
    """The location of the model, its name, and arguments for `from_pretrained`."""
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"no such file: {name}")
        if importlib.util.find_spec("gguf") is None:
            raise ModelError("reading a .gguf file needs two more packages: pip install gguf accelerate")
        return str(path.parent), path.name, {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} holds no config.json, so it is not a transformers model folder")
        return str(path), path.resolve().name, {}
    if path.exists():
        raise ModelError(f"{name} is neither a model folder nor a .gguf file")
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise ModelError(f"no such folder: {name}")
    return name, name, {"local_files_only": not hub_reachable()}


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from error
    if found.type == "cuda" and not (found.index or 0) < torch.cuda.device_count():
        raise ModelError(
            f"no device {device!r}: torch sees {torch.cuda.device_count()} GPUs; use --device cpu"
        )
    return found


def _check_weights(name: str, loading: Mapping[str, Any]) -> None:
    """Refuse missing weights and wrong shapes. Warn of unused weights."""
    check_shapes(name, loading["mismatched_keys"])
    if missing := loading["missing_keys"]:
        raise ModelError(f"the checkpoint {name} lacks {len(missing)} weights, {min(missing)} among them")
    if unused := loading["unexpected_keys"]:
        _log.warning(
            "%s holds %d weights that its configuration has no place for (%s); they are left out",
            *(name, len(unused), listed(unused)),
        )


def check_length(model: nn.Module, seqlen: int) -> None:
    """Refuse windows longer than the model's context, because their statistics would be useless.

    Raises:
        ModelError: ``seqlen`` is above the configuration's ``max_position_embeddings``.
    """
    config: Any = model.config
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and seqlen > limit:
        raise ModelError(
            f"windows of {seqlen} tokens are longer than the {limit} positions this model was trained for, and its "
            f"keys and values there mean nothing; use --seqlen {limit} or less"
        )


def vocabulary_of(model: nn.Module) -> int:
    """The number of tokens in a model's embedding table.

    Raises:
        ModelError: the model has several embedding tables.
    """
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(getattr(embeddings, "weight", None), Tensor):
        raise ModelError(
            f"{type(model).__name__} embeds several streams of tokens; only models that read one text can be calibrated"
        )
    return int(embeddings.weight.shape[0])


def check_tokens(model: nn.Module, ids: Tensor) -> None:
    """Check that all tokens are in a model's vocabulary. On a GPU, other tokens would crash the process.

    Args:
        model: a language model.
        ids: token ids, integers of any shape.

    Raises:
        ModelError: a token is outside; the message names the largest, or a negative one.
    """
    known = vocabulary_of(model)
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= known:
        raise ModelError(
            f"the text has token {low if low < 0 else high}, and the model knows 0 to {known - 1}: the tokenizer is of "
            "another model, or model.resize_token_embeddings was not called after tokens were added"
        )
