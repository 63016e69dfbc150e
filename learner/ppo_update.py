"""One PPO update of one rank, over networks that something else holds and steps: `learner/ppo.py` has DeepSpeed do it.

    ref, policy and value forward passes     (layers that they share run once: `learner/shared_trunk.py`); of the first
                                              minibatch backward, too, through what has its loss by then
      -> token rewards -> advantages (GAE, or against the rollouts of the same prompt) or coefficients of the
         log-likelihood (RAFT, RWR, online DPO), over the global batch
      -> for each epoch, minibatch, microbatch: policy and value loss, backward; one step of both a minibatch

The first minibatch's step is taken at the weights of the first pass, which is the only one that it needs: the proximal
log-probabilities are the policy's own, detached, and a loss that no other microbatch enters is walked back at once. That is
so for the value model, whose returns are of a row alone, and for a policy where scores decide (GRPO without a KL in the
reward). A policy whose advantages are whitened keeps its graph until they are (`learner.held_tokens`); what does not fit is
computed again.

Log-probabilities of the rollout engine enter nothing but the off-policy correction; without it they only measure
the mismatch between sampler and learner, which is rounding. Without a value model (`contracts.estimators`) there is nothing
of it: no network, no pass, no metric.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from common.microbatches import cut_microbatches
from common.models.forward import knows_shared_prompts
from common.models.packed_attention import Packed
from contracts.config import TandemConfig
from contracts.estimators import chosen_estimator
from contracts.objectives import chosen_clip, find_objective
from contracts.records import Example, TrainingBatch
from learner.examples import example_nll, loss_tokens
from learner.global_batch import batch_metrics, compare, correction_metrics
from learner.losses import kl_loss, likelihood_loss, value_loss
from learner.passes import Pass, Places, PolicySums, Timer, over_steps, set_rewards, set_weights
from learner.ranks import Ranks
from learner.shared_trunk import SharedTrunk


class Engine(Protocol):
    """A model with its optimizer; `learner.engine.TrainEngine` is one."""

    model: Any

    def __call__(self, *args: Any) -> Any: ...

    def backward(self, loss: Tensor, is_last: bool) -> None: ...

    def step(self) -> float: ...

    def skip(self, steps: int) -> None: ...


@dataclass(frozen=True)
class PolicyLoss:
    """What an update is told of it."""

    kl_coef: float
    coef: float  # of the whole, beside PPO-ptx
    trains: bool


class PPOUpdate:
    """Policy, value (where the estimator has one) and reference of one rank.

    Args:
        reference: called as the policy is.
        trunk: what they have in common.
        end_ids: what ends a completion, and is banned where it must not end yet.
        ptx: examples whose loss joins the policy's (`ppo.ptx_coef`).
    """

    def __init__(
        self,
        ranks: Ranks,
        config: TandemConfig,
        *,
        policy: Engine,
        value: Engine | None,
        reference: Any,
        trunk: SharedTrunk,
        end_ids: tuple[int, ...],
        ptx: list[Example],
    ):
        self.ranks, self.config, self.estimator = ranks, config, chosen_estimator(config.ppo)
        self.policy, self.value, self.reference, self.trunk = policy, value, reference, trunk
        self.end_ids, self.ptx = end_ids, ptx
        networks = [policy.model, *([value.model] if value else [])]  # the reference is of the policy's class
        self.shares_prompts = all(knows_shared_prompts(network.lm, network.layout) for network in networks)
        self._ptx_rng = np.random.default_rng(config.seed)  # the same draws on every rank

    def update(
        self, batch: TrainingBatch, kl_coef: float, train_policy: bool, policy_coef: float = 1.0
    ) -> dict[str, float]:
        """All optimizer steps of one update; collective over the ranks.

        Args:
            policy_coef: of the policy's loss, its KL term included, beside `ppo.ptx_coef` of the text loss.
            train_policy: false in the first updates, which only fit the value model.

        Raises:
            NonFiniteError: before any optimizer step with a loss, or what an estimator compares, that is NaN or infinite.
            ValueError: without `train_policy` where there is no value model to fit.
        """
        if not (train_policy or self.value):
            raise ValueError(f"the estimator {self.config.ppo.estimator} has no value model to fit")
        timer, ppo, estimator = Timer(self.ranks.device), self.config.ppo, self.estimator
        loss = PolicyLoss(kl_coef, policy_coef, train_policy)
        passes = self._passes(batch)
        everything = [p for minibatch in passes for p in minibatch]
        if estimator.is_of_scores:
            for p in everything:
                set_rewards(p, ppo, estimator, kl_coef)
            compared = compare(everything, batch, self.ranks, ppo, estimator)
        for p in everything:
            self._first_pass(p, loss, timer)
        if not estimator.is_of_scores:
            compared = compare(everything, batch, self.ranks, ppo, estimator)
        off_policy = correction_metrics(everything, self.ranks, ppo)

        steps: list[dict[str, float]] = []
        for epoch in range(ppo.epochs):
            steps += [self._step(minibatch, loss, timer) for minibatch in passes]
            # Of the epoch's last minibatch, before its step. An epoch is never left half-way: every rollout trains.
            approx_kl = steps[-1].get("policy/approx_kl", 0.0)
            if ppo.target_approx_kl is not None and approx_kl > ppo.target_approx_kl:
                self._skip((ppo.epochs - epoch - 1) * len(passes), train_policy)
                break
        metrics = over_steps(steps) | {"policy/optimizer_steps": float(len(steps))}
        described = batch_metrics(everything, batch, self.ranks, self.value is not None)
        return metrics | compared | off_policy | described | timer.seconds

    def _skip(self, steps: int, train_policy: bool) -> None:
        """Steps that an early end leaves out: the schedules go on as if they had been taken, and end with the run."""
        if train_policy:
            self.policy.skip(steps)
        if self.value:
            self.value.skip(steps)

    def _passes(self, batch: TrainingBatch) -> list[list[Pass]]:
        found: list[list[Pass]] = []
        held_left = self.config.learner.held_tokens
        for microbatches, tokens, sequences in zip(
            batch.minibatches, batch.global_loss_tokens, batch.global_trained, strict=True
        ):
            is_first = not found
            found.append([])
            for mb in microbatches:
                is_held = is_first and mb.num_tokens <= held_left
                held_left -= mb.num_tokens if is_held else 0
                found[-1].append(
                    Pass(
                        batch=mb,
                        places=Places(mb, self.ranks.device, self.shares_prompts),
                        tokens=max(tokens, 1),  # of a minibatch in which nothing trains the gradient is 0
                        sequences=max(sequences, 1),
                        is_first=is_first,
                        is_last=mb is microbatches[-1],
                        is_held=is_held,
                    )
                )
        return found

    def _first_pass(self, p: Pass, loss: PolicyLoss, timer: Timer) -> None:
        """Every network, as it is before the first step; and backward through those whose losses are known by then."""
        ppo, estimator = self.config.ppo, self.estimator
        trains_policy = loss.trains and p.is_first and estimator.trains_at_once
        waits = loss.trains and p.is_held and not trains_policy
        with timer("perf/reference_s"), torch.no_grad():
            p.ref_logprobs, _ = self._logprobs(self.reference, p.places)
        with timer("perf/policy_forward_s"), torch.set_grad_enabled(trains_policy or waits):
            policy_logprobs, entropy = self._logprobs(self.policy, p.places, ppo.entropy_coef > 0)
        p.proximal_logprobs, p.entropy = policy_logprobs.detach(), entropy.detach()
        p.live = (policy_logprobs, entropy) if waits else None
        values = None
        if self.value:
            with timer("perf/value_forward_s"), torch.set_grad_enabled(p.is_first):
                values = self._values(self.value, p.places)
            p.old_values = values.detach()
        if not estimator.is_of_scores:
            set_rewards(p, ppo, estimator, loss.kl_coef)
        set_weights(p, ppo, estimator)
        if trains_policy:
            p.policy_sums = self._policy_backward(p, policy_logprobs, entropy, loss, timer)
        if values is not None and p.is_first:
            p.value_sums = self._value_backward(p, values, timer)
        if not p.is_held:
            p.places.below.clear()

    def _logprobs(self, model: Any, places: Places, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        sampling = self.config.ppo.sampling
        early = places.early(sampling.min_completion_tokens, self.config.environment.min_turn_tokens)
        banned = None if early is None else self.end_ids
        with self.trunk.using(places.below):
            logprobs, entropy = model(
                places.packed, places.select, places.targets, sampling.temperature, banned, early, entropy_gradient
            )
        return places.spread(logprobs), places.spread(entropy)

    def _values(self, value: Engine, places: Places) -> Tensor:
        with self.trunk.using(places.below):
            return places.spread(value(places.packed, places.select))

    def _step(self, minibatch: list[Pass], loss: PolicyLoss, timer: Timer) -> dict[str, float]:
        """One optimizer step of both models. Returns means over the tokens of the global minibatch."""
        sums = torch.zeros(8, dtype=torch.float64, device=self.ranks.device)
        ratio_max = torch.zeros((), device=self.ranks.device)
        for p in minibatch:
            if loss.trains:
                found, p.policy_sums = p.policy_sums, None
                if found is None:
                    live, p.live = p.live, None
                    if live is None:
                        with timer("perf/policy_forward_s"):
                            live = self._logprobs(self.policy, p.places, self.config.ppo.entropy_coef > 0)
                    found = self._policy_backward(p, *live, loss, timer)
                sums[:6] += found.sums
                ratio_max = torch.maximum(ratio_max, found.ratio_max)
            if self.value:
                value_sums, p.value_sums = p.value_sums, None
                if value_sums is None:
                    with timer("perf/value_forward_s"):
                        values = self._values(self.value, p.places)
                    value_sums = self._value_backward(p, values, timer)
                sums[6:] += value_sums
            if not p.is_held:
                p.places.below.clear()
        metrics = {}
        if self._has_ptx(loss):
            with timer("perf/ptx_s"):
                metrics["policy/ptx_loss"] = self._ptx_backward()
        with timer("perf/optimizer_s"):
            if loss.trains:
                metrics["policy/grad_norm"] = self.policy.step()
            if self.value:
                metrics["value/grad_norm"] = self.value.step()
        means = (self.ranks.sum(sums) / minibatch[0].tokens).tolist()
        if loss.trains:
            metrics |= self._policy_means(means) | {"policy/ratio_max": self.ranks.max(ratio_max).item()}
        if self.value:
            metrics |= {"value/loss": means[6], "value/clipfrac": means[7]}
        return metrics

    def _policy_backward(
        self, p: Pass, policy_logprobs: Tensor, entropy: Tensor, loss: PolicyLoss, timer: Timer
    ) -> PolicySums:
        spread = self.config.ppo.entropy_coef
        with timer("perf/policy_backward_s"):
            surrogate, kl, stats = self._policy_losses(policy_logprobs, p)
            bonus = torch.where(p.places.trains, entropy, 0.0).sum() if spread else torch.zeros_like(surrogate)
            whole = loss.coef * (surrogate + loss.kl_coef * kl - spread * bonus) / p.tokens
            self.policy.backward(whole, p.is_last and not self._has_ptx(loss))
        sums = [stats["clipped"], stats["approx_kl"], stats["ratio"], surrogate.detach(), kl.detach(), bonus.detach()]
        return PolicySums(torch.stack(sums).double(), stats["ratio_max"])

    def _value_backward(self, p: Pass, values: Tensor, timer: Timer) -> Tensor:
        with timer("perf/value_backward_s"):
            loss, stats = value_loss(values, p.old_values, p.returns, p.places.trains, self.config.ppo.value_clip)
            assert self.value
            self.value.backward(loss / p.tokens, p.is_last)
        return torch.stack([loss.detach(), stats["clipped"]]).double()

    def _has_ptx(self, loss: PolicyLoss) -> bool:
        return loss.trains and self.config.ppo.ptx_coef > 0

    def _policy_losses(self, policy_logprobs: Tensor, p: Pass) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss, KL term (0 where it is none) and statistics, summed over a microbatch."""
        ppo, mask = self.config.ppo, p.places.trains
        if self.estimator.loss == "likelihood":
            loss, stats = likelihood_loss(policy_logprobs, p.proximal_logprobs, p.advantages, mask, p.weights)
        else:
            objective = find_objective(ppo.objective)
            loss, stats = objective.loss(
                policy_logprobs, p.proximal_logprobs, p.advantages, mask, chosen_clip(ppo), p.weights
            )
        if not self.estimator.has_kl_loss:
            return loss, torch.zeros_like(loss), stats
        return loss, kl_loss(policy_logprobs, p.ref_logprobs, mask, self.estimator.kl, p.weights), stats

    def _policy_means(self, means: list[float]) -> dict[str, float]:
        clipped, approx_kl, ratio, loss, kl, bonus = means[:6]
        metrics = {"policy/approx_kl": approx_kl, "policy/ratio_mean": ratio, "policy/loss": loss}
        metrics |= {"policy/kl_loss": kl} if self.estimator.has_kl_loss else {}
        metrics |= {"policy/entropy_bonus": bonus} if self.config.ppo.entropy_coef else {}
        return metrics | ({"policy/clipfrac": clipped} if self.estimator.loss == "clipped" else {})

    def _ptx_backward(self) -> float:
        """PPO-ptx (InstructGPT): the SFT loss of a few examples joins the same optimizer step."""
        rows = self._ptx_rng.choice(len(self.ptx), self.config.ppo.ptx_batch_size, replace=False)
        examples = [self.ptx[i] for i in rows]
        tokens = loss_tokens(examples)
        lengths = [len(e.token_ids) for e in examples]
        cut = cut_microbatches(lengths, self.config.learner.microbatch_tokens, self.ranks.world_size)[self.ranks.rank]
        total = torch.zeros((), device=self.ranks.device)
        for i, part in enumerate(cut):
            loss = example_nll(self.policy, [examples[r] for r in part], self.ranks.device) / tokens
            self.policy.backward(self.config.ppo.ptx_coef * loss, is_last=i == len(cut) - 1)
            total += loss.detach()
        return self.ranks.sum(total).item()


def shared_trunk(
    config: TandemConfig, ranks: Ranks, policy: Engine, value: Engine | None, reference: Any
) -> SharedTrunk:
    """What the networks of an update have in common, tried out."""
    if config.learner.zero_stage == 3:  # which gathers weights layer by layer, in the order of the first pass
        return SharedTrunk(policy.model, {})
    others = {"reference": policy.model if policy.model.adapter else reference}
    trunk = SharedTrunk(policy.model, others | ({"value": value.model} if value else {}))

    def run(packed: Packed) -> list[Tensor]:
        select = torch.arange(packed.input_ids.shape[1] - 1, device=ranks.device)
        targets = packed.input_ids[0, select + 1]
        found = [network(packed, select, targets)[0] for network in (reference, policy)]
        return found + ([value(packed, select)] if value else [])

    trunk.try_out(run)
    return trunk
