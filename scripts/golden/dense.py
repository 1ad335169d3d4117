"""The training forward as the method states it: `[x_t | x_0]` as one sequence, the official 2L × 2L mask, two losses.

Plain torch in float64 (reference/method.md 1.1, 2.1–2.4, section 4 for LoRA); slow and literal, to be compared with.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

IGNORED = -100  # label of a position that is no target


@dataclass(frozen=True)
class Layout:
    """What each of the S rows of a `[t1|c1|t2|c2|…]` sequence is; every field is [S]."""

    noisy: torch.Tensor  # bool: the row is in the noisy half of its document
    document: torch.Tensor  # int: number of its document
    positions: torch.Tensor  # int: from 0 in each half of each document


@dataclass(frozen=True)
class Lora:
    """An adapter of all seven projections and where it acts."""

    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]  # module name -> A [R, in], B [out, R]
    scale: float  # alpha / R
    gate: torch.Tensor  # bool [B, S]: rows on which the adapter acts


@dataclass(frozen=True)
class Losses:
    """The two terms of 2.4."""

    noisy_per_sample: torch.Tensor  # [B]: sum over masked answer rows with a target / number of answer tokens
    clean_per_sample: torch.Tensor  # [B]: mean over the sample's targets
    noisy: torch.Tensor  # []: mean of noisy_per_sample
    clean: torch.Tensor  # []: one mean over all targets of the batch


def layout_of(lengths: list[int]) -> Layout:
    """The rows of documents of these lengths, interleaved by document."""
    noisy, document, positions = [], [], []
    for number, length in enumerate(lengths):
        noisy += [True] * length + [False] * length
        document += [number] * (2 * length)
        positions += [*range(length), *range(length)]
    return Layout(torch.tensor(noisy), torch.tensor(document), torch.tensor(positions))


def official_mask(layout: Layout, block: int) -> torch.Tensor:
    """Bool [S, S], True where query row i may attend to key row j (2.2)."""
    noisy_i, noisy_j = layout.noisy[:, None], layout.noisy[None, :]
    position_i, position_j = layout.positions[:, None], layout.positions[None, :]
    block_i, block_j = position_i // block, position_j // block
    block_diagonal = noisy_i & noisy_j & (block_i == block_j) & (position_i >= position_j)  # M_BD
    offset_block_causal = noisy_i & ~noisy_j & (block_j < block_i)  # M_OBC
    clean_causal = ~noisy_i & ~noisy_j & (position_j <= position_i)  # M_BC
    same_document = layout.document[:, None] == layout.document[None, :]
    return same_document & (block_diagonal | offset_block_causal | clean_causal)


def noise(tokens: torch.Tensor, labels: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """x_t [B, L]: every answer token replaced by the mask token, prompt tokens kept (2.1)."""
    return torch.where(labels != IGNORED, mask_token_id, tokens)


def embed(
    weights: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    mask_embedding: torch.Tensor | None = None,
    is_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embeddings [B, S, D] of tokens [B, S]; `mask_embedding` [D], if given, stands at the rows `is_mask` [B, S]."""
    rows = weights["model.embed_tokens.weight"][tokens]
    return rows if mask_embedding is None else torch.where(is_mask[..., None], mask_embedding, rows)


def forward(
    weights: dict[str, torch.Tensor],
    config: Any,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    visible: torch.Tensor,
    lora: Lora | None = None,
) -> torch.Tensor:
    """Logits [B, S, V] of a Qwen3 decoder for embeddings [B, S, D], positions [S] and an attention mask [S, S]."""
    head_dim, eps = config.head_dim, config.rms_norm_eps
    groups = config.num_attention_heads // config.num_key_value_heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weights[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ weights[f"{name}.weight"].T
        if lora is None:
            return y
        a, b = lora.matrices[name]
        return y + lora.scale * (lora.gate[..., None] * (x @ a.T)) @ b.T

    def heads(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, name).unflatten(-1, (-1, head_dim)).transpose(1, 2)  # [B, H, S, d]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = positions[:, None] * config.rope_parameters["rope_theta"] ** -exponents
    cos, sin = angles.cos(), angles.sin()

    x = embeddings
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        h = norm(x, f"{layer}.input_layernorm")
        q = rotate(norm(heads(h, f"{attention}.q_proj"), f"{attention}.q_norm"))
        k = rotate(norm(heads(h, f"{attention}.k_proj"), f"{attention}.k_norm")).repeat_interleave(groups, dim=1)
        v = heads(h, f"{attention}.v_proj").repeat_interleave(groups, dim=1)
        scores = (q @ k.transpose(-1, -2) * head_dim**-0.5).masked_fill(~visible, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        x = x + linear(mixed, f"{attention}.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gated = F.silu(linear(h, f"{layer}.mlp.gate_proj")) * linear(h, f"{layer}.mlp.up_proj")
        x = x + linear(gated, f"{layer}.mlp.down_proj")
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return norm(x, "model.norm") @ weights[f"{head}.weight"].T


def losses(noisy_logits: torch.Tensor, clean_logits: torch.Tensor, labels: torch.Tensor) -> Losses:
    """Both terms (2.4) of logits [B, L, V] and labels [B, L]; row i predicts the label at i + 1 (2.3)."""
    targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)

    def rows(logits: torch.Tensor) -> torch.Tensor:  # [B, L], zero where there is no target
        return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")

    answer, count = labels != IGNORED, (targets != IGNORED).sum(1)
    noisy = (rows(noisy_logits) * answer).sum(1) / answer.sum(1)
    clean = rows(clean_logits).sum(1)
    return Losses(noisy, clean / count, noisy.mean(), clean.sum() / count.sum())


def combine(noisy: torch.Tensor, clean: torch.Tensor, alpha: float | None) -> torch.Tensor:
    """CE_noisy + alpha · CE_clean; alpha None balances the two (2.4)."""
    scale = noisy.detach() / (clean.detach() + 1e-8) if alpha is None else alpha
    return noisy + scale * clean
