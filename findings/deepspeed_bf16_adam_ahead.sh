#!/usr/bin/env bash
# DeepSpeed 0.19.8 in bfloat16 without ZeRO: Adam has taken a step before training begins, and weight decay has acted once.
#
# - With `bf16: {enabled: true}` and `zero_optimization: {stage: 0}` a client's Adam is wrapped in FP16_UnfusedOptimizer, whose
#   constructor calls `step()` on gradients of zero to have its state allocated. The moments stay zero, but the counter that
#   corrects their bias is 1, so that training step t is corrected as step t + 1. With betas (0.9, 0.95) and a gradient that
#   does not change the first updates are 0.735, 0.848, 0.899 of the learning rate instead of 1.
# - With weight decay the float32 masters have shrunk by rate x decay before the first batch, at the full rate: no warm-up
#   has begun.
# - float32, and ZeRO 1, 2 and 3 in bfloat16, take no such step. So `stage: 0` and `stage: 2` train the same model differently
#   for some ten steps, without a word, and a comparison against plain PyTorch in float32 passes.
#
# Needs python3.11 and network for pip; takes 2 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH DS_ACCELERATOR=cpu MASTER_ADDR=127.0.0.1 MASTER_PORT=29571 RANK=0 WORLD_SIZE=1 LOCAL_RANK=0
pip install --quiet torch==2.13.0 numpy==2.3.5 setuptools wheel
pip install --quiet --no-build-isolation deepspeed==0.19.8
cd "$folder"

cat >steps.py <<'PYTHON'
import sys

import deepspeed
import torch

RATE, DECAY = 1e-2, 0.5
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone: nothing is compiled
deepspeed.init_distributed("gloo", verbose=False)


def train(dtype: torch.dtype, stage: int, decay: float) -> tuple[list[float], float]:
    """How far each of three steps moves a weight, in learning rates; and the master's value before the first."""
    model = torch.nn.Linear(1, 1, bias=False).to(dtype)
    torch.nn.init.constant_(model.weight, 1.0)
    adam = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=decay, eps=1e-12)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), optimizer=adam,
        config={"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype == torch.bfloat16},
                "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False})

    def master() -> float:
        return float(adam.param_groups[0]["params"][0].detach().float().reshape(-1)[0])

    before = [master()]
    for _ in range(3):
        engine.backward(engine(torch.ones(1, 1, dtype=dtype)).sum())  # a gradient of 1, always
        engine.step()
        before.append(master())
    return [(a - b) / RATE for a, b in zip(before, before[1:])], before[0]


for dtype, stage in ((torch.float32, 0), (torch.bfloat16, 2), (torch.bfloat16, 0)):
    moves, _ = train(dtype, stage, 0.0)
    _, start = train(dtype, stage, DECAY)
    print(f"{str(dtype)[6:]}, stage {stage}: steps of {', '.join(f'{move:.3f}' for move in moves)} learning rates; "
          f"a weight of 1 begins as {start:.4f} with decay")
print("deepspeed", deepspeed.__version__, "torch", torch.__version__, file=sys.stderr)
PYTHON
python steps.py 2>versions.txt | grep " stage " | tee found.txt
grep -q "deepspeed 0.19.8 torch 2.13.0" versions.txt
grep -q "float32, stage 0: steps of 1.000, 1.000, 1.000 learning rates; a weight of 1 begins as 1.0000" found.txt
grep -q "bfloat16, stage 2: steps of 1.000, 1.000, 1.000 learning rates; a weight of 1 begins as 1.0000" found.txt
grep -q "bfloat16, stage 0: steps of 0.735, 0.848, 0.899 learning rates; a weight of 1 begins as 0.9950" found.txt
