"""Heads over hidden states: log-probabilities of trained tokens without the logits of a batch, and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from align.models.adapters import LoadedBase

_TILE = 2**24
"""logits held at once under a head that learns"""
FROZEN_TILE = (512, 2048)
"""tokens and words that are scored at once under a frozen head: few enough to stay in a processor's cache"""


class TokenScores(NamedTuple):
    """Scores of n trained tokens, each (n,): only `log_probs` carries a gradient."""

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor


def tile_rows(vocabulary: int) -> int:
    """Return the number of tokens that a head that learns scores against the whole vocabulary at once."""
    return max(32, min(512, _TILE // vocabulary))


def score_tokens(head: nn.Linear, hidden: Tensor, targets: Tensor, *, frozen: bool) -> TokenScores:
    """Score the target of each hidden state (n, H); logits exist for a tile of tokens at a time.

    With a `frozen` head the gradient of each log-probability is formed in the forward pass, where the logits are: its
    only backward work is one multiplication. The logits of a head that learns are computed again in the backward pass.
    """
    mean = head.weight.mean(0, dtype=torch.float32)
    offset = head.bias.float().mean() if head.bias is not None else 0.0
    with torch.no_grad():
        mean_logits = hidden.float() @ mean + offset
    rows = FROZEN_TILE[0] if frozen else tile_rows(head.weight.shape[0])
    tiles = [
        _FrozenTile.apply(states, head.weight, head.bias, wanted)
        if frozen
        else checkpoint(_score_tile, head, states, wanted, use_reentrant=False)
        for states, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    log_probs, entropy, is_top1 = (torch.cat(parts) for parts in zip(*tiles, strict=True))
    return TokenScores(log_probs, entropy, mean_logits, is_top1)


def _score_tile(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = head(hidden).float()
    log_probs = logits.log_softmax(-1)
    top = (logits.argmax(-1) == targets).detach()
    entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1)
    return log_probs.gather(1, targets[:, None])[:, 0], entropy, top


class _FrozenTile(torch.autograd.Function):
    """log p(target) = z[target] - log sum exp z, so its gradient by the state is W[target] - softmax(z) W.

    The sums go over some words at a time, relative to the largest logit so far (Milakov and Gimelshein 2018).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Any:
        highest, best, wanted = hidden.new_full(targets.shape, -torch.inf).float(), targets, targets.float()
        total, product = torch.zeros_like(highest), torch.zeros_like(highest)  # of exp z, and of exp z times z
        expected = torch.zeros_like(hidden, dtype=torch.float32)
        for begin in range(0, len(weight), FROZEN_TILE[1]):
            words = slice(begin, begin + FROZEN_TILE[1])
            part = weight[words]
            logits = nn.functional.linear(hidden, part, None if bias is None else bias[words]).float()
            top, place = logits.max(-1)
            best, raised = torch.where(top > highest, place + begin, best), torch.maximum(highest, top)
            own = targets - begin
            found = logits.gather(1, own.clamp(0, len(part) - 1)[:, None])[:, 0]
            wanted = torch.where((own >= 0) & (own < len(part)), found, wanted)
            shrink = (highest - raised).exp_()
            exponents = (logits - raised[:, None]).exp_()
            total = total.mul_(shrink).add_(exponents.sum(-1))
            product = product.mul_(shrink).add_(torch.einsum("nv,nv->n", exponents, logits))
            if ctx.needs_input_grad[0]:
                expected.mul_(shrink[:, None]).add_(exponents.to(weight.dtype) @ part)
            highest = raised
        log_total = highest + total.log()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((weight[targets].float() - expected / total[:, None]).to(hidden.dtype))
        entropy = log_total - product / total
        ctx.mark_non_differentiable(entropy, top := best == targets)
        return wanted - log_total, entropy, top

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_unused: Any) -> Any:
        (slope,) = ctx.saved_tensors
        return (gradient[:, None] * slope).to(slope.dtype), None, None, None


class ScoreLayer(nn.Linear):
    """A linear layer of one score, (..., H) to (..., 1), that computes in fp32 also under autocast.

    In bfloat16 scores have three digits: close answers would tie, and steps of 1e-4 would vanish in its weights.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., 1) of hidden states (..., H)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float())


def make_score_layer(weight: Tensor, device: Any = None) -> ScoreLayer:
    """Return a new score layer in single precision with this weight (1, H)."""
    layer = ScoreLayer(weight.shape[1], 1, bias=False, device=device, dtype=torch.float32)
    layer.weight.data.copy_(weight)
    return layer


def score_sequences(loaded: LoadedBase, sequences: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """Return a reward model's score of each sequence, (N,) in fp64, at its last token; `size` of like length a pass."""
    model = loaded.model
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True)
    scores = np.empty(len(sequences))
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            rows = [torch.tensor(sequences[index], dtype=torch.long) for index in batch]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=loaded.tokenizer.pad_token_id)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
            scores[batch] = logits.squeeze(-1).double().cpu().numpy()
    model.train(training)
    return scores
