"""Introspective strided decoding in PyTorch, written straight from the pseudo-code of method.md 3.8.

One full forward pass a round over prompt, text and window, no cache: slow, and easy to see that it is right. The layout
is the paper's (one mask group, a cold round after a rejection), the rule accepts a sampled draft with min(1, p/q) and
corrects from the positive part of p − q.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.model import Reference
from tests.reference.sampling import Filter, Settings, draw


@dataclass(frozen=True)
class Decoded:
    """What ``decode`` has written."""

    tokens: Tensor  # [B, length]
    # Drafts accepted in each round, −1 in a cold one, −2 after the request's last.
    accepted: Tensor  # [B, rounds]


@torch.no_grad()
def decode(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Settings],
    stride: int,
    length: int,
    generator: torch.Generator,
) -> Decoded:
    """``length`` tokens after every prompt; nothing ends a text early.

    The last prompt token is the first pending token, so the first round is cold.
    """
    device, drafts, batch = reference.device, stride - 1, len(prompts)
    each = Filter(settings, reference.mask_token, device)
    start = torch.tensor([len(prompt) for prompt in prompts], device=device)
    room = int(start.max()) + length + 3 * stride
    # Prompt and text; the last token written is the pending one, tok0 of the pseudo-code.
    tokens = torch.zeros((batch, room), dtype=torch.long, device=device)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    written = start.clone()
    specs = torch.zeros((batch, drafts), dtype=torch.long, device=device)
    q = torch.zeros((batch, drafts, reference.model.config.vocab_size), device=device)
    verifying = torch.zeros(batch, dtype=torch.bool, device=device)
    k = torch.arange(drafts, device=device)
    history = []
    while bool((written < start + length).any()):
        active = written < start + length
        # Row of the clean token: the last draft's where drafts are verified, else the pending token's.
        r0 = written - 1 + torch.where(verifying, drafts, 0)
        x = _put(tokens, written[:, None] + k, torch.where(verifying[:, None], specs, reference.mask_token))
        mask_rows = r0[:, None] + 1 + k
        x = _put(x, mask_rows, reference.mask_token)
        gate = torch.zeros(x.shape, device=device).scatter_(1, mask_rows, 1.0)
        rows = torch.cat([(written - 1)[:, None] + k, r0[:, None], mask_rows], dim=1)
        probabilities = each.probabilities(reference.logits(x, rows, gate))
        p, clean, new_q = probabilities[:, :drafts], probabilities[:, drafts], probabilities[:, drafts + 1 :]

        ratio = _of(p, specs) / _of(q, specs)
        accept = (torch.rand(specs.shape, generator=generator, device=device) < ratio) & verifying[:, None]
        accepted = accept.long().cumprod(dim=1).sum(dim=1)
        rejected = verifying & (accepted < drafts)
        at = accepted.clamp(max=drafts - 1)[:, None, None].expand(-1, 1, q.shape[2])
        residual = (p.gather(1, at) - q.gather(1, at)).clamp(min=0)[:, 0]
        new = draw(torch.where(rejected[:, None], residual, clean)[:, None], generator)

        # Out: the accepted drafts, then the new token. Drafts beyond are overwritten by what follows.
        out = torch.where(k < accepted[:, None], specs, new)
        after = _put(_put(tokens, written[:, None] + k, out), (written + accepted)[:, None], new)
        tokens = torch.where(active[:, None], after, tokens)
        history.append(torch.where(active, torch.where(verifying, accepted, -1), -2))
        written = torch.where(active, written + accepted + 1, written)
        verifying, q = ~rejected, new_q
        specs = draw(q, generator)
    text = start[:, None] + torch.arange(length, device=device)
    return Decoded(torch.take_along_dim(tokens, text, dim=1), torch.stack(history, dim=1))


def draft_logits(reference: Reference, tokens: Tensor, drafts: int) -> Tensor:
    """[L, drafts, V]: what masks say that follow the first 1, 2, … L tokens of a text [L]."""
    length = len(tokens)
    count = torch.arange(drafts, device=tokens.device)
    mask_rows = torch.arange(length, device=tokens.device)[:, None] + 1 + count
    texts = _put(torch.cat([tokens, tokens[:drafts]]).expand(length, -1), mask_rows, reference.mask_token)
    gate = torch.zeros(texts.shape, device=tokens.device).scatter_(1, mask_rows, 1.0)
    return reference.logits(texts, mask_rows, gate)


def _put(tokens: Tensor, where: Tensor, values: Tensor | int) -> Tensor:
    """A copy with some tokens replaced."""
    return tokens.scatter(1, where, values)


def _of(p: Tensor, tokens: Tensor) -> Tensor:
    """The probability of each token under its row."""
    return p.gather(2, tokens[:, :, None])[:, :, 0]
