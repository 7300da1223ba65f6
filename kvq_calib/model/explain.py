"""Explains in one line why a model cannot be loaded, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvq_calib.errors import ModelError, one_line

__all__ = ["check_files", "check_shapes", "explain", "listed"]

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
#: Largest size of a Git LFS pointer, which has three short lines.
_LFS_BYTES = 1024
#: Every tokenizer has a file with one of these names.
_TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "*.spm", "*bpe*", "merges*")


def check_files(name: str, location: str, gguf_file: str | None) -> None:
    """Refuse a model on disk with missing files, judging by names and beginnings of files.

    Missing files may be the tokenizer, which some releases of transformers silently replace by an empty one, or files
    behind Git LFS pointers, which a clone without ``git lfs`` leaves.

    Args:
        name: name of the model, as the user gave it.
        location: folder, or the id of a model on the hub, which is not checked.
        gguf_file: the one file of the folder that will be read, ``None`` for all.

    Raises:
        ModelError: files are missing; the message names them.
    """
    folder = Path(location)
    if not folder.is_dir():
        return
    if gguf_file is None and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ModelError(
            f"{name} holds no tokenizer; put the model's tokenizer files (tokenizer.json, tokenizer_config.json, ...) "
            "beside its config.json"
        )
    for file in [folder / gguf_file] if gguf_file else sorted(folder.iterdir()):
        if (
            file.is_file()
            and file.stat().st_size <= _LFS_BYTES
            and file.read_bytes().startswith(_LFS_POINTER)
        ):
            raise ModelError(
                f"cannot load {name}: {file.name} is a Git LFS pointer ({file.stat().st_size} bytes), not the file "
                "itself; fetch that with git lfs pull"
            )


def check_shapes(name: str, mismatched: Iterable[Any]) -> None:
    """Refuse weights whose shapes differ from the configuration.

    Args:
        name: name of the model, as the user gave it.
        mismatched: name, shape in the checkpoint and shape in the model of each such weight.

    Raises:
        ModelError: there are such weights; the message names the first one and both shapes.
    """
    found = sorted((str(weight), list(held), list(wanted)) for weight, held, wanted in mismatched)
    if found:
        weight, held, wanted = found[0]
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ModelError(
            f"the weights of {name} do not fit its config.json: {weight} is {held}, and the configuration makes it "
            f"{wanted}{others}"
        )


def explain(name: str, source: Mapping[str, Any], error: Exception, part: str = "") -> str:
    """Why a configuration, tokenizer or weights cannot be loaded.

    Args:
        name: name of the model, as the user gave it.
        source: arguments of ``from_pretrained`` that locate the model.
        error: the exception from transformers.
        part: part of the model, such as "the tokenizer of ".
    """
    reason = one_line(error, 300)
    if "Unrecognized configuration class" in reason:
        return f"{name} is not a causal language model that transformers can load"
    if not source.get("trust_remote_code") and "trust_remote_code" in str(error):
        return f"{name} brings code of its own; if you trust it, --trust-remote-code runs it"
    if "gguf_file" in source or "local_files_only" not in source:
        return f"cannot load {part}{name}: {reason}"
    if source["local_files_only"]:
        return (
            f"cannot load {name}: there is no such folder here, the hub cannot be reached, and the model is not in its "
            "local cache; give a model folder or a .gguf file"
        )
    return f"cannot load {part}{name} from the hub, and there is no such folder here: {reason}"


def listed(names: Iterable[str], most: int = 2) -> str:
    """The first names of a list, and a note if there are more."""
    every = sorted(names)
    return ", ".join([*every[:most], *(["..."] if len(every) > most else [])])
