"""Windows of tokens, cut by the conventions of the literature.

Two conventions are published, and every data set can be cut by either:

- "random": windows start at seeded random places and may overlap, as in GPTQ and KVQuant. On C4 each window comes from
  a different document that is long enough.
- "consecutive": the documents are joined, tokenized once, and cut into windows that follow one another from the start.
  This is how perplexity is reported. On C4 the text is the first 1,100 documents of the validation shard, joined by
  spaces.

"auto", the default, is "consecutive" for evaluation. For calibration it is "random" on wikitext2 and c4, and "spread"
on python-docs and local text, which is often short. "spread" draws windows of the consecutive cut without repetition,
or takes all of them if there are no more than asked for.

If the tokenizer puts a beginning-of-sequence token before a text, every window starts with one, in place of one token
of text. Without it, Gemma's activations are meaningless. (In the literature only the first window has one.)
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kvq_calib.data import hub
from kvq_calib.data.files import DATA_SETS
from kvq_calib.data.local import check_documents, local_label, read_documents
from kvq_calib.data.python_docs import python_docs, python_docs_version
from kvq_calib.data.records import DEFAULT_FIELD
from kvq_calib.data.tokens import Ids, bos_token_id, encode
from kvq_calib.errors import DataError

__all__ = ["Convention", "Split", "TokenWindows", "check_dataset", "load_windows", "windows_beside"]

Split = Literal["calibration", "evaluation"]
Convention = Literal["auto", "consecutive", "random", "spread"]

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
    text_field: str = DEFAULT_FIELD,
) -> TokenWindows:
    """Tokenize a data set and cut it into windows.

    Args:
        dataset: "wikitext2", "c4", "python-docs", or what `find_files` takes: the path of a file of text or records,
            of a folder of those, a glob, or "-" for standard input. A local text is the same for both splits: give
            another for evaluation.
        tokenizer: a transformers tokenizer.
        samples: windows to return; None for all of the consecutive cut.
        seqlen: tokens in a window, including the beginning-of-sequence token.
        seed: seed of the random choices.
        split: "calibration" or "evaluation".
        convention: see the description of the module.
        text_field: field of the records in local files that holds their text; see `read_records`.

    Raises:
        DataError: unknown data set, unreadable text, no network, or less text than one window. If the text has fewer
            windows than asked for, all of them are returned and a warning is logged.
    """
    if seqlen < 2 or (samples is not None and samples < 1):
        raise DataError(f"at least one window of two tokens is needed, not {samples} of {seqlen}")
    _check_field(dataset, text_field)
    cut = _resolve(dataset, split, convention) if samples is not None else "consecutive"
    bos = bos_token_id(tokenizer)
    body = seqlen if bos is None else seqlen - 1
    total: int | None = None
    label = dataset
    if dataset == "c4" and cut == "random" and samples is not None:
        rows = _from_long_documents(hub.c4(split), tokenizer, samples, body, seed)
    else:
        documents, separator, label = _documents(dataset, split, tokenizer, text_field)
        rows, total = _cut(encode(tokenizer, separator.join(documents)), body, samples, seed, cut)
        if not len(rows):
            raise _too_short(dataset, total, seqlen)
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
        "sha256": _digest(rows),
    }
    if text_field != DEFAULT_FIELD:
        source["text_field"] = text_field
    return TokenWindows(torch.from_numpy(rows), source)


def windows_beside(found: TokenWindows, known: TokenWindows, most: int, none: str) -> TokenWindows:
    """The first windows that are not among others.

    Args:
        found: to choose from.
        known: the others, of the same length.
        most: how many are wanted at most.
        none: the error where all are among the others.

    Raises:
        DataError: there are none.
    """
    seen = {tuple(row) for row in known.ids.tolist()}
    rows = [row for row in found.ids.tolist() if tuple(row) not in seen][:most]
    if not rows:
        raise DataError(none)
    ids = np.asarray(rows, dtype=np.int64)
    source = {**found.source, "windows": len(rows), "requested": most, "sha256": _digest(ids)}
    return TokenWindows(torch.from_numpy(ids), source)


def _digest(rows: Ids) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows, dtype="<i8").tobytes()).hexdigest()


def check_dataset(dataset: str, text_field: str = DEFAULT_FIELD, seqlen: int = 2) -> None:
    """Refuse an unusable data set before a model is loaded, as far as that is possible without a tokenizer.

    Args:
        dataset, text_field, seqlen: as in `load_windows`. Standard input is read here, and kept.

    Raises:
        DataError: not the name of a data set and not a path; a file is of an unknown kind, cannot be read, or has no
            text under the field in its first record; or the text is too short for one window.
    """
    _check_field(dataset, text_field)
    if dataset not in DATA_SETS:
        check_documents(dataset, text_field, seqlen)


def _check_field(dataset: str, text_field: str) -> None:
    if dataset in DATA_SETS and text_field != DEFAULT_FIELD:
        raise DataError(
            f"--text-field is for records in files; {dataset} has a field of its own: leave it out"
        )


def _resolve(
    dataset: str, split: Split, convention: Convention
) -> Literal["consecutive", "random", "spread"]:
    if convention != "auto":
        return convention
    if split == "evaluation":
        return "consecutive"
    return "random" if dataset in ("wikitext2", "c4") else "spread"


def _documents(dataset: str, split: Split, tokenizer: Any, text_field: str) -> tuple[Iterable[str], str, str]:
    """Return the documents, the separator to join them with, and the name to write to results."""
    if dataset not in DATA_SETS:
        return read_documents(dataset, tokenizer, text_field), "\n\n", local_label(dataset)
    if dataset == "wikitext2":
        return hub.wikitext2(split), "\n\n", dataset
    if dataset == "c4":
        documents = (text for text, _ in zip(hub.c4(split), range(hub.C4_EVALUATION_DOCUMENTS), strict=False))
        return documents, " ", dataset
    return python_docs(split), "\n\n", f"{dataset} {python_docs_version()}"


def _cut(
    tokens: Ids, body: int, samples: int | None, seed: int, cut: Literal["consecutive", "random", "spread"]
) -> tuple[Ids, int]:
    """Return windows `[N, body]` of a text, and the number of its tokens. N is 0 if the text is too short."""
    total = len(tokens)
    starts = _starts(total, body, samples, seed, cut) if total >= body else []
    return np.stack([tokens[start : start + body] for start in starts]) if starts else tokens[:0, None], total


def _too_short(dataset: str, total: int, seqlen: int) -> DataError:
    tokens = "1 token" if total == 1 else f"{total} tokens"
    return DataError(
        f"{dataset} has {tokens}, less than one window of {seqlen}; use a smaller --seqlen or more text"
    )


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


def _from_long_documents(documents: Iterable[str], tokenizer: Any, samples: int, body: int, seed: int) -> Ids:
    """Draw one window from each of the first documents that have enough tokens."""
    draw = random.Random(seed)
    rows = []
    for text in documents:
        if len(text) < body:  # a token is almost never shorter than a character
            continue
        tokens = encode(tokenizer, text)
        if len(tokens) < body:
            continue
        start = draw.randint(0, len(tokens) - body)
        rows.append(tokens[start : start + body])
        if len(rows) == samples:
            break
    if not rows:
        raise DataError(f"c4 has no document of {body} tokens; use shorter windows")
    return np.stack(rows)
