"""Objectives by hand and against plain loops in float64; what their keys may hold together."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.checks.check import key_checks
from contracts.checks.estimator_checks import estimator_checks
from contracts.config import OverlongConfig, PPOConfig, TandemConfig
from contracts.objectives import Clip, chosen_clip, find_objective, objective_names
from tests.conftest import ROOT

quick = settings(max_examples=40, deadline=None)
NAN = math.nan


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor([[math.log(ratio) for ratio in ratios]], requires_grad=True)


def test_the_bounds_of_a_configuration() -> None:
    assert chosen_clip(PPOConfig()) == (0.2, 0.2, 3.0)
    assert chosen_clip(PPOConfig(clip=0.1, clip_high=0.28, dual_clip=None)) == (0.1, 0.28, None)
    assert chosen_clip(PPOConfig(clip_low=0.3)) == (0.3, 0.2, 3.0)
    assert chosen_clip(PPOConfig(objective="gspo")) == (3e-4, 4e-4, 3.0)
    assert chosen_clip(PPOConfig(objective="gspo", clip_high=1e-3)) == (3e-4, 1e-3, 3.0)
    assert chosen_clip(PPOConfig(objective="cispo", clip=0.3)) == (1.0, 0.3, 3.0)


def loss_of(name: str, policy: torch.Tensor, advantages: list[float], clip: Clip, weights: list[float] | None = None):
    mask = torch.ones_like(policy).bool()
    w = torch.ones_like(policy) if weights is None else torch.tensor([weights])
    loss, stats = find_objective(name).loss(
        policy, torch.zeros_like(policy), torch.tensor([advantages]), mask, clip, w.detach()
    )
    loss.backward()
    return loss.item(), policy.grad, stats


def test_the_asymmetric_clip_by_hand() -> None:
    # Bounds 0.8 and 1.28.
    # rho 1.25, A  2: within: -2.5, gradient -2.5 (0.2 above would have clipped it)
    # rho 1.5,  A  2: max(-3, -2.56) = -2.56, clipped
    # rho 0.5,  A -1: max(0.5, 0.8) = 0.8, clipped
    # rho 0.75, A  1: max(-0.75, -0.8) = -0.75, gradient -0.75
    found, gradient, stats = loss_of("clip", logs(1.25, 1.5, 0.5, 0.75), [2.0, 2.0, -1.0, 1.0], Clip(0.2, 0.28, 3.0))
    assert found == pytest.approx(-2.5 - 2.56 + 0.8 - 0.75, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[-2.5, 0.0, 0.0, -0.75]]))
    assert stats["clipped"].item() == 2


def test_gspo_by_hand() -> None:
    # log ratios log 2 and log 0.5 + log 1.1: the geometric mean of 2 and 0.55 is sqrt(1.1) = 1.048809. A is 2, within 0.1:
    # the surrogate is -2 * 1.048809 for each of two tokens, and so is the gradient of each token's log p.
    found, gradient, _ = loss_of("gspo", logs(2.0, 0.55), [2.0, 2.0], Clip(0.1, 0.1, 3.0))
    assert found == pytest.approx(-4 * math.sqrt(1.1), abs=1e-5)
    torch.testing.assert_close(gradient, torch.full((1, 2), -2 * math.sqrt(1.1)))
    # At 0.04 the whole sequence is clipped, though the second token's own ratio is far below: no gradient at all.
    found, gradient, stats = loss_of("gspo", logs(2.0, 0.55), [2.0, 2.0], Clip(0.04, 0.04, 3.0))
    assert found == pytest.approx(-4 * 1.04, abs=1e-5)
    assert not gradient.any()
    # ratios and KL stay those of tokens: (2 + 0.55), 2, and 0.55 - log 1.1
    assert stats["clipped"].item() == 2
    assert stats["ratio"].item() == pytest.approx(2.55, abs=1e-5)
    assert stats["approx_kl"].item() == pytest.approx(0.55 - math.log(1.1), abs=1e-5)


def test_gspo_knows_what_trains() -> None:
    """An observation between two turns and what lies behind the end are no part of the sequence's mean."""
    policy = torch.tensor([[math.log(1.21), NAN, 0.0, NAN], [NAN, 0.0, NAN, NAN]], requires_grad=True)
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    advantages = torch.tensor([[1.0, NAN, 1.0, NAN], [NAN, 5.0, NAN, NAN]])
    args = (policy, torch.zeros_like(policy), advantages, mask, Clip(0.2, 0.2, None), torch.ones_like(policy))
    loss, _ = find_objective("gspo").loss(*args)
    # sqrt(1.21 * 1) = 1.1 for both tokens of the first row, 1 of the second
    assert loss.item() == pytest.approx(-2.2 - 5.0, abs=1e-5)
    loss.backward()
    expected = torch.tensor([[-1.1, 0.0, -1.1, 0.0], [0.0, -5.0, 0.0, 0.0]])
    torch.testing.assert_close(policy.grad, expected)


def test_cispo_by_hand() -> None:
    # log p is that of the policy: log 1.5, log 0.5, log 1.1; the old one is 0. Weights min(rho, 1.2), without a bound below.
    # -(1.2 * 2 * log 1.5 + 0.5 * -1 * log 0.5 + 1.1 * 3 * log 1.1); the gradients are the weights times -A.
    found, gradient, stats = loss_of("cispo", logs(1.5, 0.5, 1.1), [2.0, -1.0, 3.0], Clip(1.0, 0.2, 3.0))
    assert found == pytest.approx(-(2.4 * math.log(1.5) - 0.5 * math.log(0.5) + 3.3 * math.log(1.1)), abs=1e-5)
    torch.testing.assert_close(gradient, torch.tensor([[-2.4, 0.5, -3.3]]))
    assert stats["clipped"].item() == 1
    # and with one below, and weights of an older policy's tokens
    _, gradient, stats = loss_of("cispo", logs(1.5, 0.5, 1.1), [2.0, -1.0, 3.0], Clip(0.1, 0.2, 3.0), [0.5, 2.0, 0.0])
    torch.testing.assert_close(gradient, torch.tensor([[-1.2, 1.8, 0.0]]))
    assert stats["clipped"].item() == 2


rows = st.lists(
    st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.floats(-3, 3), st.booleans()), min_size=4, max_size=4),
    min_size=1,
    max_size=4,
)


@quick
@given(
    rows=rows,
    low=st.floats(0.01, 0.9),
    high=st.floats(0.01, 3),
    dual=st.sampled_from([None, 1.5]),
    alike=st.booleans(),
)
def test_objectives_against_loops(rows: list, low: float, high: float, dual: float | None, alike: bool) -> None:
    """Value and gradient, in float64 by autograd of the formula; `alike`: one advantage for a row, where GSPO is its own."""
    columns = [torch.tensor([[token[k] for token in row] for row in rows]) for k in range(4)]
    policy, proximal, advantages, mask = columns
    if alike:
        advantages = advantages[:, :1].expand_as(advantages)
    for name in objective_names():
        mine = policy.clone().requires_grad_()
        ones = torch.ones_like(policy)
        loss, _ = find_objective(name).loss(mine, proximal, advantages, mask, Clip(low, high, dual), ones)
        theirs = policy.double().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for i, row in enumerate(rows):
            there = [t for t in range(4) if row[t][3]]
            steps = {t: theirs[i, t] - proximal[i, t].double() for t in there}
            for t in there:
                a, rho = advantages[i, t].double(), steps[t].exp()
                if name == "gspo":
                    if not alike:  # as GSPO-token: the value of the mean, the gradient of the token
                        mean = sum(step.detach() for step in steps.values()) / len(steps)
                        rho = mean.exp() * (theirs[i, t] - theirs[i, t].detach()).exp()
                    else:
                        rho = (sum(steps.values()) / len(steps)).exp()
                if name == "cispo":
                    total = total - rho.detach().clamp(1 - low, 1 + high) * a * theirs[i, t]
                    continue
                one = torch.maximum(-a * rho, -a * rho.clamp(1 - low, 1 + high))
                total = total + (torch.minimum(one, -a * dual) if dual and a < 0 else one)
        assert loss.item() == pytest.approx(total.item(), rel=1e-4, abs=1e-4)
        loss.backward()
        total.backward() if total.requires_grad else None
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        # At a bound or where two terms meet, either side's gradient is one.
        if not near_a_corner(policy, proximal, advantages, mask, low, high, dual):
            torch.testing.assert_close(mine.grad.double(), expected, rtol=1e-3, atol=1e-3)


def near_a_corner(policy, proximal, advantages, mask, low, high, dual) -> bool:
    difference = torch.where(mask, policy.double() - proximal.double(), 0.0)
    mean = difference.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratios = torch.cat([difference, mean], dim=1).exp()
    corners = [1 - low, 1 + high, *([dual] if dual else [])]
    return any((ratios - corner).abs().min() < 1e-4 for corner in corners) or bool((advantages.abs() < 1e-4).any())


def refused(ppo: PPOConfig) -> list[str]:
    checks = [*estimator_checks(ppo), *(c for c in key_checks(TandemConfig(ppo=ppo)) if c.key.startswith("ppo."))]
    return [check.message for check in checks if not check.holds]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"objective": "gspoo"},
            "ppo.objective must be one of cispo, clip, gspo; found gspoo; write gspo",
        ),
        (
            {"clip_low": 1.0},
            "ppo.clip_low must be null or in (0, 1); found 1.0; write for example null (the default)",
        ),
        (
            {"clip_high": 0.0},
            "ppo.clip_high must be null or above 0; found 0.0; write for example null (the default)",
        ),
        (
            {"estimator": "rwr", "objective": "gspo"},
            "ppo.objective must be clip (the default) with ppo.estimator rwr, whose likelihoods have neither a ratio nor a "
            "clip; found gspo; write ppo.objective=clip, or another ppo.estimator",
        ),
        (
            {"estimator": "rwr", "clip_high": 0.3},
            "ppo.clip_high must be null (the default) with ppo.estimator rwr, whose likelihoods have neither a ratio nor a "
            "clip; found 0.3; write ppo.clip_high=null, or another ppo.estimator",
        ),
        (
            {"overlong": OverlongConfig(buffer_tokens=48)},
            "ppo.overlong.buffer_tokens must be null or below ppo.sampling.max_completion_tokens (48): the penalty is for "
            "the last tokens before it; found 48; write for example 9, or null for none",
        ),
        (
            {"overlong": OverlongConfig(buffer_tokens=0)},
            "ppo.overlong.buffer_tokens must be null or at least 1; found 0; write for example null (the default)",
        ),
        (
            {"overlong": OverlongConfig(penalty=-1.0)},
            "ppo.overlong.penalty must be above 0; found -1.0; write for example 1.0 (the default)",
        ),
        (
            {"entropy_coef": -0.1},
            "ppo.entropy_coef must be 0 or more; found -0.1; write for example 0.0 (the default)",
        ),
        (
            {"estimator": "raft", "samples_per_prompt": 2, "mask_truncated": True},
            "ppo.mask_truncated must be false with ppo.estimator raft, which chooses what trains by itself and may choose "
            "what is cut off; found True; write ppo.mask_truncated=false, and a ppo.missing_eos_penalty, by which it ranks",
        ),
        (
            {"estimator": "dr_grpo", "samples_per_prompt": 2, "whiten_over": "group"},
            "ppo.whiten_over must be batch (the default) where advantages are not whitened (ppo.estimator dr_grpo, "
            "ppo.whiten_advantages null); found group; write ppo.whiten_over=batch or ppo.whiten_advantages=true",
        ),
        (
            {"whiten_over": "group"},
            "ppo.samples_per_prompt must be at least 2 with ppo.whiten_over group; found 1; write ppo.samples_per_prompt=4 "
            "or ppo.whiten_over=batch",
        ),
    ],
)
def test_what_is_refused(values: dict, message: str) -> None:
    assert refused(PPOConfig(**values)) == [message]


@pytest.mark.parametrize("objective", objective_names())
@pytest.mark.parametrize("estimator", ["gae", "grpo", "reinforce_plus_plus"])
def test_what_is_accepted(objective: str, estimator: str) -> None:
    ppo = PPOConfig(objective=objective, estimator=estimator, samples_per_prompt=2, clip_low=0.1, clip_high=5.0)
    assert refused(ppo) == []


def test_declarations_are_read_without_torch() -> None:
    code = (
        "import sys; from contracts.objectives import *;"
        "[find_objective(name) for name in objective_names()]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
