"""The proof that a model is computed here as its own class in transformers computes it, or the refusal to use it.

A twin of the model (`common/models/twin.py`) computes a few rows twice: row by row through the class's own forward pass in
float32 with eager attention, and all together through the code that trains or scores. The fastest form whose numbers and
gradients are those of the class is the one that the model is used in; where none is, the model is refused.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from common.models.forward import Form, candidates
from common.models.lora import base_state, with_telling_adapter
from common.models.packed_attention import MAX_TOKENS, NAME
from common.models.positions import steady_positions
from common.models.twin import NoTwin, make_twin
from contracts.config import LoraConfig

TOLERANCE = 5e-4  # nats, or units of a raw score: float32 rounds by 1e-5, the deepest twins by 1e-4
GRADIENT_TOLERANCE = 1e-3  # of the largest gradient of a tensor
HALF_TOLERANCE = 0.25  # flash attention exists in 16 bits alone
LENGTHS = (23, 5, 37, 2, 11)  # of rows; any window of a twin is shorter
LONG = (MAX_TOKENS + 24, 9)  # above MAX_TOKENS short_causal takes another way

# Numbers of all rows, one behind the other, as (model, form, rows) gives them.
Compute = Callable[[PreTrainedModel, Form, list[list[int]]], Tensor]


class Unproven(ValueError):
    """No form computes the model as its class does."""


class NoClass(Unproven):
    """transformers has no class of this kind for the architecture."""


@dataclass
class Proof:
    attention: str
    layout: str
    error: float  # largest difference from the class's own numbers
    gradient_error: float | None  # the same of gradients, against the largest of their tensor; None: nothing trains
    seconds: float
    tried: dict[str, str] = field(default_factory=dict)  # faster forms, and why they are not it

    @property
    def form(self) -> Form:
        return Form(self.attention, self.layout)


@dataclass(frozen=True)
class Kind:
    """One way to use a model: the class that defines its numbers, and how the class gives them."""

    name: str
    auto: Any  # class of transformers that finds the model's own
    numbers: Callable[[PreTrainedModel, list[int]], Tensor]  # of one row, alone


def row_logprobs(lm: PreTrainedModel, row: list[int]) -> Tensor:
    """log p of every token but the first, float32 [len(row) - 1], by the model's own forward pass."""
    ids = torch.tensor([row], device=lm.device)
    logprobs = torch.log_softmax(lm(input_ids=ids, use_cache=False).logits[0, :-1].float(), -1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0]


def _score(classifier: PreTrainedModel, row: list[int]) -> Tensor:
    text = classifier.config.get_text_config()
    padding = getattr(text, "pad_token_id", None)
    text.pad_token_id = None  # else the class takes a row's last token for padding
    try:
        return classifier(input_ids=torch.tensor([row], device=classifier.device), use_cache=False).logits[0].float()
    finally:
        text.pad_token_id = padding  # models made of this configuration hold its embedding fixed


POLICY = Kind("policy", AutoModelForCausalLM, row_logprobs)
SCALAR = Kind("scalar", AutoModelForSequenceClassification, _score)


def prove(
    kind: Kind,
    config: Any,
    compute: Compute,
    attention: str,
    on_cpu: bool,
    trains: bool = True,
    lora: LoraConfig | None = None,
    **build_options: Any,
) -> Proof:
    """The fastest form in which `compute` gives the numbers of the class of `config`.

    Args:
        config: of a checkpoint; it is not changed.
        compute: the code under proof, on a model of the class in float32.
        attention: a value of `learner.attention`; `auto` tries every form.
        trains: compare gradients too.
        lora: adapters, which `compute` adds to its model (`with_telling_adapter`): their gradients alone are compared.
        build_options: of `from_config`. Code of a checkpoint runs only where they say so.

    A process remembers what it has proved: policy, reference and the next update's copy are of one configuration.

    Raises:
        Unproven: with what each form said.
    """
    build_options = {"trust_remote_code": False} | build_options
    start = time.perf_counter()
    key = json.dumps(
        [kind.name, attention, on_cpu, trains, lora and asdict(lora), config.to_dict()], sort_keys=True, default=str
    )
    if key in _PROVED:
        return _PROVED[key]
    known = type(config) in kind.auto._model_mapping or kind.auto.__name__ in getattr(config, "auto_map", {})
    if not known:
        raise NoClass(f"transformers has no {kind.auto.__name__} of {config.model_type}")
    device = torch.device("cpu" if on_cpu else "cuda")
    generator = torch.Generator().manual_seed(0)

    def class_numbers(model: Any) -> "Expected":
        with_telling_adapter(model, lora).to(device)
        most, vocabulary = _positions(model.config), model.config.get_text_config().vocab_size

        def rows_of(lengths: tuple[int, ...]) -> list[list[int]]:
            return [torch.randint(0, vocabulary, (min(n, most),), generator=generator).tolist() for n in lengths]

        expected = Expected(rows_of(LENGTHS), rows_of(LONG))
        short = min(expected.rows[:2], key=len)  # than any window
        other = [(short[0] + 1) % vocabulary, *short[1:]]
        if not (kind.numbers(model, other)[-1] - kind.numbers(model, short)[-1]).abs() > 100 * TOLERANCE:
            raise NoTwin("its numbers do not depend on the tokens before")
        expected.numbers = torch.cat([kind.numbers(model, row) for row in expected.rows])
        expected.gradients = _gradients(model, expected.numbers) if trains else {}
        expected.numbers = expected.numbers.detach()
        idle = [name for name, p in model.named_parameters() if trains and lora and p.requires_grad and p.grad is None]
        if idle:
            raise NoTwin(f"it takes the weights of {idle[0].partition('.lora_')[0]} past the adapter on them")
        return expected

    torch_state = torch.get_rng_state()
    try:
        model, expected = make_twin(
            config,
            lambda c: kind.auto.from_config(c, dtype=torch.float32, attn_implementation="eager", **build_options),
            class_numbers,
        )
        _require_one_answer(kind, model, expected, lora, build_options)
        proof = _first_exact(kind, model, compute, expected, candidates(attention, on_cpu), build_options)
    except NoTwin as error:
        raise Unproven(f"no small model of the configuration could be made: {error}") from error
    finally:
        torch.set_rng_state(torch_state)
    proof.seconds = time.perf_counter() - start
    _PROVED[key] = proof
    return proof


_PROVED: dict[str, Proof] = {}


@dataclass
class Expected:
    """What the class itself computes of the twin."""

    rows: list[list[int]]
    long_rows: list[list[int]]
    numbers: Tensor = field(default_factory=lambda: torch.empty(0))
    gradients: dict[str, Tensor] = field(default_factory=dict)


def _require_one_answer(
    kind: Kind, model: PreTrainedModel, expected: Expected, lora: LoraConfig | None, build_options: dict[str, Any]
) -> None:
    """Refuse a class that gives other numbers with torch's attention than with its own: which of them a checkpoint was
    trained with nobody can know. In transformers 5.19 Falcon adds the biases of ALiBi twice in `eager`, once in `sdpa`
    (findings/falcon_alibi_twice.sh). Softcaps are no such case: `sdpa` leaves them out, as transformers says."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        return
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"} | build_options
    try:
        other = kind.auto.from_config(copy.deepcopy(model.config), **options).eval()
    except ValueError:  # the class has no other way
        return
    other.load_state_dict(base_state(model))
    with_telling_adapter(other, lora).to(model.device)
    with torch.no_grad():
        numbers = torch.cat([kind.numbers(other, row) for row in expected.rows])
    error = (numbers - expected.numbers).abs().max().item()
    if not error <= TOLERANCE:
        raise Unproven(
            f"{type(model).__name__} of transformers {transformers.__version__} contradicts itself: its numbers with "
            f"attn_implementation sdpa and eager differ by {error:.2g}"
        )


def _first_exact(
    kind: Kind,
    model: PreTrainedModel,
    compute: Compute,
    expected: Expected,
    forms: list[Form],
    build_options: dict[str, Any],
) -> Proof:
    tried: dict[str, str] = {}
    for form in forms:
        name, is_half = f"{form.attention}, {form.layout}", form.attention.startswith("flash")
        tolerance = HALF_TOLERANCE if is_half else TOLERANCE
        try:
            twin = kind.auto.from_config(
                copy.deepcopy(model.config), dtype=torch.float32, attn_implementation=form.attention, **build_options
            ).eval()
            twin.load_state_dict(base_state(model))
            twin.to(model.device, torch.bfloat16 if is_half else torch.float32)
            versions = {name: (p, p._version) for name, p in twin.named_parameters()}
            found = compute(twin, form, expected.rows)
            written = [name for name, (p, version) in versions.items() if p._version != version]
            if written:
                raise RuntimeError(f"its forward pass writes to {written[0]}")
            error = (found.float() - expected.numbers).abs().max().item()
            worst = _gradient_error(twin, found, expected.gradients) if expected.gradients and not is_half else None
            if error <= tolerance and form.attention == NAME:
                with torch.no_grad():
                    long = torch.cat([kind.numbers(model, row) for row in expected.long_rows])
                    error = max(error, (compute(twin, form, expected.long_rows) - long).abs().max().item())
        except Exception as problem:  # architectures fail in ways of their own; what they say is told if none works
            tried[name] = f"{type(problem).__name__}: {str(problem)[:160]}"
            continue
        if error <= tolerance and (worst is None or worst <= GRADIENT_TOLERANCE):
            return Proof(form.attention, form.layout, error, worst, 0.0, tried)
        of_gradient = "" if worst is None else f", gradients by {worst:.2g} of their size"
        tried[name] = f"numbers differ by {error:.3g}{of_gradient}"
    raise Unproven("; ".join(f"{form}: {what}" for form, what in tried.items()))


def _gradients(model: PreTrainedModel, numbers: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, numbers.numel(), device=numbers.device) + 0.1
    model.zero_grad()
    (numbers * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _gradient_error(model: PreTrainedModel, numbers: Tensor, expected: dict[str, Tensor]) -> float:
    found = _gradients(model, numbers)
    if found.keys() != expected.keys():
        return float("inf")
    largest = max(g.abs().max().item() for g in expected.values())
    return max(
        (found[n] - g).abs().max().item() / max(g.abs().max().item(), 1e-3 * largest) for n, g in expected.items()
    )


def _positions(config: Any) -> int:
    """How long a row of the model may be, and as long as any other of its batch."""
    text, steady = config.get_text_config(), steady_positions(config.get_text_config())
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits += [steady[0]] if steady else []
    return min([limit for limit in limits if isinstance(limit, int) and limit > 0], default=1 << 30)
