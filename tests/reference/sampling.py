"""Textbook autoregressive sampling in PyTorch: filter the next-token distribution, draw from it, append.

The reference of all sampled texts. A cache of transformers carries the keys and values; prompts are padded on the left
as transformers' own ``generate`` does.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.model import Reference


@dataclass(frozen=True)
class Settings:
    """How the next token of one request is drawn."""

    temperature: float = 1.0
    # 0: off.
    top_k: int = 0
    # 1: off.
    top_p: float = 1.0


class Filter:
    """Logits to probabilities, row by row with the settings of each request."""

    def __init__(self, settings: Sequence[Settings], mask_token: int, device: torch.device):
        self.temperature = torch.tensor([each.temperature for each in settings], device=device)
        self.top_k = torch.tensor([each.top_k for each in settings], device=device)
        self.top_p = torch.tensor([each.top_p for each in settings], device=device)
        self.mask_token = mask_token

    def probabilities(self, logits: Tensor) -> Tensor:
        """[B, R, V] of float32 logits [B, R, V]: mask token out, temperature, top-k, then top-p on what is left.

        Temperature 0 puts everything on the largest logit.
        """
        logits = logits.clone()
        logits[..., self.mask_token] = -torch.inf
        p = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        drawn = self.temperature > 0
        if not drawn.any():
            return p
        tempered = torch.softmax(logits[drawn] / self.temperature[drawn, None, None], dim=-1)
        filtered = drawn & ((self.top_k > 0) | (self.top_p < 1))
        if filtered.any():
            of_drawn = filtered[drawn]
            tempered[of_drawn] = _nucleus(tempered[of_drawn], self.top_k[filtered], self.top_p[filtered])
        p[drawn] = tempered
        return p


def _nucleus(p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    ordered, index = p.sort(dim=-1, descending=True)
    rank = torch.arange(p.shape[-1], device=p.device)
    beyond = (top_k[:, None, None] > 0) & (rank >= top_k[:, None, None])
    ordered = ordered.masked_fill(beyond, 0)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= top_p[:, None, None], 0)
    return torch.zeros_like(p).scatter_(-1, index, ordered / ordered.sum(-1, keepdim=True))


def draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """One token [B, R] from each row of probabilities [B, R, V]."""
    flat = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
    return flat.reshape(p.shape[:-1])


@dataclass(frozen=True)
class Sampled:
    """What was drawn, and by how much the best logit beat the second at every token (−1: nothing was drawn)."""

    tokens: Tensor  # [P, copies, length]
    gaps: Tensor


@torch.no_grad()
def sample(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Settings],
    length: int,
    copies: int,
    generator: torch.Generator,
) -> Iterator[Sampled]:
    """Without end: ``copies`` continuations of ``length`` tokens of every prompt; nothing ends a text early."""
    model, device = reference.model, reference.device
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    present = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (present.cumsum(-1) - 1).clamp(min=0)
    out = model(ids, attention_mask=present, position_ids=positions, use_cache=True, logits_to_keep=1)
    prefix, first_logits = out.past_key_values, out.logits.float().repeat_interleave(copies, dim=0)
    each = Filter([one for one in settings for _ in range(copies)], reference.mask_token, device)
    while True:
        cache, logits = copy.deepcopy(prefix), first_logits
        cache.batch_repeat_interleave(copies)
        mask, position = (x.repeat_interleave(copies, dim=0) for x in (present, positions[:, -1:]))
        tokens, gaps = [], []
        for step in range(length):
            best = logits[:, 0].topk(2).values
            tokens.append(draw(each.probabilities(logits), generator))
            gaps.append(best[:, 0] - best[:, 1])
            if step + 1 == length:
                break
            mask, position = torch.cat([mask, torch.ones_like(position)], dim=1), position + 1
            out = model(tokens[-1], attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
            logits = out.logits.float()
        shape = (len(prompts), copies, length)
        yield Sampled(torch.cat(tokens, dim=1).reshape(shape), torch.stack(gaps, dim=1).reshape(shape))
