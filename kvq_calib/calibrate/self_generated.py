"""Text that the model writes itself.

Sixteen windows of one kind of text say little about others, and a model knows more of them than a calibration run can be
given: what it writes is drawn from its own distribution, with the registers, languages and oddities of its training text.
(Self-generated calibration data: LLM-QAT, arXiv 2305.17888, and Williams et al., arXiv 2410.17170, for weights.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kvq_calib.calibrate.vocabulary_samples import drawn
from kvq_calib.errors import CalibrationError
from kvq_calib.model.compat import cache_of, with_cache
from kvq_calib.model.placement import input_device

__all__ = ["WrittenText", "write"]

#: Tokens of a document: as much as short documents of web text have, and many beginnings for the same work.
_DOCUMENT_TOKENS = 256
#: Documents written at a time: their cache is that of two windows of 2,048 tokens.
_DOCUMENTS = 16
#: Pieces that two documents are cut into to be repeated.
_PIECES = 8


class WrittenText:
    """Documents by the batch they are written in; those of batches that are not written yet are zeros.

    Args:
        windows: that the documents are to fill, without repeats and with them.
        seqlen: tokens of a window.
        prefix: tokens that a text begins with, such as the beginning-of-sequence token.
        vocabulary: number of tokens that a document can begin with.
        seed: of every draw.
    """

    def __init__(
        self,
        windows: Mapping[bool, int],
        seqlen: int,
        *,
        prefix: tuple[int, ...],
        vocabulary: int,
        seed: int,
    ) -> None:
        self._prefix, self._seed = torch.tensor(prefix, dtype=torch.int64), seed
        self._body = seqlen - len(prefix)
        length = min(_DOCUMENT_TOKENS, self._body)
        filling = {repeats: -(-count * self._body // length) for repeats, count in windows.items()}
        documents = max(count - count // 3 if repeats else count for repeats, count in filling.items())
        # Whole batches, so that more windows begin with the same text.
        self.ids = torch.zeros(-(-documents // _DOCUMENTS), _DOCUMENTS, length, dtype=torch.int64)
        first = drawn(vocabulary, self.ids[..., 0].numel(), torch.Generator().manual_seed(seed))
        #: What each document begins with, int64 ``[batches, documents]``.
        self.beginnings = first.view(self.ids.shape[:2])

    def write(self, model: Any, batch: int) -> None:
        """Write one batch."""
        generator = torch.Generator().manual_seed((self._seed + ((batch + 1) << 32)) % (1 << 63))
        prompt = torch.cat((self._prefix.expand(self.ids.shape[1], -1), self.beginnings[batch, :, None]), 1)
        self.ids[batch] = write(model, prompt, self.ids.shape[2] - 1, generator)[:, len(self._prefix) :]

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

    def state(self) -> dict[str, Tensor]:
        """Tensors that hold everything."""
        return {"ids": self.ids}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` gave."""
        self.ids = state["ids"]

    def all_reduce(self) -> None:
        """Bring together what the ranks of the default process group wrote."""
        dist.all_reduce(self.ids)


@torch.no_grad()
def write(model: Any, prompt: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Continue texts by tokens drawn from the model's predictions, whatever it says of their end.

    Args:
        model: causal language model in eval mode.
        prompt: int64 ``[B, P]``.
        tokens: to write.
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
