"""Decoder layers that the networks of an update have in common, computed once for a microbatch.

Where only the top layers train, the reference has the policy's layers below them, and so has a value model that was trained
on them. The first network that runs keeps what these layers put out, and the others begin there: the same numbers to the
bit, since they are the same products of the same tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.models.forward import backbone_name, decoder_layers
from common.models.packed_attention import Packed
from learner.models import PolicyModel, ScalarModel, beside_layers

# Of a configuration; no decoder layer looks at these.
BESIDE_LAYERS = {
    "architectures", "num_labels", "id2label", "label2id", "problem_type", "score_mean", "score_std", "pad_token_id",
    "tie_word_embeddings", "name_or_path", "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "return_dict", "output_hidden_states", "output_attentions", "classifier_dropout", "bos_token_id", "eos_token_id",
}  # fmt: skip
Below = dict[int, Any]  # what the first n layers put out for one microbatch, by n
TRIALS = (([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1], [0, 5]), ([1, 6], [8, 0, 3, 3]))  # token ids of rows that are tried out


class SharedTrunk:
    """`layers` says how many each of the other networks shares with the policy; 0 where nothing is to be gained, where
    another class computes them, and where a trial gives other numbers."""

    def __init__(self, policy: PolicyModel, others: dict[str, PolicyModel | ScalarModel]):
        """Of networks whose weights are where they will be. `policy` may be among the others: as a reference that has
        another adapter."""
        self._below: Below | None = None
        self.layers = {name: shared_layers(policy, other) for name, other in others.items()}
        self._ends = {count for count in self.layers.values() if count}
        depths = [(policy, max(self._ends, default=0)), *((other, self.layers[name]) for name, other in others.items())]
        networks = {id(network.lm): (network, depth) for network, depth in reversed(depths)}
        self._networks = list(networks.values())

    def try_out(self, run: Callable[[Packed], list[Tensor]]) -> None:
        """Begin to share if `run`, which computes all networks, gives the same numbers then."""
        if not self._ends:
            return
        device = next(self._networks[0][0].parameters()).device
        packed, another = (Packed.of(rows, device) for rows in TRIALS)
        with torch.no_grad():
            expected, below = run(packed), Below()
            self._replace()
            try:
                with self.using(below):
                    found = run(packed)
                run(another)  # what layers tell each other on another way is of these rows then
                with self.using(below):
                    found += run(packed)
                is_same = all(torch.equal(a, b) for a, b in zip(found, expected * 2, strict=True))
            except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
                is_same = False  # layers that hand on more than hidden states
        if not is_same:
            self._put_back()
            self.layers = dict.fromkeys(self.layers, 0)

    @contextmanager
    def using(self, below: Below) -> Iterator[None]:
        """Within it every forward pass is of the microbatch whose outputs `below` holds, or is to hold."""
        self._below = below
        try:
            yield
        finally:
            self._below = None

    def _replace(self) -> None:
        for network, depth in self._networks:
            for index, layer in enumerate(decoder_layers(network.lm)[:depth]):
                layer.forward = partial(self._layer, layer.forward, index, depth)

    def _put_back(self) -> None:
        for network, depth in self._networks:
            for layer in decoder_layers(network.lm)[:depth]:
                del layer.forward

    def _layer(self, run: Callable[..., Any], index: int, depth: int, *args: Any, **kwargs: Any) -> Any:
        if self._below is None:
            return run(*args, **kwargs)
        known = [count for count in self._below if index < count <= depth]
        if known:
            return self._below[max(known)]
        out = run(*args, **kwargs)
        if index + 1 in self._ends:
            out = self._below[index + 1] = _detached(out)
        return out


def _detached(out: Any) -> Any:
    """Nothing below trains; but transformers marks embeddings as if it did, for layers that are computed again."""
    return out.detach() if isinstance(out, Tensor) else tuple(map(_detached, out)) if isinstance(out, tuple) else out


def shared_layers(policy: PolicyModel, other: PolicyModel | ScalarModel) -> int:
    """How many decoder layers, counted from the lowest, both have with the same weights, which do not train, behind the
    same embeddings."""
    mine, its = decoder_layers(policy.lm), decoder_layers(other.lm)
    if policy.layout != other.layout or _settings(policy) != _settings(other) or not _same_input(policy, other):
        return 0
    count = 0
    for one, two in zip(mine, its, strict=False):
        if type(one) is not type(two) or not _same_frozen(_tensors(one), _tensors(two)):
            break
        count += 1
    return count


def _settings(network: PolicyModel | ScalarModel) -> tuple[Any, ...]:
    """What decides, beside weights, what a layer computes: rotations, windows, scales."""
    backbone = getattr(network.lm, backbone_name(network.lm))
    said = {name: value for name, value in backbone.config.to_dict().items() if name not in BESIDE_LAYERS}
    return type(backbone), backbone.config._attn_implementation, said


def _same_input(policy: PolicyModel, other: PolicyModel | ScalarModel) -> bool:
    """What comes before the layers does not train, so what does is behind them."""
    mine: dict[str, Tensor] = {name: p for name, p in beside_layers(policy.lm).items() if not p.requires_grad}
    its: dict[str, Tensor] = {name: p for name, p in beside_layers(other.lm).items() if name in mine}
    for tensors, network in ((mine, policy), (its, other)):
        lm: Any = network.lm
        tensors["embeddings"] = lm.get_input_embeddings().weight
    return _same_frozen(mine, its)


def _same_frozen(mine: dict[str, Tensor], its: dict[str, Tensor]) -> bool:
    return mine.keys() == its.keys() and all(
        not (tensor.requires_grad or its[name].requires_grad)
        and (tensor is its[name] or (tensor.shape == its[name].shape and torch.equal(tensor, its[name])))
        for name, tensor in mine.items()
    )


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return dict([*layer.named_parameters(), *layer.named_buffers()])
