"""What holds models that only compute: vLLM in an actor, and the replicas of the reward service."""

from dataclasses import replace
from typing import Any

import torch

from common.models.adapters import split
from contracts.config import ModelConfig, TandemConfig
from contracts.lora_roles import role_model
from controller.plan.activations import pass_memory
from controller.plan.learner_memory import Network, mapped_file, network_shapes, served_policy, sizes
from controller.plan.memory_items import GIB, Item, shown
from controller.start_checks.kv_cache import kv_bytes_a_token

CPU_BATCH_TOKENS = 4096  # of a step of an engine on CPU at least: actors/vllm_engine.py
SAMPLER_COPIES = 3  # of the logits of a step, float32: scaled, sorted or normalised, probabilities


def actor_items(config: TandemConfig, gpu_gib: float) -> list[Item]:
    """One actor's, beside its libraries and its share of the transfer's buffer.

    Args:
        gpu_gib: memory of a GPU.
    """
    engine, on_gpu = config.engine, config.cluster.gpus_per_actor > 0
    shapes = network_shapes(config, served_policy(config))
    model: Any = shapes.lm
    size, found = getattr(torch, config.model.dtype).itemsize, sizes(shapes)
    a_token = kv_bytes_a_token(model.config, size)
    devices = engine.tensor_parallel_size if on_gpu else 1
    over = f" over {devices} GPUs" if devices > 1 else ""
    weights = found.total * size
    items = [Item("weights", weights, f"{found.total / 1e6:.1f}M, {size} bytes each{over}", on_gpu)]
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if head is embeddings and not on_gpu:
        packed = embeddings.numel() * size
        items.append(Item("packed LM head", packed, "vLLM on CPU keeps a copy of a tied head for its kernel"))
    vocabulary = embeddings.shape[0]
    tokens = max(CPU_BATCH_TOKENS, engine.max_model_len)
    workspace = pass_memory(
        shapes, (engine.max_model_len,) * max(1, tokens // engine.max_model_len), engine.max_num_seqs
    )
    logits = engine.max_num_seqs * vocabulary * 4
    how = (
        f"activations of a step of {tokens} tokens {shown(workspace.inference)}, and {SAMPLER_COPIES} x "
        f"engine.max_num_seqs {engine.max_num_seqs} x {vocabulary} float32 logits"
    )
    if on_gpu:
        whole = engine.gpu_memory_utilization * gpu_gib * GIB * devices
        rest = whole - weights - workspace.inference - SAMPLER_COPIES * logits
        items.append(Item("engine workspace", workspace.inference + SAMPLER_COPIES * logits, how, True))
        how = (
            f"the rest of engine.gpu_memory_utilization {engine.gpu_memory_utilization:g} x {gpu_gib:g} GiB{over}: "
            f"{max(0, int(rest / a_token))} tokens of {a_token} bytes"
        )
        items.append(Item("KV cache", max(0.0, rest), how, True))
        return [*items, Item("weights, while they load", weights / devices, "through the host's memory", least=0.0)]
    cache = engine.kv_cache_gib * GIB
    needed = engine.max_num_seqs * engine.max_model_len
    cached = (
        f"engine.kv_cache_gib: {int(cache / a_token)} tokens of {a_token} bytes; engine.max_num_seqs x "
        f"engine.max_model_len are {needed}"
    )
    items.append(Item("KV cache", cache, cached))
    return [*items, Item("engine workspace", workspace.inference + SAMPLER_COPIES * logits, how, least=0.0)]


def replica_items(config: TandemConfig, judge: Network) -> list[Item]:
    """One replica of a reward model, beside its libraries."""
    service, on_gpu, path = config.reward_service, config.cluster.gpus_per_reward_replica > 0, judge.path
    model = ModelConfig(path=path, dtype=service.dtype)
    shapes = network_shapes(config, judge, model)
    size, total = getattr(torch, service.dtype).itemsize, sizes(shapes).total
    length = min(service.max_tokens, service.batch_tokens)
    batch = pass_memory(shapes, (length,) * max(1, service.batch_tokens // length), 1)
    made_by = role_model(config.model, "reward_model").at(path)
    is_merged = split(path)[1] or (judge.made and made_by.lora)  # and so not in the file any more
    file = None if on_gpu or is_merged else mapped_file(judge, replace(made_by, lora=None), service.dtype)
    how = f"{total / 1e6:.1f}M, {size} bytes each{', in the file' if file else ''}"
    weights = Item("weights", total * size, how, on_gpu, file or "")
    how = f"a batch of reward_service.batch_tokens {service.batch_tokens}"
    return [weights, Item("activations", batch.inference, how, on_gpu, least=0.0)]
