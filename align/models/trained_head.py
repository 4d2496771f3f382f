"""The language head on trained positions only: log-probabilities without the logits of a whole batch."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    only backward work is one multiplication.
    """
    import torch

    mean = head.weight.mean(0, dtype=torch.float32)
    offset = head.bias.float().mean() if head.bias is not None else 0.0
    with torch.no_grad():
        mean_logits = hidden.float() @ mean + offset
    rows = tile_rows(head.weight.shape[0])
    tiles = [
        _score_frozen(head, some, wanted) if frozen else _score_trainable(head, some, wanted)
        for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    log_probs, entropy, is_top1 = (torch.cat(parts) for parts in zip(*tiles, strict=True))
    return TokenScores(log_probs, entropy, mean_logits, is_top1)


def _score_frozen(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _frozen_tile().apply(hidden, head.weight, head.bias, targets)


def _score_trainable(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score where the head learns too: its logits are computed again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    return checkpoint(_score_tile, head, hidden, targets, use_reentrant=False)


def _score_tile(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = head(hidden).float()
    log_probs = logits.log_softmax(-1)
    top = (logits.argmax(-1) == targets).detach()
    entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1)
    return log_probs.gather(1, targets[:, None])[:, 0], entropy, top


@cache
def _frozen_tile() -> Any:
    """Return the autograd function of a frozen head, made when torch is there."""
    import torch
    from torch import nn

    class FrozenTile(torch.autograd.Function):
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

    return FrozenTile
