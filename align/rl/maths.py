"""PPO on plain tensors: KL estimators, per-token rewards, advantages and the clipped losses.

Shapes: B completions, T tokens of the longest one. A mask is 1 on the tokens of a completion (its stop token
included) and 0 on padding; masked positions never affect a result, whatever they hold. Losses return `(loss, metrics)`.

Papers: Schulman et al. 2015 (arXiv:1506.02438, GAE), Schulman et al. 2017 (arXiv:1707.06347, PPO), Ziegler et al. 2019
(arXiv:1909.08593, KL-penalised reward and adaptive coefficient), Schulman 2020 (joschu.net/blog/kl-approx.html, k1 to
k3).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from align.rl.ppo_settings import KlEstimator

Metrics = dict[str, Tensor]


class Moments(NamedTuple):
    """Running count, mean and sum of squared distances from the mean."""

    seen: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def deviation(self) -> float:
        """The population standard deviation."""
        return math.sqrt(self.squares / self.seen) if self.seen else 0.0

    def after(self, values: Tensor) -> Moments:
        """Return the moments with more values (B,) included (Chan, Golub and LeVeque 1979, eq. 2.1)."""
        new = values.double()
        count, mean = len(new), float(new.mean())
        squares = float(((new - mean) ** 2).sum())
        total, distance = self.seen + count, mean - self.mean
        return Moments(
            total,
            self.mean + distance * count / total,
            self.squares + squares + distance**2 * self.seen * count / total,
        )


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over the tokens the mask keeps; masked values may be anything, even NaN."""
    return values.masked_fill(mask == 0, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens the mask keeps, 0 when it keeps none."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Return the population variance over the tokens the mask keeps."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance over the kept tokens, and to zero mean unless `shift_mean` is off; (B, T) -> (B, T)."""
    mean = masked_mean(values, mask)
    whitened = (values - mean) * (masked_var(values, mask) + 1e-8).rsqrt()
    return (whitened if shift_mean else whitened + mean).masked_fill(mask == 0, 0.0)


def shape_scores(scores: Tensor, moments: Moments | None, clip: float | None, *, whitened: bool) -> Tensor:
    """Return scores (B,) normalised by the running moments, if any, then clipped, then whitened over the rollout."""
    if moments is not None:
        scores = (scores - moments.mean) / (moments.deviation + 1e-8)
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    return whiten(scores, torch.ones_like(scores)) if whitened else scores


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator = "k1") -> Tensor:
    """Estimate KL(policy || ref) at each sampled token; (B, T), (B, T) -> (B, T).

    With r = ref / policy: k1 = -log r (unbiased, may be negative), k2 = (log r)^2 / 2 (biased, never negative),
    k3 = (r - 1) - log r (unbiased, never negative).
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    return (-log_ratio).expm1() + log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return the reward of every token: -kl_coef * KL, plus the score at the last token (Ziegler 2019, eq. 2).

    scores (B,), kl (B, T), mask (B, T) -> (B, T).
    """
    last = mask.sum(dim=1).long() - 1
    terminal = torch.zeros_like(kl).scatter(1, last.clamp(min=0).unsqueeze(1), scores.to(kl).unsqueeze(1))
    return (terminal - kl_coef * kl).masked_fill(mask == 0, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of every token, each (B, T) (Schulman 2015, eq. 11, 12 and 16).

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}; V is 0 after the last token.
    """
    values = values.masked_fill(mask == 0, 0.0)
    rewards = rewards.masked_fill(mask == 0, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    delta = rewards + gamma * following - values
    running = torch.zeros_like(delta[:, 0])
    steps = []
    for t in reversed(range(delta.shape[1])):
        running = (delta[:, t] + gamma * lam * running) * mask[:, t]
        steps.append(running)
    advantages = torch.stack(steps[::-1], dim=1)
    return advantages, (advantages + values).masked_fill(mask == 0, 0.0)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float
) -> tuple[Tensor, Metrics]:
    """Return the clipped loss -min(r A, clip(r, 1 - eps, 1 + eps) A), r = policy / old policy (Schulman 2017, eq. 7).

    All (B, T). Metrics: the share of tokens where the clip binds, the mean ratio and its largest distance
    from 1, and the k3 KL from the old policy.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(mask == 0, 0.0)
    advantages = advantages.masked_fill(mask == 0, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)
    with torch.no_grad():
        metrics = {
            "policy_clip_fraction": masked_mean((clipped > unclipped).float(), mask),
            "ratio": masked_mean(ratio, mask),
            "ratio_error": (ratio - 1).abs().max(),
            "approx_kl": masked_mean((log_ratio.expm1() - log_ratio), mask),
        }
    return loss, metrics


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float
) -> tuple[Tensor, Metrics]:
    """Return max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / 2, averaged over the tokens.

    All (B, T). Schulman 2017, eq. 9 with the value clipping of that paper's code. Metrics: share of clipped tokens.
    """
    # Padding may hold NaN, and 0 times NaN would reach the gradient.
    values, old_values, returns = (tensor.masked_fill(mask == 0, 0.0) for tensor in (values, old_values, returns))
    clipped_values = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    squared, squared_clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(squared, squared_clipped), mask)
    with torch.no_grad():
        # Within the range the two errors differ by rounding only, in either direction.
        clipped = ((values - old_values).abs() > cliprange_value) & (squared_clipped > squared)
        metrics = {"value_clip_fraction": masked_mean(clipped.float(), mask)}
    return loss, metrics


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of each token under its logits; (B, T, V), (B, T) -> (B, T) in float32."""
    return logits.float().log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each next-token distribution in nats; (B, T, V) -> (B, T)."""
    logprobs = logits.float().log_softmax(dim=-1)
    # A token of probability 0 has log-probability -inf and adds nothing to the entropy.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(dim=-1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
    return 1 - masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-8)


def next_kl_coef(kl_coef: float, kl: float, target: float, share: float) -> float:
    """Return kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * share), to move KL to its target (Ziegler 2019, 2.2).

    `share` is the completions of this step over the horizon.
    """
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * share)
