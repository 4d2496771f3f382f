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
"""logits held at once"""


class TokenScores(NamedTuple):
    """Scores of n trained tokens, each (n,): only `log_probs` carries a gradient."""

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor


def tile_rows(vocabulary: int) -> int:
    """Return the number of tokens that are scored against the whole vocabulary at once."""
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
    rows = tile_rows(head.weight.shape[0])
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
    """log p(target) = z[target] - log sum exp z, so its gradient by the state is W[target] - softmax(z) W."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Any:
        logits = nn.functional.linear(hidden, weight, bias).float()
        highest, best = logits.max(-1)
        exponents = (logits - highest[:, None]).exp_()
        total = exponents.sum(-1)
        wanted = logits.gather(1, targets[:, None])[:, 0]
        log_total = highest + total.log()
        entropy = log_total - torch.einsum("nv,nv->n", exponents, logits) / total
        if ctx.needs_input_grad[0]:
            expected = (exponents.to(weight.dtype) @ weight).float() / total[:, None]
            ctx.save_for_backward((weight[targets].float() - expected).to(hidden.dtype))
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
