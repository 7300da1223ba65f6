"""Self-generated calibration text: windows that the model generates.

Sixteen windows of one kind of text say little about other kinds. Generated text is drawn from the model's distribution,
so it has the styles and languages of the training text. LLM-QAT (arXiv 2305.17888) and Williams et al. (arXiv
2410.17170) calibrate weights on such text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvq_calib.calibrate.statistics import Reduction, Statistics
from kvq_calib.calibrate.vocabulary_samples import sample_tokens
from kvq_calib.errors import CalibrationError
from kvq_calib.model.compat import cache_of
from kvq_calib.model.inspect import next_pass
from kvq_calib.model.placement import input_device

__all__ = ["SelfGeneratedText", "continue_texts"]

#: Tokens of a document. Short documents are common in web text, and give many different beginnings.
_DOCUMENT_TOKENS = 256
#: Number of documents generated at a time. Their cache is as large as that of three windows of 2,048 tokens.
_DOCUMENTS = 24
#: Number of pieces into which two documents are cut for repetition.
_PIECES = 8


class SelfGeneratedText(Statistics):
    """Generated documents, by batch. Batches that are not generated yet are zero.

    Args:
        plain: number of windows to fill with documents.
        repeating: number of windows to fill with documents and repeats of them.
        seqlen: tokens in a window.
        prefix: tokens at the beginning of a text, such as the beginning-of-sequence token.
        vocabulary: size of the model's vocabulary.
        seed: seed of all random choices.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {"ids": "sum"}
    not_negative = frozenset({"ids"})

    def __init__(
        self,
        plain: int,
        repeating: int,
        seqlen: int,
        *,
        prefix: tuple[int, ...],
        vocabulary: int,
        seed: int,
    ) -> None:
        self._prefix, self._seed = torch.tensor(prefix, dtype=torch.int64), seed
        self._vocabulary = vocabulary
        self._body = seqlen - len(prefix)
        length = min(_DOCUMENT_TOKENS, self._body)
        filling, mixed = (-(-windows * self._body // length) for windows in (plain, repeating))
        documents = max(
            filling, mixed - mixed // 3
        )  # with repeats, one of three documents repeats the others
        # Whole batches, so that a larger number of windows begins with the same text.
        self.ids = torch.zeros(-(-documents // _DOCUMENTS), _DOCUMENTS, length, dtype=torch.int64)
        first = sample_tokens(vocabulary, self.ids[..., 0].numel(), torch.Generator().manual_seed(seed))
        #: The first token of each document, int64 ``[batches, documents]``.
        self.beginnings = first.view(self.ids.shape[:2])

    def is_possible(self, state: Mapping[str, Tensor]) -> bool:
        """See :class:`Statistics`."""
        return super().is_possible(state) and bool((state["ids"] < self._vocabulary).all())

    def generate(self, model: Any, batch: int) -> None:
        """Let the model generate one batch."""
        generator = torch.Generator().manual_seed((self._seed + ((batch + 1) << 32)) % (1 << 63))
        prompt = torch.cat((self._prefix.expand(self.ids.shape[1], -1), self.beginnings[batch, :, None]), 1)
        text = continue_texts(model, prompt, self.ids.shape[2] - 1, generator)
        self.ids[batch] = text[:, len(self._prefix) :]

    def windows(self, count: int, *, repeats: bool) -> Tensor:
        """The documents, one after the other, cut into windows.

        Args:
            count: number of windows, at most that of the constructor. A larger number begins with the same text.
            repeats: whether every two documents are followed by one that repeats pieces of them in random order.

        Returns:
            int64 ``[count, seqlen]``.
        """
        documents = self.ids.flatten(0, 1)
        if repeats:
            pairs = documents.unflatten(0, (-1, 2))
            documents = torch.cat((pairs, self._repeated(pairs)[:, None]), 1).flatten(0, 1)
        text = documents.flatten()[: count * self._body].view(count, self._body)
        return torch.cat((self._prefix.expand(count, -1), text), 1)

    def _repeated(self, pairs: Tensor) -> Tensor:
        """Pieces of each two documents ``[P, 2, T]`` in random order, as long as one document: ``[P, T]``."""
        length = pairs.shape[-1]
        pieces = pairs.flatten(1).split(-(-2 * length // _PIECES), dim=1)
        generator = torch.Generator().manual_seed(self._seed)
        repeated = []
        for row in zip(*pieces, strict=True):
            order = torch.randperm(len(row), generator=generator).tolist()
            repeated.append(torch.cat([row[place] for place in order])[:length])
        return torch.stack(repeated)


@torch.no_grad()
def continue_texts(model: Any, prompt: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Continue texts with tokens drawn from the model's predictions. End-of-sequence tokens do not end them.

    Args:
        model: causal language model in eval mode.
        prompt: int64 ``[B, P]``.
        tokens: number of tokens to add.
        generator: random generator.

    Returns:
        int64 ``[B, P + tokens]``, including the prompt.

    Raises:
        CalibrationError: the model's predictions are not finite.
    """
    text, step, cache = [prompt], prompt, None
    for added in range(tokens):
        start = 0 if cache is None else prompt.shape[1] + added - 1
        output = model(**next_pass(model, step.to(input_device(model)), cache, start), use_cache=True)
        cache = cache_of(output)
        step = _drawn(output.logits[:, -1], generator)
        text.append(step)
    return torch.cat(text, 1)


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token of each row, from its predicted distribution: logits ``[B, V]`` to int64 ``[B, 1]`` on the CPU.

    Raises:
        CalibrationError: the predictions are not finite.
    """
    up_to = logits.double().softmax(-1).cumsum(-1).cpu()
    if not bool(torch.isfinite(up_to).all()):
        raise CalibrationError("the model's predictions are not finite; try --dtype float32")
    # The smallest token whose cumulative probability exceeds a uniform number. Rounding must not leave the vocabulary.
    place = torch.rand(len(up_to), 1, generator=generator, dtype=torch.float64) * up_to[:, -1:]
    return torch.searchsorted(up_to, place, right=True).clamp(max=up_to.shape[1] - 1)
