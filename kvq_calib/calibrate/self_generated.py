"""Self-generated calibration text: windows that the model writes itself.

Sixteen windows of one kind of text say little about others, and a model knows more of them than a calibration run can
be given: what it generates is drawn from its own distribution, with the registers, languages and oddities of its
training text. (LLM-QAT, arXiv 2305.17888, and Williams et al., arXiv 2410.17170, calibrate weights on such text.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvq_calib.calibrate.statistics import Reduction, Statistics
from kvq_calib.calibrate.vocabulary_samples import sample_tokens
from kvq_calib.errors import CalibrationError
from kvq_calib.model.compat import cache_of, with_cache
from kvq_calib.model.placement import input_device

__all__ = ["SelfGeneratedText", "continue_texts"]

#: Tokens of a document: as much as short documents of web text have, and many beginnings for the same work.
_DOCUMENT_TOKENS = 256
#: Documents generated at a time: their cache is that of two windows of 2,048 tokens.
_DOCUMENTS = 16
#: Pieces that two documents are cut into to be repeated.
_PIECES = 8


class SelfGeneratedText(Statistics):
    """Documents by the batch they are generated in; those of batches that are not generated yet are zeros.

    Args:
        plain: windows that the documents are to fill one after the other.
        repeating: windows that they are to fill with repeats between them.
        seqlen: tokens of a window.
        prefix: tokens that a text begins with, such as the beginning-of-sequence token.
        vocabulary: number of tokens that the model knows.
        seed: of every draw.
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
        documents = max(filling, mixed - mixed // 3)  # of three in mixed text, one repeats the others
        # Whole batches, so that more windows begin with the same text.
        self.ids = torch.zeros(-(-documents // _DOCUMENTS), _DOCUMENTS, length, dtype=torch.int64)
        first = sample_tokens(vocabulary, self.ids[..., 0].numel(), torch.Generator().manual_seed(seed))
        #: What each document begins with, int64 ``[batches, documents]``.
        self.beginnings = first.view(self.ids.shape[:2])

    def is_possible(self, state: Mapping[str, Tensor]) -> bool:
        """See :class:`Statistics`."""
        return super().is_possible(state) and bool((state["ids"] < self._vocabulary).all())

    def generate(self, model: Any, batch: int) -> None:
        """Let the model write one batch."""
        generator = torch.Generator().manual_seed((self._seed + ((batch + 1) << 32)) % (1 << 63))
        prompt = torch.cat((self._prefix.expand(self.ids.shape[1], -1), self.beginnings[batch, :, None]), 1)
        text = continue_texts(model, prompt, self.ids.shape[2] - 1, generator)
        self.ids[batch] = text[:, len(self._prefix) :]

    def windows(self, count: int, *, repeats: bool) -> Tensor:
        """The documents one after the other.

        Args:
            count: of windows, at most those of the constructor. More begin with the same text.
            repeats: after every two documents comes one that repeats pieces of them in random order.

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
        """Pieces of each two documents ``[P, 2, T]`` in random order, as long as one, ``[P, T]``."""
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
    """Continue texts by tokens drawn from the model's predictions, whatever it says of their end.

    Args:
        model: causal language model in eval mode.
        prompt: int64 ``[B, P]``.
        tokens: to add.
        generator: of the draws.

    Returns:
        int64 ``[B, P + tokens]``, the prompt included.

    Raises:
        CalibrationError: the model's predictions are not numbers.
    """
    text, step, cache = [prompt], prompt, None
    for _ in range(tokens):
        output = model(input_ids=step.to(input_device(model)), **with_cache(cache), use_cache=True)
        cache = cache_of(output)
        odds = output.logits[:, -1].double().softmax(-1).cpu()
        if not bool(torch.isfinite(odds).all()):
            raise CalibrationError("the model's predictions are not finite; try --dtype float32")
        step = torch.multinomial(odds, 1, generator=generator)
        text.append(step)
    return torch.cat(text, 1)
