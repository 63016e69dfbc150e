"""The networks that train: a causal language model that returns log-probabilities of given tokens, and a transformer with
a scalar head (reward and value model). Both take packed sequences, so that no padding is computed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from contracts import attention
from contracts.attention import Packed
from contracts.config import LearnerConfig, ModelConfig
from learner.lean import make_lean
from learner.losses import selected_logprobs


class PolicyModel(nn.Module):
    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm

    def forward(
        self,
        packed: Packed,
        select: torch.Tensor,
        targets: torch.Tensor,
        temperature: float = 1.0,
        banned_tokens: tuple[int, ...] | None = None,
        banned_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of `targets` [M] at the positions `select` [M] of the packed row.

        Only those positions reach the LM head, as a contiguous 2-D matrix: on CPU a bfloat16 product over a slice is
        20 x slower, and prompts need no logits.

        Returns:
            log p [M] float32, and the entropy [M] of the distributions, without gradient.
        """
        hidden = packed.hidden(getattr(self.lm, self.lm.base_model_prefix))
        logits = self.lm.get_output_embeddings()(hidden.index_select(0, select))
        return selected_logprobs(logits, targets, temperature, banned_tokens, banned_mask)


class FloatLinear(nn.Linear):
    """A scalar head in float32: in bfloat16 its rounding would be the resolution of scores and values."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input.float(), self.weight.float())


class ScalarModel(nn.Module):
    """Scores or values: (head(hidden) - mean) / std, with the normaliser of the checkpoint it came from."""

    def __init__(self, classifier: Any):
        super().__init__()
        old = classifier.score
        head = FloatLinear(old.in_features, 1, bias=False, dtype=old.weight.dtype)
        head.weight = old.weight
        classifier.score = head
        self.lm = classifier
        self.mean = float(getattr(classifier.config, "score_mean", None) or 0.0)
        self.std = float(getattr(classifier.config, "score_std", None) or 1.0)

    def forward(self, packed: Packed, select: torch.Tensor) -> torch.Tensor:
        """float32 [M] at the positions `select` [M] of the packed row."""
        hidden = packed.hidden(getattr(self.lm, self.lm.base_model_prefix))
        return (self.lm.score(hidden.index_select(0, select)).squeeze(-1) - self.mean) / self.std


def load_policy(path: str, model: ModelConfig, learner: LearnerConfig, on_cpu: bool) -> PolicyModel:
    lm = AutoModelForCausalLM.from_pretrained(path, **_load_options(model, learner, on_cpu))
    return PolicyModel(_prepare(lm, learner, on_cpu))


def load_scalar(path: str, model: ModelConfig, learner: LearnerConfig, on_cpu: bool, seed: int) -> ScalarModel:
    """A reward or value model from a checkpoint of either kind. A language model gets a new head, drawn from
    N(0, 1/sqrt(d + 1)) (Stiennon 2020), the same on every rank."""
    config = AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    is_new = not any("SequenceClassification" in name for name in config.architectures or [])
    config.num_labels = 1
    config.problem_type = "regression"  # without it vLLM squashes the score with a sigmoid
    config.pad_token_id = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    options = _load_options(model, learner, on_cpu)
    classifier = AutoModelForSequenceClassification.from_pretrained(path, config=config, **options)
    if is_new:
        generator = torch.Generator().manual_seed(seed)
        width = classifier.score.in_features
        weight = torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
        classifier.score.weight.data.copy_(weight)
    return ScalarModel(_prepare(classifier, learner, on_cpu))


def _load_options(model: ModelConfig, learner: LearnerConfig, on_cpu: bool) -> dict:
    return {
        "dtype": getattr(torch, model.dtype),
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": attention.resolve(learner.attention, on_cpu),
    }


def _prepare(lm: PreTrainedModel, learner: LearnerConfig, on_cpu: bool) -> PreTrainedModel:
    modules: list[Any] = list(lm.modules())
    for module in modules:
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a ratio of two forward passes under different dropout masks is not a policy ratio
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # attention functions take it as an argument
    if learner.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train()  # transformers loads models in evaluation mode, in which it recomputes nothing
    if on_cpu:
        make_lean(lm)
    return lm


def decoder_layers(lm: PreTrainedModel) -> nn.ModuleList:
    """The stack of decoder layers: the longest ModuleList of the backbone."""
    lists = [m for m in getattr(lm, lm.base_model_prefix).modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


def freeze_below(lm: PreTrainedModel, trainable_layers: int | None, freeze_embeddings: bool) -> None:
    """Let only the top `trainable_layers` layers, the final norm and the head train (None: all layers, 0: none).

    Raises:
        ValueError: where the model has fewer layers.
    """
    layers = decoder_layers(lm)
    if trainable_layers is not None and not 0 <= trainable_layers <= len(layers):
        raise ValueError(f"trainable_layers is {trainable_layers}, the model has {len(layers)}: write 0..{len(layers)}")
    if freeze_embeddings or trainable_layers is not None:
        lm.get_input_embeddings().weight.requires_grad_(False)
    if trainable_layers is not None:
        for layer in layers[: len(layers) - trainable_layers]:
            layer.requires_grad_(False)
