"""Adapters through the whole road with the real engines: SFT, reward model, PPO and evaluation on one base; a run that is
stopped and resumed is the run that was never stopped. `test_lora_models.py` has a rank that is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from common.processes.process_env import worker_env
from controller.commits import commit_store, export
from tests.conftest import VADER
from tests.integration.test_resume import UPDATES, Run

LORA = (
    "stage=pipeline",
    "model.lora={rank:4,alpha:8}",
    "model.lora_by_role={value_model:{rank:2},reward_model:{rank:2}}",
    "sft_model=null",
    "proxy_model=null",
    *(f"data.{part}.path={VADER}/{file}.jsonl" for part, file in (("preferences", "proxy"), ("test", "test"))),
    f"data.eval_prompts.path={VADER}/test.jsonl",
    "sft.optimizer.learning_rate=3e-2",
    "reward_model.trainable_layers=null",
    "reward_model.optimizer.learning_rate=5e-3",
    "ppo.optimizer.learning_rate=3e-2",
    "evaluate.sampling.max_completion_tokens=12",
    "evaluate.prompts=6",
    "evaluate.bootstrap_samples=100",
)
RANKS = {"sft": 4, "reward_model": 2, "ppo": 4}  # by stage


class AdapterRun(Run):
    @property
    def model(self) -> bytes:
        [file] = (self.folder / "cache/stages").glob("ppo-*/model/adapter_model.safetensors")
        return file.read_bytes()


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> AdapterRun:
    run = AdapterRun(tmp_path_factory.mktemp("adapters") / "unbroken", tiny_model, tiny_model, *LORA)
    assert run.finish() == 0, run.printed[-4000:]
    return run


def test_adapters_from_sft_to_evaluation(unbroken: AdapterRun, tiny_model: Path, tmp_path: Path) -> None:
    rows = [row for row in unbroken.metrics if row["stage"] == "ppo"]
    assert [row["progress/version"] for row in rows] == list(range(1, UPDATES))
    assert rows[0]["kl/ref_seq"] == 0.0  # the reference is SFT's adapter
    # The engine samples from what the learner has learnt: in the last bits of bfloat16 they differ, not by what was learnt.
    assert max(abs(row["kl/ref_seq"]) for row in rows) > 0.1
    assert max(row["kl/mismatch_k3"] for row in rows) < 1e-3
    assert set(json.loads((unbroken.dir / "evaluation.json").read_text())["models"]) == {"base", "sft", "ppo"}

    made = (unbroken.folder / "cache/stages").glob("*/model/adapter_config.json")
    assert {file.parts[-3].split("-")[0]: json.loads(file.read_text())["r"] for file in made} == RANKS

    # The base is nowhere but where it was: weights are bfloat16 there, masters and moments 12 bytes for each that trains.
    base = (tiny_model / "model.safetensors").stat().st_size
    commit = commit_store.verified(unbroken.dir, UPDATES).path
    weights = [*commit.rglob("*.safetensors"), *(unbroken.folder / "cache/stages").rglob("*.safetensors")]
    assert len(weights) >= 5
    assert max(file.stat().st_size for file in weights) < 0.1 * base
    assert size(commit) - size_of_tokenizer(commit) < 0.03 * (2 * 12 + 2) * base / 2
    assert export.main([str(unbroken.dir), str(tmp_path / "out"), "--merged"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with safe_open(tiny_model / "model.safetensors", "pt") as plain:
        name = "model.layers.1.mlp.up_proj.weight"
        change = (merged.state_dict()[name].float() - plain.get_tensor(name).float()).abs().max()
    assert change > 1e-3


def size_of_tokenizer(commit: Path) -> int:
    return sum(file.stat().st_size for file in (commit / "policy").glob("tokenizer*"))


# Log-probabilities of a prompt's tokens, by vLLM as anybody uses it.
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

model, adapter, ids = *sys.argv[1:3], json.loads(sys.argv[3])
options = {"enable_lora": True, "max_lora_rank": 8} if adapter else {}
llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2, **options)
request = LoRARequest("ours", 1, adapter) if adapter else None
sampling = SamplingParams(max_tokens=1, prompt_logprobs=1)
[found] = llm.generate([{"prompt_token_ids": ids}], sampling, lora_request=request, use_tqdm=False)
print(json.dumps([row[token].logprob for row, token in zip(found.prompt_logprobs[1:], ids[1:])]))
"""
IDS = [*range(300, 324)]


def vllm_logprobs(model: Path, adapter: Path | str = "") -> torch.Tensor:
    env = {**os.environ, **worker_env(1, on_cpu=True), "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-c", VLLM, str(model), str(adapter), json.dumps(IDS)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.tensor(json.loads(done.stdout.strip().split("\n")[-1]))


def logprobs(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        rows = lm(torch.tensor([IDS])).logits[0, :-1].float().log_softmax(-1)
    return rows.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


@pytest.mark.full
def test_exports_load_in_vllm_peft_and_transformers(unbroken: AdapterRun, tiny_model: Path, tmp_path: Path) -> None:
    adapter, whole = tmp_path / "adapter", tmp_path / "whole"
    assert export.main([str(unbroken.dir), str(adapter)]) == 0
    assert export.main([str(unbroken.dir), str(whole), "--merged"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = logprobs(base)
    expected = logprobs(peft.PeftModel.from_pretrained(base, str(adapter)))
    assert (expected - before).abs().max() > 0.1  # it has learnt something
    torch.testing.assert_close(vllm_logprobs(tiny_model, adapter), expected, atol=1e-3, rtol=0)
    merged = logprobs(AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32))
    torch.testing.assert_close(merged, expected, atol=0.1, rtol=0)  # rounded to the base's bfloat16
    torch.testing.assert_close(vllm_logprobs(whole), merged, atol=1e-3, rtol=0)


@pytest.mark.full
def test_stopped_and_resumed(unbroken: AdapterRun, tiny_model: Path, tmp_path: Path) -> None:
    stopped = AdapterRun(tmp_path, tiny_model, tiny_model, *LORA)
    for model in (unbroken.folder / "cache/stages").glob("[!p]*/model"):
        shutil.copytree(model.parent, stopped.folder / "cache/stages" / model.parent.name)
    stopped.stop_after(2)
    assert stopped.finish() == 0, stopped.printed[-4000:]
    expected = [row for row in unbroken.metrics if row["stage"] == "ppo"]
    assert [row for row in stopped.metrics if row["stage"] == "ppo"] == expected
    assert stopped.model == unbroken.model
