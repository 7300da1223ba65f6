"""Decode steps of vLLM over a given text.

What a model chooses itself is no measure: it chooses what it finds likely with its own rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class Forced(AdapterLogitsProcessor):
    """Makes a request choose given tokens. Log likelihoods are still those of the model."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        tokens = (params.extra_args or {}).get("forced")
        if tokens is None:
            return None

        def only_the_next(chosen: list[int], logits: Tensor) -> Tensor:
            made = torch.full_like(logits, -torch.inf)
            made[tokens[len(chosen)]] = 0
            return made

        return only_the_next


def forced(llm: Any, texts: list[list[int]], first: int) -> list[tuple[float, int]]:
    """Of each text: the mean negative log likelihood of the tokens after ``first``, which are given one at a time, and
    the number of tokens found in the prefix cache. All texts are one request each, at once."""
    outputs = llm.generate(
        [{"prompt_token_ids": ids[:first]} for ids in texts],
        [
            SamplingParams(
                temperature=0,
                max_tokens=len(ids) - first,
                ignore_eos=True,
                logprobs=0,
                extra_args={"forced": ids[first:]},
            )
            for ids in texts
        ],
        use_tqdm=False,
    )
    found = []
    for output, ids in zip(outputs, texts, strict=True):
        assert list(output.outputs[0].token_ids) == ids[first:]
        each = [place[t].logprob for place, t in zip(output.outputs[0].logprobs, ids[first:], strict=True)]
        found.append((-sum(each) / len(each), output.num_cached_tokens or 0))
    return found
