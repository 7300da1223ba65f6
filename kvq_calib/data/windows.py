"""Windows of tokens, cut by the conventions of the literature.

Two conventions are published, and every data set can be cut by either:

- "random": windows start at seeded random places and may overlap, as GPTQ and KVQuant calibrate. On C4 each
window comes
  from another document that is long enough by itself.
- "consecutive": the text is joined, tokenized once and cut into windows that follow one another from its
start, as
  perplexity is reported. On C4 that is the first 1,100 documents of the validation shard, joined by spaces.

"auto", the default, is "consecutive" for evaluation. For calibration it is "random" on wikitext2 and c4, and
"spread" on python-docs and local text, which is often short: windows of the consecutive grid, all of them
where no more exist than are asked for, else a seeded choice without repetition.

Where the tokenizer puts a beginning-of-sequence token before a text, every window starts with one, at the
cost of one token of text: Gemma's activations mean nothing without it. (The literature has it in the first
window only.)
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kvq_calib.data import hub
from kvq_calib.data.local import SUFFIXES, read_documents
from kvq_calib.data.python_docs import python_docs, python_docs_version
from kvq_calib.errors import DataError

__all__ = ["Convention", "Split", "TokenWindows", "check_dataset", "load_windows"]

Split = Literal["calibration", "evaluation"]
Convention = Literal["auto", "consecutive", "random", "spread"]

_NAMES = ("wikitext2", "c4", "python-docs")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of equal length.

    Attributes:
        ids: int64 [N, seqlen].
        source: JSON-able: `dataset`, `split`, `convention`, `seed` (None where nothing was drawn), `seqlen`,
            `windows` (N), `requested` (None for all), `bos` (token id or None), `tokens` (of the whole text;
            None where it was not read whole) and `sha256` of the ids as little-endian int64.
    """

    ids: Tensor
    source: dict[str, Any]


def load_windows(
    dataset: str,
    tokenizer: Any,
    *,
    samples: int | None,
    seqlen: int,
    seed: int = 0,
    split: Split = "calibration",
    convention: Convention = "auto",
) -> TokenWindows:
    """Tokenize a data set and cut it into windows.

    Args:
        dataset: "wikitext2", "c4", "python-docs", or the path of a `.txt`, `.raw` or `.jsonl` file or of a
            folder of those. A local text is the same for both splits: give another for evaluation.
        tokenizer: a transformers tokenizer.
        samples: windows to return; None for all of the consecutive cut.
        seqlen: tokens in a window, the beginning-of-sequence token included.
        seed: of the random choices.
        split: "calibration" or "evaluation".
        convention: see the module's text.

    Raises:
        DataError: unknown data set, unreadable text, no network, or less text than one window. Where the text
            has fewer windows than asked for, those are returned, with a logged warning.
    """
    if seqlen < 2 or (samples is not None and samples < 1):
        raise DataError(f"at least one window of two tokens is needed, not {samples} of {seqlen}")
    cut = _resolve(dataset, split, convention) if samples is not None else "consecutive"
    bos = _bos(tokenizer)
    body = seqlen if bos is None else seqlen - 1
    total: int | None = None
    label = dataset
    if dataset == "c4" and cut == "random" and samples is not None:
        rows = _from_long_documents(hub.c4(split), tokenizer, samples, body, seed)
    else:
        documents, separator, label = _documents(dataset, split)
        tokens = _encode(tokenizer, separator.join(documents))
        total = len(tokens)
        if total < body:
            raise DataError(
                f"{dataset} has {total} tokens, less than one window of {seqlen}; use a smaller --seqlen or more text"
            )
        starts = _starts(total, body, samples, seed, cut)
        rows = np.stack([tokens[start : start + body] for start in starts])
    if samples is not None and len(rows) < samples:
        _log.warning(
            "%s has %d windows of %d tokens, not the %d asked for", dataset, len(rows), seqlen, samples
        )
    if bos is not None:
        rows = np.concatenate((np.full((len(rows), 1), bos, dtype=np.int64), rows), axis=1)
    chosen = cut == "spread" and total is not None and samples is not None and total // body > samples
    source = {
        "dataset": label,
        "split": split,
        "convention": cut,
        "seed": seed if chosen or cut == "random" else None,
        "seqlen": seqlen,
        "windows": len(rows),
        "requested": samples,
        "bos": bos,
        "tokens": total,
        "sha256": hashlib.sha256(np.ascontiguousarray(rows, dtype="<i8").tobytes()).hexdigest(),
    }
    return TokenWindows(torch.from_numpy(rows), source)


def check_dataset(dataset: str) -> None:
    """Refuse a data set that does not exist: cheap, to be called before a model is loaded.

    Raises:
        DataError: neither the name of a data set nor a path.
    """
    if dataset not in _NAMES and not Path(dataset).expanduser().exists():
        raise DataError(
            f"no such data set or file: {dataset}; use {', '.join(_NAMES)}, or the path of a "
            f"{', '.join(SUFFIXES)} file or of a folder of those"
        )


def _resolve(
    dataset: str, split: Split, convention: Convention
) -> Literal["consecutive", "random", "spread"]:
    if convention != "auto":
        return convention
    if split == "evaluation":
        return "consecutive"
    return "random" if dataset in ("wikitext2", "c4") else "spread"


def _documents(dataset: str, split: Split) -> tuple[Iterable[str], str, str]:
    """Return documents, what stands between them when joined, and the name for the record."""
    if dataset == "wikitext2":
        return hub.wikitext2(split), "\n\n", dataset
    if dataset == "c4":
        documents = (text for text, _ in zip(hub.c4(split), range(hub.C4_EVALUATION_DOCUMENTS), strict=False))
        return documents, " ", dataset
    if dataset == "python-docs":
        return python_docs(split), "\n\n", f"{dataset} {python_docs_version()}"
    check_dataset(dataset)
    path = Path(dataset).expanduser()
    return read_documents(path), "\n\n", path.resolve().name


def _starts(
    total: int, body: int, samples: int | None, seed: int, cut: Literal["consecutive", "random", "spread"]
) -> list[int]:
    """Return where windows of `body` tokens start in a text of `total` tokens."""
    grid = total // body
    if cut == "random" and samples is not None:
        draw = random.Random(seed)
        return [draw.randint(0, total - body) for _ in range(samples)]
    if samples is None or grid <= samples:
        chosen = list(range(grid))
    elif cut == "spread":
        chosen = sorted(random.Random(seed).sample(range(grid), samples))
    else:
        chosen = list(range(samples))
    return [window * body for window in chosen]


def _from_long_documents(
    documents: Iterable[str], tokenizer: Any, samples: int, body: int, seed: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Draw one window from each of the first documents that have enough tokens."""
    draw = random.Random(seed)
    rows = []
    for text in documents:
        if len(text) < body:  # a token is hardly ever less than a character
            continue
        tokens = _encode(tokenizer, text)
        if len(tokens) < body:
            continue
        start = draw.randint(0, len(tokens) - body)
        rows.append(tokens[start : start + body])
        if len(rows) == samples:
            break
    if not rows:
        raise DataError(f"c4 has no document of {body} tokens; use shorter windows")
    return np.stack(rows)


def _encode(tokenizer: Any, text: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the tokens of a text of any length, without special tokens."""
    limit = tokenizer.model_max_length
    tokenizer.model_max_length = int(1e30)  # no warning that the text is longer than the model's context
    try:
        return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
    finally:
        tokenizer.model_max_length = limit


def _bos(tokenizer: Any) -> int | None:
    """Return the id of the token that the tokenizer puts before a text, None where it puts none."""
    bos: int | None = tokenizer.bos_token_id
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    if bos is not None and with_special[:1] == [bos] and without[:1] != [bos]:
        return bos
    return None
