import math

import pytest
import torch

from contracts.config import KLConfig
from learner.coefficients import AdaptiveKLController, FixedKLController, make_kl_controller
from learner.kl import kl_k1, kl_k2, kl_k3

POLICY_LOGITS = [0.3, -1.2, 0.9, 0.1]
REF_LOGITS = [-0.4, 0.2, 0.5, -0.1]


def log_softmax(logits: list[float]) -> list[float]:
    normalizer = math.log(sum(math.exp(x) for x in logits))
    return [x - normalizer for x in logits]


def enumerate_kl() -> tuple[list[float], list[float], float]:
    """p, d and KL(p || q) of the small softmax, in float64 without torch."""
    logp, logq = log_softmax(POLICY_LOGITS), log_softmax(REF_LOGITS)
    p = [math.exp(x) for x in logp]
    d = [a - b for a, b in zip(logp, logq, strict=True)]
    return p, d, sum(x * y for x, y in zip(p, d, strict=True))


def test_hand_worked_values():
    # d = log 0.5 - log 0.25 = log 2 = 0.693147
    # k1 = 0.693147, k2 = 0.693147^2 / 2 = 0.240227, k3 = 1/2 - 1 + 0.693147 = 0.193147
    logprobs, ref_logprobs = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl_k1(logprobs, ref_logprobs).item() == pytest.approx(0.693147, abs=1e-6)
    assert kl_k2(logprobs, ref_logprobs).item() == pytest.approx(0.240227, abs=1e-6)
    assert kl_k3(logprobs, ref_logprobs).item() == pytest.approx(0.193147, abs=1e-6)


def test_sign_where_the_reference_is_likelier():
    # d = -log 2: k1 = -0.693147, k2 as before, k3 = 2 - 1 - 0.693147 = 0.306853
    logprobs, ref_logprobs = torch.tensor([math.log(0.25)]), torch.tensor([math.log(0.5)])
    assert kl_k1(logprobs, ref_logprobs).item() == pytest.approx(-0.693147, abs=1e-6)
    assert kl_k2(logprobs, ref_logprobs).item() == pytest.approx(0.240227, abs=1e-6)
    assert kl_k3(logprobs, ref_logprobs).item() == pytest.approx(0.306853, abs=1e-6)


def test_expectations_by_enumeration():
    p, d, kl = enumerate_kl()
    logprobs, ref_logprobs = torch.tensor(log_softmax(POLICY_LOGITS)), torch.tensor(log_softmax(REF_LOGITS))
    weights = torch.tensor(p)
    half_second_moment = sum(0.5 * x * y * y for x, y in zip(p, d, strict=True))
    assert (weights * kl_k1(logprobs, ref_logprobs)).sum().item() == pytest.approx(kl, abs=1e-6)
    assert (weights * kl_k2(logprobs, ref_logprobs)).sum().item() == pytest.approx(half_second_moment, abs=1e-6)
    assert (weights * kl_k3(logprobs, ref_logprobs)).sum().item() == pytest.approx(kl, abs=1e-6)
    assert abs(half_second_moment - kl) > 0.01  # k2 is biased, so the line above tells it from k1 and k3


@pytest.mark.parametrize(("estimator", "share_of_kl_gradient"), [(kl_k1, 0.0), (kl_k2, 1.0)])
def test_expected_gradient_as_a_loss(estimator, share_of_kl_gradient):
    # d KL / d logit_i = p_i * (d_i - KL)
    p, d, kl = enumerate_kl()
    expected = torch.tensor([share_of_kl_gradient * x * (y - kl) for x, y in zip(p, d, strict=True)])
    logits = torch.tensor(POLICY_LOGITS, requires_grad=True)
    logprobs = logits.log_softmax(0)
    ref_logprobs = torch.tensor(REF_LOGITS).log_softmax(0)
    (logprobs.detach().exp() * estimator(logprobs, ref_logprobs)).sum().backward()
    torch.testing.assert_close(logits.grad, expected, atol=1e-6, rtol=1e-5)


def test_k1_is_not_clamped():
    assert kl_k1(torch.tensor([-1.0]), torch.tensor([-41.0])).item() == 40.0
    assert kl_k1(torch.tensor([-41.0]), torch.tensor([-1.0])).item() == -40.0


def test_k3_keeps_its_digits_for_close_policies():
    # d = 0.0011: k3 = d^2/2 - d^3/6 + ... = 6.05e-7 - 2e-10; exp(-d) - 1 in float32 may err by 3e-8, 5% of it
    d = 0.0011
    expected = d**2 / 2 - d**3 / 6
    assert kl_k3(torch.tensor([d]), torch.tensor([0.0])).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3])
def test_bfloat16_inputs_are_subtracted_in_float32(estimator):
    # Both inputs are exact in bfloat16 (8 bits); their difference 7.9921875 = 1023/128 needs 10.
    logprobs, ref_logprobs = torch.tensor([-1.0078125]).bfloat16(), torch.tensor([-9.0]).bfloat16()
    result = estimator(logprobs, ref_logprobs)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, estimator(torch.tensor([7.9921875]), torch.zeros(1)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kl_per_sequence", "expected"),
    [
        (6.6, 0.100064),  # error 6.6/6 - 1 = 0.1; 0.1 * (1 + 0.1 * 64/10000)
        (60.0, 0.100128),  # error 9, clipped to 0.2; 0.1 * (1 + 0.2 * 0.0064)
        (0.0, 0.099872),  # error -1, clipped to -0.2; 0.1 * (1 - 0.2 * 0.0064)
        (6.0, 0.1),
    ],
)
def test_adaptive_update_by_hand(kl_per_sequence, expected):
    controller = AdaptiveKLController(coef=0.1, target=6.0, horizon=10000)
    controller.update(kl_per_sequence, episodes=64)
    assert controller.coef == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("episodes", "horizon", "kls", "expected"),
    [
        # Far below the target at every update: a fifth less each time, as at one horizon. Unbounded: -0.03, 0.018.
        (1024, 128, [0.0, 0.0, 0.0], [0.04, 0.032, 0.0256]),
        (1024, 128, [60.0, 60.0], [0.06, 0.072]),
        (1024, 128, [6.6], [0.055]),  # error 0.1
        (128, 128, [0.0], [0.04]),
        (64, 128, [0.0], [0.045]),  # half a horizon: half the step
        (10**9, 1, [0.0], [0.04]),
    ],
)
def test_the_adaptive_coefficient_keeps_its_sign(episodes, horizon, kls, expected):
    controller = AdaptiveKLController(coef=0.05, target=6.0, horizon=horizon)
    for kl, coef in zip(kls, expected, strict=True):
        controller.update(kl, episodes)
        assert controller.coef == pytest.approx(coef, rel=1e-12)


def test_adaptive_coefficient_survives_a_resume():
    controller = AdaptiveKLController(coef=0.1, target=6.0, horizon=100)
    controller.update(20.0, episodes=50)
    resumed = AdaptiveKLController(coef=0.1, target=6.0, horizon=100)
    resumed.load_state_dict(controller.state_dict())
    controller.update(2.0, episodes=50)
    resumed.update(2.0, episodes=50)
    assert resumed.coef == controller.coef == pytest.approx(0.1 * 1.1 * 0.9)


@pytest.mark.parametrize("kl_per_sequence", [math.nan, math.inf])
def test_adaptive_refuses_a_kl_that_is_not_finite(kl_per_sequence):
    controller = AdaptiveKLController(coef=0.1, target=6.0, horizon=100)
    with pytest.raises(ValueError, match="finite"):
        controller.update(kl_per_sequence, episodes=1)
    assert controller.coef == 0.1


def test_fixed_controller_never_moves():
    controller = make_kl_controller(KLConfig(coef=0.05, controller="fixed"))
    assert isinstance(controller, FixedKLController)
    controller.update(100.0, episodes=64)
    controller.load_state_dict({"coef": 3.0})
    assert controller.coef == 0.05
    assert controller.state_dict() == {"coef": 0.05}


def test_make_kl_controller_reads_the_configuration():
    controller = make_kl_controller(KLConfig(coef=0.2, controller="adaptive", target=3.0, horizon=500))
    assert isinstance(controller, AdaptiveKLController)
    assert (controller.coef, controller.target, controller.horizon) == (0.2, 3.0, 500)
    with pytest.raises(ValueError, match="controller"):
        make_kl_controller(KLConfig(controller="pid"))
