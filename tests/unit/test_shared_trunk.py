"""Layers that the networks of an update share, computed once, against each network for itself: equal to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from common.models.forward import decoder_layers
from contracts.config import LoraConfig, TandemConfig
from controller.loop.training_batches import make_batches
from learner.ppo import PPOTask
from learner.ranks import Ranks
from learner.shared_trunk import SharedTrunk
from tests.conftest import make_config
from tests.rollouts import rollout
from tests.tiny_models import make

UPDATES, EPOCHS, MINIBATCHES = 2, 2, 2


ROLLOUTS = [
    rollout(0, [5, 61, 30], [40, 94, 15, 2]),
    rollout(1, [9], [33, 44, 9, 9, 9, 12, 7]),
    rollout(2, [17, 18], [21, 22]),
    rollout(3, [40, 41, 42, 43, 44], [30, 3, 2]),
]


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., TandemConfig]:
    def configure(path: Path, trainable: int | None = 1, dtype: str = "float32", held: int = 1000) -> TandemConfig:
        config = make_config(path, tmp_path, dtype=dtype)
        config.ppo.trainable_layers = config.ppo.value_trainable_layers = trainable
        config.ppo.epochs, config.ppo.minibatches, config.ppo.target_approx_kl = EPOCHS, MINIBATCHES, None
        config.ppo.optimizer.learning_rate = config.ppo.value_optimizer.learning_rate = 1e-2
        config.learner.held_tokens, config.learner.microbatch_tokens = held, 16
        return config

    return configure


def trained(
    ranks: Ranks, config: TandemConfig, value: Path | None = None, shares: bool = True
) -> tuple[PPOTask, list[dict[str, float]], int]:
    """The task after its updates, their metrics without times, and how often the lowest layers of the networks ran."""
    with pytest.MonkeyPatch.context() as patched:
        if not shares:
            patched.setattr(SharedTrunk, "try_out", lambda self, run: None)
        task = PPOTask(ranks, config, config.model.path, str(value or config.model.path), (2,), [])
    ran = 0

    def count(*_: Any) -> None:
        nonlocal ran
        ran += 1

    networks = [task.policy.model, *([task.value.model] if task.value else [])]
    networks += [] if config.model.lora else [task.reference]
    for network in networks:
        layer = decoder_layers(network.lm)[0]
        next(layer.children()).register_forward_hook(count)  # of a part: the layer itself is called in any case
    metrics = []
    for _ in range(UPDATES):
        batch = make_batches(ROLLOUTS, [1.5, -0.7, 0.2, -2.0], 1, MINIBATCHES, 16, np.random.default_rng(0))[0]
        metrics.append(task.update(batch, 0.1, train_policy=True))
    return task, [{k: v for k, v in one.items() if not k.startswith("perf/")} for one in metrics], ran


def weights(task: PPOTask) -> dict[str, torch.Tensor]:
    engines = [task.policy, *([task.value] if task.value else [])]
    return {f"{i}.{name}": p for i, engine in enumerate(engines) for name, p in engine.model.named_parameters()}


def equal(one: PPOTask, two: PPOTask) -> bool:
    mine, its = weights(one), weights(two)
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


# Embeddings of positions, norms and projections before the layers; windows; mixtures of experts; rows that are padded.
@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "qwen3", "gemma3", "gpt2", "opt", "bloom", "mixtral", "falcon"]
)
def test_an_update_is_the_same_to_the_bit(
    name: str, configure: Callable[..., TandemConfig], ranks: Ranks, tmp_path: Path
) -> None:
    make(name, seed=1).save_pretrained(tmp_path / "model")
    config = configure(tmp_path / "model")
    task, metrics, ran = trained(ranks, config)
    alone, expected, ran_alone = trained(ranks, config, shares=False)
    assert metrics == expected
    assert equal(task, alone)
    layers = len(decoder_layers(task.policy.model.lm)) - 1
    assert task.trunk.layers == {"reference": layers, "value": layers}
    # An update has two minibatches of one microbatch. Alone: each network twice, then policy and value model where no graph
    # was kept, in the first epoch's second step and the second epoch's two. Shared: twice, and in two of the three (what is
    # shared is kept where a graph was).
    assert (ran_alone, ran) == (UPDATES * (3 * 2 + 2 * 3), UPDATES * (2 + 2))


@pytest.mark.parametrize("held", [0, 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_that_are_not_kept(
    held: int, dtype: str, configure: Callable[..., TandemConfig], ranks: Ranks, small_vocab: Path
) -> None:
    config = configure(small_vocab, dtype=dtype, held=held)
    task, metrics, ran = trained(ranks, config)
    alone, expected, ran_alone = trained(ranks, config, shares=False)
    assert metrics == expected
    assert equal(task, alone)
    assert ran < ran_alone


def test_recomputed_layers_and_a_text_loss_change_nothing(
    configure: Callable[..., TandemConfig], ranks: Ranks, small_vocab: Path
) -> None:
    config = configure(small_vocab)
    config.learner.gradient_checkpointing = True
    task, metrics, _ = trained(ranks, config)
    alone, expected, _ = trained(ranks, config, shares=False)
    assert max(task.trunk.layers.values()) > 0
    assert metrics == expected
    assert equal(task, alone)


def test_a_value_model_shares_what_it_has(
    configure: Callable[..., TandemConfig], ranks: Ranks, small_vocab: Path, tmp_path: Path
) -> None:
    """A reward model of other weights in a layer shares those below it; of other embeddings, none."""
    path = tmp_path / "policy"
    settings = AutoConfig.from_pretrained(small_vocab, num_hidden_layers=(count := 4))
    AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)

    def saved(name: str, parameter: torch.Tensor) -> Path:
        parameter.data[0] += 0.5
        model.config.score_mean, model.config.score_std = 0.0, 1.0
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    config = configure(path)
    second = saved("second", next(decoder_layers(model)[1].parameters()))
    embeddings = saved("embeddings", model.get_input_embeddings().weight)
    for value, layers in ((second, 1), (embeddings, 0)):
        task, metrics, _ = trained(ranks, config, value)
        alone, expected, _ = trained(ranks, config, value, shares=False)
        assert task.trunk.layers == {"reference": count - 1, "value": layers}
        assert metrics == expected
        assert equal(task, alone)


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}]
)
def test_the_same_weights_in_other_settings_are_other_layers(
    change: dict[str, Any], configure: Callable[..., TandemConfig], ranks: Ranks, small_vocab: Path, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(small_vocab, num_labels=1, dtype=torch.float32)
    model.config.score_mean, model.config.score_std = 0.0, 1.0
    model.save_pretrained(tmp_path / "value")
    settings = json.loads((tmp_path / "value/config.json").read_text())
    assert settings.keys() >= change.keys()
    (tmp_path / "value/config.json").write_text(json.dumps(settings | change))
    task = PPOTask(ranks, configure(small_vocab), str(small_vocab), str(tmp_path / "value"), (2,), [])
    assert task.trunk.layers == {"reference": _layers(small_vocab) - 1, "value": 0}


def test_adapters_on_the_top_layers(configure: Callable[..., TandemConfig], ranks: Ranks, small_vocab: Path) -> None:
    config = configure(small_vocab)
    config.model.lora = LoraConfig(rank=2, alpha=4)
    task, metrics, ran = trained(ranks, config)
    alone, expected, ran_alone = trained(ranks, config, shares=False)
    count = len(decoder_layers(task.policy.model.lm))
    assert task.trunk.layers == {"reference": count - 1, "value": count - 1}
    assert metrics == expected
    assert equal(task, alone)
    assert ran < ran_alone


@pytest.mark.parametrize("trainable", [None, 100])
def test_where_every_layer_trains_nothing_is_shared(
    trainable: int | None, configure: Callable[..., TandemConfig], ranks: Ranks, small_vocab: Path
) -> None:
    config = configure(small_vocab, trainable)
    if trainable:
        config.ppo.trainable_layers = config.ppo.value_trainable_layers = trainable = _layers(small_vocab)
    task, _, _ = trained(ranks, config)
    assert task.trunk.layers == {"reference": 0, "value": 0}


def _layers(path: Path) -> int:
    return AutoConfig.from_pretrained(path).num_hidden_layers


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharded_optimizers(
    stage: int, configure: Callable[..., TandemConfig], ranks: Ranks, small_vocab: Path
) -> None:
    """Sharded weights (3) are gathered in the order of whole passes, so that nothing is shared."""
    config = configure(small_vocab, dtype="bfloat16")
    config.learner.zero_stage = stage
    task, metrics, _ = trained(ranks, config)
    alone, expected, _ = trained(ranks, config, shares=False)
    assert any(task.trunk.layers.values()) == (stage < 3)
    assert metrics == expected
    assert equal(task, alone)


def test_layers_that_tell_each_other_more_share_nothing(
    configure: Callable[..., TandemConfig], ranks: Ranks, small_vocab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As value residuals do: the last layer adds what the first one saw of the same rows."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    seen: dict[int, torch.Tensor] = {}
    forward = LlamaDecoderLayer.forward

    def telling(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        index = self.self_attn.layer_idx
        if index == 0:
            seen[0] = hidden_states
        out = forward(self, hidden_states, *args, **kwargs)
        return out + seen[0] if index == _layers(small_vocab) - 1 else out

    config = configure(small_vocab)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", telling)
    task, metrics, _ = trained(ranks, config)
    alone, expected, _ = trained(ranks, config, shares=False)
    assert task.trunk.layers == {"reference": 0, "value": 0}
    assert metrics == expected
    assert equal(task, alone)
