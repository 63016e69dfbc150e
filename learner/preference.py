"""Training a policy on human preferences without a reward model: DPO, and ranking by log-likelihood without a reference.

Both give every completion a score that the policy itself implies and compare scores as the reward model's loss does, all
pairs of a batch against the share of raters who prefer one. A batch may be cut between the texts of a pair:

    log-probabilities of the whole batch ──> loss ──> d loss / d log p of each completion ──> one backward pass a microbatch

The first pass keeps its graphs as far as `learner.held_tokens` allows; other microbatches are computed a second time. The
reference is the policy before its first step, so its log-probabilities are computed then, once, and no second model is held.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from contracts.batching import cut_microbatches
from contracts.config import PreferenceConfig, TandemConfig
from contracts.records import Example, ExamplePair, RatedExample
from learner.checkpoint import save_checkpoint
from learner.engine import Ranks, TrainEngine
from learner.losses import soft_pairwise_loss
from learner.models import PolicyModel, freeze_below, load_policy
from learner.preferences import pair_preferences, preference_matrix
from learner.sft import epoch_batches, example_logprobs, loss_tokens


def implicit_scores(logprobs: Tensor, reference: Tensor, tokens: Tensor, loss: str, beta: float) -> Tensor:
    """What a policy's likelihoods say of completions.

    dpo:  beta * (log pi(y|x) - log pi_ref(y|x)), summed over tokens: Rafailov et al. 2023 (arXiv 2305.18290), equation 5,
          without the term of the prompt, which is the same on both sides of a pair that shares it
    rank: beta * log pi(y|x) / |y|: Yuan et al. 2023 (arXiv 2304.05302, RRHF), equation 1; with the logistic loss it is
          SimPO without its margin (Meng et al. 2024, arXiv 2405.14734)

    Args:
        logprobs, reference: [N], log p of whole completions, nats; the reference is not read by rank.
        tokens: [N], length of each completion, at least 1.

    Raises:
        ValueError: for another loss.
    """
    if loss == "dpo":
        return beta * (logprobs - reference)
    if loss == "rank":
        return beta * logprobs / tokens
    raise ValueError(f"the loss must be dpo or rank, found {loss!r}")


def preference_loss(
    logprobs: Tensor,
    reference: Tensor,
    tokens: Tensor,
    preferences: Tensor,
    known: Tensor,
    loss: str,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over the known pairs of the cross-entropy of sigmoid(s_i - s_j) against P(i beats j), where s are
    `implicit_scores`. With P = 1 it is -log sigmoid(s_w - s_l); with P = 1 - epsilon it is conservative DPO (Mitchell 2023,
    "A note on DPO with noisy preferences").

    Args:
        preferences, known: [N, N], read above the diagonal.

    Returns:
        The loss (scalar), the scores [N], and d loss / d logprobs [N]: all without gradient.
    """
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        scores = implicit_scores(leaf, reference, tokens, loss, beta)
        total, pairs = soft_pairwise_loss(scores, preferences, known)
        mean = total / pairs.clamp(min=1)
        [coefficients] = torch.autograd.grad(mean, leaf)
    return mean.detach(), scores.detach(), coefficients


@torch.no_grad()
def pair_metrics(scores: Tensor, preferences: Tensor, known: Tensor) -> tuple[float, float]:
    """Over the known pairs that are no tie: share whose preferred text has the higher score (equal scores half), and the
    mean of its score less the other's."""
    counted = known.triu(1) & (preferences != 0.5)
    if not counted.any():
        return 0.0, 0.0
    margins = ((scores[:, None] - scores[None, :]) * (preferences - 0.5).sign())[counted]
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean().item(), margins.mean().item()


def batch_examples(batch: Sequence[RatedExample | ExamplePair]) -> tuple[list[Example], Tensor, Tensor]:
    """The texts of a batch, P(i beats j) [N, N], and which entries are known [N, N]: of rated texts all, of stored pairs
    those between their two texts."""
    rated = [item for item in batch if isinstance(item, RatedExample)]
    if rated:
        preferences = preference_matrix([item.ratings for item in rated])
        return [item.example for item in rated], preferences, torch.ones_like(preferences, dtype=torch.bool)
    pairs = [item for item in batch if isinstance(item, ExamplePair)]
    texts = [example for pair in pairs for example in (pair.chosen, pair.rejected)]
    return texts, *pair_preferences([pair.preference for pair in pairs])


class PreferenceTask:
    """All ranks hold all examples; each computes its share of a batch and sees everybody's log-probabilities in the loss."""

    def __init__(
        self,
        ranks: Ranks,
        config: TandemConfig,
        stage: PreferenceConfig,
        policy: str,
        examples: Sequence[RatedExample | ExamplePair],
    ):
        self.ranks, self.config, self.stage, self.examples = ranks, config, stage, examples
        assert stage.loss is not None  # `contracts.methods.chosen_preference` has filled both in
        assert stage.beta is not None
        self.loss, self.beta = stage.loss, stage.beta
        self.batches = epoch_batches(len(examples), stage.batch_size, stage.epochs, config.seed, ranks.world_size)
        self.model: PolicyModel = load_policy(policy, config.model, config.learner, ranks.on_cpu)
        freeze_below(self.model.lm, stage.trainable_layers, freeze_embeddings=False)
        self.engine = TrainEngine(self.model, stage.optimizer, config.learner, ranks, len(self.batches))
        self._tokenizer_from = policy
        self._reference: dict[int, list[float]] = {}  # of each example, by its number: one text, or the two of a pair

    def num_steps(self) -> int:
        return len(self.batches)

    def compute_reference(self, start: int, stop: int) -> None:
        """Log-probabilities of the texts of these examples, before the first step."""
        texts, _, _ = batch_examples(self.examples[start:stop])
        logprobs = self.logprobs(texts)
        each = len(texts) // (stop - start)
        self._reference |= {start + i: logprobs[each * i : each * (i + 1)] for i in range(stop - start)}

    def step(self, index: int) -> dict[str, float]:
        """One optimizer step."""
        start, device = time.perf_counter(), self.ranks.device
        rows = self.batches[index]
        texts, preferences, known = batch_examples([self.examples[i] for i in rows])
        preferences, known = preferences.to(device), known.to(device)
        cut, held = self._cut(texts), self.config.learner.held_tokens
        parts: list[tuple[list[int], Tensor]] = []
        for part in cut:
            size = sum(len(texts[r].token_ids) for r in part)
            with torch.set_grad_enabled(size <= held):
                parts.append((part, self._sums([texts[r] for r in part])))
            held -= size if parts[-1][1].requires_grad else 0
        logprobs = self._gather(parts, len(texts))
        reference = torch.zeros_like(logprobs)
        if self.loss == "dpo":
            reference = torch.tensor([value for i in rows for value in self._reference[i]], device=device)
        tokens = torch.tensor([loss_tokens([text]) for text in texts], device=device).clamp(min=1)
        loss, scores, coefficients = preference_loss(
            logprobs, reference, tokens, preferences, known, self.loss, self.beta
        )
        for i, (part, first) in enumerate(parts):
            mine = first if first.requires_grad else self._sums([texts[r] for r in part])
            self.engine.backward((coefficients[part] * mine).sum(), is_last=i == len(parts) - 1)
        norm = self.engine.step()
        accuracy, margin = pair_metrics(scores, preferences, known)
        return {
            "preference/loss": loss.item(),
            "preference/accuracy": accuracy,
            "preference/margin": margin,
            "preference/token_logprob": (logprobs.sum() / tokens.sum()).item(),
            "preference/grad_norm": norm,
            "perf/train_tokens_per_s": sum(len(e.token_ids) for e in texts) / (time.perf_counter() - start),
        }

    @torch.no_grad()
    def logprobs(self, texts: list[Example]) -> list[float]:
        """log p of the completions, nats, in order, on every rank."""
        parts = [(part, self._sums([texts[r] for r in part])) for part in self._cut(texts)]
        return self._gather(parts, len(texts)).tolist()

    def _cut(self, texts: list[Example]) -> list[list[int]]:
        """This rank's microbatches."""
        lengths, budget = [len(e.token_ids) for e in texts], self.config.learner.microbatch_tokens
        return cut_microbatches(lengths, budget, self.ranks.world_size)[self.ranks.rank]

    def _sums(self, texts: list[Example]) -> Tensor:
        """log p of each completion of one microbatch [B]."""
        logprobs, owners = example_logprobs(self.engine, texts, self.ranks.device)
        return torch.zeros(len(texts), device=logprobs.device).index_add(0, owners, logprobs)

    def _gather(self, parts: list[tuple[list[int], Tensor]], count: int) -> Tensor:
        """Everybody's log-probabilities in batch order, without gradient."""
        everyone = torch.zeros(count, device=self.ranks.device)
        for part, sums in parts:
            everyone[part] = sums.detach()
        return self.ranks.sum(everyone)

    def save(self, path: str) -> None:
        save_checkpoint(self.engine, path, self._tokenizer_from, self.config.model, self.ranks)
