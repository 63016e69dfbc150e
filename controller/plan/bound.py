"""More than a stage can need on CPUs, from the sizes of files and a few numbers of config.json: most jobs fit by far, and
`plan.py`, whose passes take seconds, need not be asked."""

from math import inf
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME, cached_file

from common.models.adapters import split
from common.text.tokenizers import load_config
from contracts.config import TandemConfig
from contracts.placement import actors_that_fit, replicas_that_fit
from contracts.stages import Stage
from controller.plan.engine_memory import CPU_BATCH_TOKENS, SAMPLER_COPIES
from controller.plan.learner_memory import (
    Network,
    held_tokens,
    model_of,
    most_compiled,
    served_policy,
    stage_networks,
    zero_pieces,
)
from controller.plan.measured import measured
from controller.plan.memory_items import GIB, MIB
from controller.plan.plan import Data, judges_placed, stage_lengths

# Numbers that a layer keeps of each token: of the width, and of the width within its MLP; and of the head's vocabulary.
WIDTHS, MLP_WIDTHS, LOGITS = 12, 3, 2
ADAPTERS = 4  # A and B of a square matrix of width h have 2 rank / h of its weights
COUNTED = ("learner rank", "actor", "reward replica")  # processes of these roles, by the configuration
STATE = 24  # bytes a weight that trains, beside itself: master, moments, gradients twice, and their conversion


def most(config: TandemConfig, stage: Stage, data: Data) -> float:
    """Bytes of all processes of a stage in the memory of their hosts. Infinite where nothing is known of a model."""
    try:
        return _most(config, stage, data)
    except AttributeError:  # a configuration without these numbers
        return inf


def _most(config: TandemConfig, stage: Stage, data: Data) -> float:
    cluster, engine, known = config.cluster, config.engine, measured()
    others = (mib for role, mib in known["private"].items() if role not in COUNTED)
    total = (sum(others) + sum(group["mib"] for group in known["libraries"].values())) * MIB
    if stage.trains:
        ranks = cluster.num_learner_ranks
        is_elsewhere = cluster.gpus_per_learner_rank and config.learner.offload == "none"
        rank = 0.0 if is_elsewhere else _rank(config, stage, data)
        total += ranks * (rank + known["private"]["learner rank"] * MIB)
    if stage.samples:
        policy = served_policy(config)
        weights = _weights(config, policy)
        actor = weights
        if not cluster.gpus_per_actor:
            actor += weights + engine.kv_cache_gib * GIB + _workspace(config, policy)
        total += weights + actors_that_fit(cluster) * (actor + known["private"]["actor"] * MIB)
        for judge in judges_placed(config):
            replica = _replica(config, judge.path) if judge and not cluster.gpus_per_reward_replica else 0.0
            total += replicas_that_fit(config) * (replica + known["private"]["reward replica"] * MIB)
    return total


def _rank(config: TandemConfig, stage: Stage, data: Data) -> float:
    """Of one rank: all of its networks, the bucket that ZeRO reduces in and the weights that it gathers, and its passes."""
    lengths, selected = stage_lengths(config, stage, data)
    size = getattr(torch, config.model.dtype).itemsize
    tokens = sum(lengths.largest)
    held = tokens + held_tokens(config, stage.name, lengths)
    state = size * sum(zero_pieces(config.learner)) if config.learner.zero_stage else 0.0
    passes = 0.0
    for network in stage_networks(config, stage.name):
        weights, text = _weights(config, network), _text(config, network)
        lora = model_of(config, network).lora
        trained = _layers(network, text)
        head = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
        part = min(1.0, ADAPTERS * lora.rank / text.hidden_size) if lora else trained / text.num_hidden_layers
        state += weights + STATE * network.trains * min(part * weights / size + head, weights / size)
        width = (2 if lora else 1) * _width(text) + text.num_attention_heads * max(lengths.largest)
        logits = 0 if network.is_scalar else LOGITS * selected * text.vocab_size * held / tokens
        passes += network.trains * size * (held * width * (trained + 1) + logits)
    return state + (1 + measured()["slack"]) * passes + most_compiled()


def _replica(config: TandemConfig, path: str) -> float:
    network = Network("", path, is_scalar=True)
    return 2 * _weights(config, network) + 4 * 2 * config.reward_service.batch_tokens * _width(_text(config, network))


def _layers(network: Network, text: Any) -> int:
    """How many train."""
    return text.num_hidden_layers if network.trainable_layers is None else network.trainable_layers


def _width(text: Any) -> int:
    """Numbers that a layer keeps of a token."""
    experts = getattr(text, "num_experts_per_tok", None) or 1
    mlp = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return WIDTHS * text.hidden_size + MLP_WIDTHS * mlp * experts


def _text(config: TandemConfig, network: Network) -> Any:
    return load_config(network.path, model_of(config, network)).get_text_config()


def _workspace(config: TandemConfig, policy: Network) -> float:
    text, tokens = _text(config, policy), max(CPU_BATCH_TOKENS, config.engine.max_model_len)
    logits = SAMPLER_COPIES * config.engine.max_num_seqs * text.vocab_size
    return 4 * (logits + 2 * tokens * _width(text))


def _weights(config: TandemConfig, network: Network) -> float:
    """Bytes in the run's number format, from the checkpoint's files."""
    model = model_of(config, network)
    found = load_config(network.path, model)
    file = cached_file(split(network.path)[0], CONFIG_NAME, revision=model.revision)
    folder = Path(str(file)).parent
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    each = getattr(torch, str(getattr(found, "dtype", None)).removeprefix("torch."), torch.int8).itemsize
    return stored / each * getattr(torch, config.model.dtype).itemsize if stored else inf
