"""One GRPO update of Tandem against one of TRL's GRPOTrainer, paired as in `ppo_step.py`, whose options it has.

Groups of eight completions, a reference model, and the KL penalty k3 with a coefficient of 0.05; no value model.
"""

import sys

from ppo_step import HERE, Comparison, main

GRPO = Comparison(
    name="grpo_step",
    trl_pin="trl==1.16.0",
    trl_venv=HERE / ".trl-grpo-venv",
    trl_block="trl_grpo_step.py",
    estimator="grpo",
    samples=8,
)

if __name__ == "__main__":
    sys.exit(main(GRPO, __doc__))
