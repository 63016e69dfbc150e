"""The study of docs/study.md: five reasons for reinforcement learning after supervised learning, as experiments.

conf/experiment/five_reasons.yaml ── train.py -m ──> runs/five_reasons/<member>/    arms x seeds
preregistration.yaml ── hashed when the sweep starts ──> runs/five_reasons/registration.json
study.json of an earlier study ── power ──> seeds and prompts of the next: preregistration_2.yaml
what is missing of a study ── run_missing ──> members, in pieces ── kept ──> docs/results/STUDY/members
members ── collect ──> scores by arm, seed and prompt ── contrasts ──> verdicts ── report ──> study.html, study.json
SFT and reward models of a member ── negation ──> runs/five_reasons/negation.json
"""
