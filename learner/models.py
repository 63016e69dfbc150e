"""The networks that train: a causal language model that returns log-probabilities of given tokens, and a transformer with
a scalar head (reward and value model). Both take packed sequences, so that no padding is computed."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from common.models.adapters import require_here, split
from common.models.forward import Form, backbone_name, decoder_layers, head_logits, hidden_states
from common.models.loading import LoadingError, normaliser, refuse_adapter, refuse_unloaded
from common.models.lora import with_telling_adapter
from common.models.packed_attention import Packed
from common.models.proof import POLICY, SCALAR, Proof, prove
from common.models.twin import make_twin
from common.text.tokenizers import load_config
from contracts.config import LearnerConfig, LoraConfig, ModelConfig
from learner.lean_layers import make_lean
from learner.selected_logprobs import selected_logprobs


@dataclass
class Adapter:
    """What trains of a model with LoRA; the rest of it is the checkpoint `base`, as it was loaded."""

    lora: LoraConfig
    base: str
    fingerprint: str  # of the base


class PolicyModel(nn.Module):
    """`layout` is that of a `Form` in which the model was proved to be computed right."""

    def __init__(self, lm: PreTrainedModel, layout: str):
        super().__init__()
        self.lm, self.layout = lm, layout
        self.adapter: Adapter | None = None

    def forward(
        self,
        packed: Packed,
        select: torch.Tensor,
        targets: torch.Tensor,
        temperature: float = 1.0,
        banned_tokens: tuple[int, ...] | None = None,
        banned_mask: torch.Tensor | None = None,
        entropy_gradient: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of `targets` [M] at the positions `select` [M] of the packed row.

        Only those positions reach the LM head, as a contiguous 2-D matrix: on CPU a bfloat16 product over a slice is
        20 x slower, and prompts need no logits.

        Returns:
            log p [M] float32, and the entropy [M] of the distributions, with a gradient on demand.
        """
        hidden = hidden_states(self.lm, packed, self.layout)
        logits = head_logits(self.lm, hidden.index_select(0, select))
        return selected_logprobs(logits, targets, temperature, banned_tokens, banned_mask, entropy_gradient)


class FloatLinear(nn.Linear):
    """A scalar head in float32: in bfloat16 its rounding would be the resolution of scores and values."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input.float(), self.weight.float())


class ScalarModel(nn.Module):
    """Scores or values: (head(hidden) - mean) / std, with the normaliser of the checkpoint it came from."""

    def __init__(self, classifier: Any, layout: str):
        super().__init__()
        self.lm, self.layout = classifier, layout
        self.adapter: Adapter | None = None
        old = getattr(classifier, "score", None)
        if not isinstance(old, nn.Linear) or old.out_features != 1 or old.bias is not None:
            raise TypeError(f"{type(classifier).__name__} has no linear `score` head of one label without a bias")
        head = FloatLinear(old.in_features, 1, bias=False, dtype=old.weight.dtype)
        head.weight = old.weight
        classifier.score = head
        self.mean: float
        self.std: float
        self.mean, self.std = normaliser(classifier.config, classifier.config.name_or_path, "path")

    def forward(self, packed: Packed, select: torch.Tensor) -> torch.Tensor:
        """float32 [M] at the positions `select` [M] of the packed row."""
        hidden = hidden_states(self.lm, packed, self.layout)
        return (self.lm.score(hidden.index_select(0, select)).squeeze(-1) - self.mean) / self.std


def load_policy(path: str, model: ModelConfig, learner: LearnerConfig, on_cpu: bool) -> PolicyModel:
    """A causal language model, in the fastest form that was proved to be its class's own. Of an adapter's directory it is
    the base, without the adapter: `learner.adapted_models`.
    Raises:
        Unproven: no form computes it right.
        LoadingError: the checkpoint lacks weights of the model.
    """
    require_here(path)
    if model.lora is None:
        refuse_adapter(path, "path")
    base, _ = split(path)
    proof = prove_policy(load_config(base, model), model, learner, on_cpu)
    lm, _ = _load(AutoModelForCausalLM, base, model, proof)
    return PolicyModel(_prepare(lm, learner, on_cpu), proof.layout)


def load_scalar(
    path: str, model: ModelConfig, learner: LearnerConfig, on_cpu: bool, seed: int, base: PolicyModel | None = None
) -> ScalarModel:
    """A reward or value model from a checkpoint of either kind. A language model gets a new head, drawn from
    N(0, 1/sqrt(d + 1)) (Stiennon 2020), the same on every rank. Raises as `load_policy`.

    Args:
        path: of an adapter's directory the base is loaded, with the adapter's configuration.
        base: a policy of the same checkpoint, without an adapter yet, whose weights are taken instead of loaded ones.
    """
    require_here(path)
    if model.lora is None:
        refuse_adapter(path, "path")
    config, checkpoint = scalar_config(load_config(path, model)), split(path)[0]
    proof = prove_scalar(config, model, learner, on_cpu)
    if base is None:
        new = () if is_classifier(config) and checkpoint == path else ("score.weight",)
        classifier, lacks = _load(AutoModelForSequenceClassification, checkpoint, model, proof, new, config=config)
    else:
        classifier, lacks = _on_base(base.lm, config, model, proof), ["score.weight"]
    if lacks:  # the head; a checkpoint of a class that transformers does not know may have one
        generator = torch.Generator().manual_seed(seed)
        width = classifier.score.in_features
        weight = torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
        classifier.score.weight.data.copy_(weight)
    return ScalarModel(_prepare(classifier, learner, on_cpu), proof.layout)


def policy_shapes(config: Any, model: ModelConfig, learner: LearnerConfig, form: Form, on_cpu: bool) -> PolicyModel:
    """What `load_policy` makes in this form, on the meta device: shapes without weights. `config` is of a checkpoint."""
    return PolicyModel(_shapes(AutoModelForCausalLM, config, model, learner, form, on_cpu), form.layout)


def scalar_shapes(config: Any, model: ModelConfig, learner: LearnerConfig, form: Form, on_cpu: bool) -> ScalarModel:
    """The same of `load_scalar`."""
    one_label = scalar_config(copy.deepcopy(config))
    lm = _shapes(AutoModelForSequenceClassification, one_label, model, learner, form, on_cpu)
    return ScalarModel(lm, form.layout)


def _shapes(
    auto: Any, config: Any, model: ModelConfig, learner: LearnerConfig, form: Form, on_cpu: bool
) -> PreTrainedModel:
    return _prepare(_on_meta(auto, copy.deepcopy(config), model, form.attention), learner, on_cpu)


def _on_meta(auto: Any, config: Any, model: ModelConfig, attention: str) -> Any:
    with torch.device("meta"):
        return auto.from_config(
            config,
            dtype=getattr(torch, model.dtype),
            attn_implementation=attention,
            trust_remote_code=model.trust_remote_code,
        ).eval()


def _on_base(lm: PreTrainedModel, config: Any, model: ModelConfig, proof: Proof) -> Any:
    """A classifier whose backbone has the parameters and buffers of `lm`: the same tensors, not copies."""
    classifier = _on_meta(AutoModelForSequenceClassification, config, model, proof.attention)
    shared, mine = getattr(lm, backbone_name(lm)), getattr(classifier, backbone_name(classifier))
    tensors = _all_tensors(shared)
    for name in _all_tensors(mine):
        where, _, last = name.rpartition(".")
        if name not in tensors:
            raise LoadingError(f"{type(classifier).__name__} has {name}, which {type(lm).__name__} does not have")
        setattr(mine.get_submodule(where), last, tensors[name])
    width = classifier.score.in_features
    classifier.score = nn.Linear(width, 1, bias=False, dtype=getattr(torch, model.dtype), device=lm.device)
    return classifier


def _all_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under each name that they have."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return dict(named)


def prove_policy(config: Any, model: ModelConfig, learner: LearnerConfig, on_cpu: bool) -> Proof:
    def logprobs(lm: PreTrainedModel, form: Form, rows: list[list[int]]) -> torch.Tensor:
        packed = Packed.of(rows, lm.device)
        select = torch.arange(packed.input_ids.shape[1], device=lm.device)
        select = select[~torch.isin(select, packed.last)]
        network = PolicyModel(with_telling_adapter(_prepare(lm, learner, on_cpu), model.lora), form.layout)
        return network(packed, select, packed.input_ids[0, select + 1])[0]

    remote = {"trust_remote_code": model.trust_remote_code}
    return prove(POLICY, config, logprobs, learner.attention, on_cpu, lora=model.lora, **remote)


def prove_scalar(config: Any, model: ModelConfig, learner: LearnerConfig, on_cpu: bool) -> Proof:
    def scores(classifier: PreTrainedModel, form: Form, rows: list[list[int]]) -> torch.Tensor:
        packed = Packed.of(rows, classifier.device)
        network = with_telling_adapter(_prepare(classifier, learner, on_cpu), model.lora)
        return ScalarModel(network, form.layout)(packed, packed.last)

    plain = copy.deepcopy(config)  # the class knows no normaliser
    plain.score_mean, plain.score_std = 0.0, 1.0
    remote = {"trust_remote_code": model.trust_remote_code}
    return prove(SCALAR, plain, scores, learner.attention, on_cpu, lora=model.lora, **remote)


def scalar_config(config: Any) -> Any:
    """The configuration, changed in place, of a classifier with one label and without a squashing function."""
    config.num_labels = 1
    config.problem_type = "regression"  # without it vLLM squashes the score with a sigmoid
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        eos = getattr(text, "eos_token_id", None)
        text.pad_token_id = eos[0] if isinstance(eos, list) else eos  # Llama 3 names several, and no padding
    return config


def is_classifier(config: Any) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or [])


def _load(
    auto: Any, path: str, model: ModelConfig, proof: Proof, allowed_new: tuple[str, ...] = (), **options: Any
) -> tuple[Any, list[str]]:
    """The model, and which of `allowed_new` the checkpoint lacks."""
    loaded, report = auto.from_pretrained(
        path,
        dtype=getattr(torch, model.dtype),
        revision=model.revision_of(path),
        trust_remote_code=model.trust_remote_code,
        attn_implementation=proof.attention,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    refuse_unloaded(report, path, "model.path", allowed_new, loaded)
    return loaded, sorted(report["missing_keys"])


def _prepare(lm: PreTrainedModel, learner: LearnerConfig, on_cpu: bool) -> PreTrainedModel:
    modules: list[Any] = list(lm.modules())
    for module in modules:
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a ratio of two forward passes under different dropout masks is not a policy ratio
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):  # of layers too
                setattr(module, name, 0.0)  # functions take it as an argument
    if getattr(lm.config, "rescale_every", 0):
        lm.config.rescale_every = 0  # RWKV halves weights in place for inference in float16, and they would be saved so
    if learner.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        for module in modules:
            # transformers loads models in evaluation mode, in which nothing is recomputed; what else training mode turns on,
            # as a router's jitter, would make a second pass another one.
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        layers: list[Any] = [*decoder_layers(lm)]
        # The others are the lowest, which are often frozen and keep nothing.
        for layer in layers[: -learner.checkpointed_layers] if learner.checkpointed_layers else ():
            layer.gradient_checkpointing = layer.training = False
    if on_cpu:
        make_lean(lm)
    return lm


def freeze_below(lm: PreTrainedModel, trainable_layers: int | None, freeze_embeddings: bool) -> None:
    """Let only the top `trainable_layers` layers and what comes after them, the final norm and the head, train (None: all
    layers, 0: none).

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
        after = _after_layers(lm, is_input=trainable_layers > 0)
        for name, parameter in beside_layers(lm).items():
            if name not in after:
                parameter.requires_grad_(False)


def beside_layers(lm: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters of the backbone that are in no decoder layer, by name."""
    inside = {id(parameter) for parameter in decoder_layers(lm).parameters()}
    backbone = getattr(lm, backbone_name(lm))
    return {name: p for name, p in backbone.named_parameters() if id(p) not in inside}


def _after_layers(lm: PreTrainedModel, is_input: bool) -> set[str]:
    """Which of `beside_layers` reach the output without the input (else the output) of the last layer.

    Names do not tell: OPT has its final norm before its layers, and projections on both sides. So autograd says it of a
    twin, as the model itself may need a device that it is not on yet.
    """

    def trace(twin: PreTrainedModel) -> set[str]:
        seen: list[Any] = []
        last = decoder_layers(twin)[-1]
        if is_input:
            last.register_forward_pre_hook(lambda _, args, kwargs: seen.extend((args, kwargs)), with_kwargs=True)
        else:
            last.register_forward_hook(lambda _, args, output: seen.append(output))
        out = getattr(twin, backbone_name(twin))(input_ids=torch.tensor([[0, 1, 2, 3]]), use_cache=False)[0]
        after = _leaves(out) - _leaves(seen)
        return {name for name, parameter in beside_layers(twin).items() if id(parameter) in after}

    def build(config: Any) -> PreTrainedModel:
        return type(lm)._from_config(config, dtype=torch.float32, attn_implementation="eager")

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        return make_twin(lm.config, build, trace)[1]


def _leaves(value: Any) -> set[int]:
    """Ids of the parameters that the tensors anywhere in `value` were computed from."""
    found: set[int] = set()
    todo, nodes = [value], set()
    while todo:
        one = todo.pop()
        if isinstance(one, torch.Tensor):
            todo.append(one.grad_fn)
            if one.is_leaf:
                found.add(id(one))
        elif isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, list | tuple):
            todo += one
        elif isinstance(one, torch.autograd.graph.Node) and one not in nodes:
            nodes.add(one)
            todo += [getattr(one, "variable", None), *(node for node, _ in one.next_functions)]
    return found
