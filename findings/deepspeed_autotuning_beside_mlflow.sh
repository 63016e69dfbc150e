#!/usr/bin/env bash
# DeepSpeed 0.19.8 where MLflow 3.17.2 is installed: every `import deepspeed` imports MLflow, and autotuning ends at once.
#
# - `import deepspeed` imports its autotuner, and that imports MLflow where there is one, whether or not anything is tuned or
#   tracked: hundreds of modules and seconds of CPU time more in every rank of every job. (With only the skinny package and no
#   pandas or FastAPI beside it it is less; here they are installed, as next to a serving engine.)
# - `deepspeed --autotuning tune` then ends before its first experiment with KeyError: 'MLFLOW_RUN_ID', a variable that only a
#   process below an MLflow run has. No option turns that off. Without MLflow in the environment the same command tunes.
#
# So a tracker that is installed for something else decides whether the tuner works, and what every rank imports.
#
# Needs python3.11 and network for pip; takes 4 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH DS_ACCELERATOR=cpu
unset MLFLOW_RUN_ID
pip install --quiet torch==2.13.0 numpy==2.3.5 setuptools wheel
pip install --quiet --no-build-isolation deepspeed==0.19.8 tabulate==0.9.0 mlflow-skinny==3.17.2 pandas==3.1.1 fastapi==0.136.3
cd "$folder"

cat >import.py <<'PYTHON'
import resource
import sys

if "hidden" in sys.argv:
    sys.modules["mlflow"] = None
import deepspeed

time = resource.getrusage(resource.RUSAGE_SELF)
is_there = sys.modules.get("mlflow") is not None
print(f"deepspeed {deepspeed.__version__}, MLflow imported: {is_there}, {len(sys.modules)} modules, "
      f"{time.ru_utime + time.ru_stime:.1f} s of CPU time")
PYTHON
python import.py 2>/dev/null | tail -1 | tee with.txt
python import.py hidden 2>/dev/null | tail -1 | tee hidden.txt
grep -q "deepspeed 0.19.8, MLflow imported: True" with.txt
grep -q "MLflow imported: False" hidden.txt

cat >train.py <<'PYTHON'
import argparse

import deepspeed
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
known = deepspeed.add_config_arguments(parser).parse_args()
model = torch.nn.Linear(8, 8)
engine, *_ = deepspeed.initialize(args=known, model=model, model_parameters=model.parameters())
for _ in range(4):
    loss = engine(torch.ones(1, 8)).square().mean()
    engine.backward(loss)
    engine.step()
PYTHON
cat >settings.json <<'JSON'
{"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.001}}, "autotuning": {"enabled": true}}
JSON
# A minute of it: what counts is whether an experiment was started.
tune() {
    rm -rf autotuning_*
    timeout 60 deepspeed --autotuning tune --num_gpus 1 train.py --deepspeed_config settings.json 2>&1 || true
    find autotuning_results -name cmd.txt | sed 's/^/started: /'
}
echo "with MLflow:"
tune >with.txt
grep -E "Running autotuning|KeyError|started" with.txt | sed 's/^/    /'
grep -q "KeyError: 'MLFLOW_RUN_ID'" with.txt
! grep -q "started: " with.txt
pip uninstall --quiet --yes mlflow-skinny
echo "without:"
tune >without.txt
grep -E "Running autotuning|KeyError|started" without.txt | sed 's/^/    /'
! grep -q "KeyError" without.txt
grep -q "started: " without.txt
