"""What is computed over the global batch of an update: advantages that compare, and metrics. Every function is collective
over the ranks; each rank brings its own passes."""

import torch

from contracts.config import PPOConfig
from contracts.estimators import Estimator, Rollouts, chosen_correction
from contracts.interfaces import NonFiniteError
from contracts.records import TrainingBatch
from learner.advantages import explained_variance, whiten, whitening_moments
from learner.kl import kl_k1, kl_k3
from learner.passes import Pass
from learner.ranks import Ranks


@torch.no_grad()
def compare(
    passes: list[Pass], batch: TrainingBatch, ranks: Ranks, ppo: PPOConfig, estimator: Estimator
) -> dict[str, float]:
    """What an estimator makes of the rewards of all rollouts: advantages of every pass (coefficients where the loss is a
    likelihood), and whitening. Returns the estimator's own metrics.

    Raises:
        NonFiniteError: on all ranks, from an estimator that would compare what is not a number.
    """
    metrics: dict[str, float] = {}
    if estimator.of_rollouts is not None:
        found, metrics = estimator.of_rollouts(_rollouts(passes, batch, ranks, estimator), ppo)
        for p in passes:
            mine = found[torch.from_numpy(p.batch.rows).to(ranks.device)]
            p.advantages = torch.where(p.places.mask, mine[:, None], 0.0).float()
    if estimator.whiten:
        _whiten(passes, batch, ranks, ppo.whiten_over)
    return metrics


def _whiten(passes: list[Pass], batch: TrainingBatch, ranks: Ranks, over: str) -> None:
    """Over the tokens of the batch, or of each rollout group, wherever its members lie. In a group, a sequence that trains
    alone has nothing to be compared with and gets 0: whitened over itself, what sets its tokens apart would grow to full
    size, and its score would be gone."""
    # There are no more groups than sequences, and their numbers begin at 0.
    size = sum(batch.global_sequences) if over == "group" else 1
    table = torch.zeros(size, 4, dtype=torch.float64, device=ranks.device)
    owners = [torch.from_numpy(p.batch.groups * (over == "group")).to(ranks.device) for p in passes]
    for p, owner in zip(passes, owners, strict=True):
        valid = torch.where(p.places.trains, p.advantages.double(), 0.0)
        tokens = p.places.trains.sum(1).double()
        rows = [tokens, valid.sum(1), valid.square().sum(1), (tokens > 0).double()]
        table.index_add_(0, owner, torch.stack(rows, dim=1))
    ranks.sum(table)
    for p, owner in zip(passes, owners, strict=True):
        moments, sequences = table[owner].split([3, 1], dim=1)
        whitened = whiten(p.advantages, p.places.trains, moments[:, None])
        p.advantages = torch.where(sequences < 2, 0.0, whitened) if over == "group" else whitened


def _rollouts(passes: list[Pass], batch: TrainingBatch, ranks: Ranks, estimator: Estimator) -> Rollouts:
    """Every rank sees all rollouts, four numbers of each, and makes the same of them."""
    table = torch.zeros(sum(batch.global_sequences), 4, dtype=torch.float64, device=ranks.device)
    for p in passes:
        mask, groups = p.places.mask, torch.from_numpy(p.batch.groups).to(ranks.device)
        log_ratios = kl_k1(p.proximal_logprobs, p.ref_logprobs)
        sums = [torch.where(mask, x.double(), 0.0).sum(dim=1) for x in (p.rewards, log_ratios, mask)]
        table[torch.from_numpy(p.batch.rows).to(ranks.device)] = torch.stack([*sums, groups.double()], dim=1)
    outcomes, log_ratios, lengths, groups = ranks.sum(table).unbind(dim=1)
    if not (outcomes.isfinite() & log_ratios.isfinite()).all():
        raise NonFiniteError("a score or a log-probability is not finite")  # which a comparison would hide
    return Rollouts(
        outcomes=outcomes,
        groups=groups.long(),
        trains=lengths > 0,
        log_ratios=log_ratios if estimator.reads_log_ratios else torch.full_like(log_ratios, torch.nan),
        units=lengths if estimator.aggregation == "tokens" else torch.ones_like(lengths),
    )


def correction_metrics(passes: list[Pass], ranks: Ranks, ppo: PPOConfig) -> dict[str, float]:
    """What the off-policy correction does."""
    correction = chosen_correction(ppo).correction
    if correction == "none":
        return {}
    sums, largest = torch.zeros(5, dtype=torch.float64, device=ranks.device).split([4, 1])
    for p in passes:
        sums += p.corrected[:4]
        torch.maximum(largest, p.corrected[4:], out=largest)
    count, total, squares, changed_tokens = ranks.sum(sums).tolist()
    return {
        "off_policy/ess": total * total / (count * squares) if squares > 0 else 0.0,
        "off_policy/weight_mean": total / max(count, 1.0),
        "off_policy/weight_max": ranks.max(largest).item(),
        f"off_policy/{correction}_frac": changed_tokens / max(count, 1.0),
    }


def batch_metrics(passes: list[Pass], batch: TrainingBatch, ranks: Ranks, has_values: bool) -> dict[str, float]:
    """Metrics of the batch before the update."""
    sums = torch.zeros(9, dtype=torch.float64, device=ranks.device)
    largest = torch.zeros((), device=ranks.device)
    returns, residuals = torch.zeros_like(sums[:3]), torch.zeros_like(sums[:3])
    for p in passes:
        mask = p.places.mask
        staleness = torch.from_numpy(p.batch.staleness).to(ranks.device)
        # Only of the weights that the learner still has: of older ones the gap is learning, not mismatch. Behind tokens of
        # older weights, which weights in flight leave in the cache as they were, a token is of both.
        fresh = mask & ~(mask & (staleness > 0)).any(dim=1, keepdim=True)
        gap = torch.where(fresh, p.proximal_logprobs - p.behavior_logprobs, 0.0)
        sums += torch.stack(
            [
                mask.sum(),
                kl_k1(p.proximal_logprobs, p.ref_logprobs)[mask].sum(),
                kl_k3(p.proximal_logprobs, p.ref_logprobs)[mask].sum(),
                kl_k3(p.behavior_logprobs, p.proximal_logprobs)[fresh].sum(),
                gap.abs().sum(),
                fresh.sum(),
                staleness[mask].sum(),
                p.entropy[mask].sum(),
                p.rewards.sum(),
            ]
        ).double()
        if gap.numel():  # an empty completion may be alone in its microbatch
            largest = torch.maximum(largest, gap.abs().max())
        if has_values:
            returns += whitening_moments(p.returns, mask)
            residuals += whitening_moments(p.returns - p.old_values, mask)
    tokens, k1, k3, mismatch, gap_sum, fresh_tokens, stale, entropy, rewards = ranks.sum(sums).tolist()
    tokens, sequences = max(tokens, 1.0), max(sum(batch.global_sequences), 1)
    metrics = {
        "kl/ref_seq": k1 / sequences,
        "kl/ref_token": k1 / tokens,
        "kl/ref_k3": k3 / tokens,
        "staleness/token_mean": stale / tokens,
        "policy/entropy": entropy / tokens,
        "reward/total_mean": rewards / sequences,
    }
    largest_gap = ranks.max(largest).item()
    if fresh_tokens:
        metrics["kl/mismatch_k3"] = mismatch / fresh_tokens
        metrics["kl/mismatch_logp_mean"] = gap_sum / fresh_tokens
        metrics["kl/mismatch_logp_max"] = largest_gap
    if has_values:
        metrics["value/explained_var"] = explained_variance(ranks.sum(returns), ranks.sum(residuals))
    return metrics
