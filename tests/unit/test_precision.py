"""bfloat16 only where the hardware multiplies it."""

from pathlib import Path

import pytest

from common.models.precision import choose_dtypes, cpu_flags
from contracts.config import ClusterConfig, TandemConfig

ZEN3 = "processor\t: 0\nflags\t\t: fpu sse2 avx avx2 fma\n"
SAPPHIRE_RAPIDS = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n"
GRAVITON3 = "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [(ZEN3, "float32"), (SAPPHIRE_RAPIDS, "bfloat16"), (GRAVITON3, "bfloat16"), ("", "float32")],
)
def test_a_cpu_gets_the_format_that_it_multiplies(cpuinfo: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    config = TandemConfig()
    line = choose_dtypes(config, cpu_flags(tmp_path / "cpuinfo"))
    assert (config.model.dtype, config.reward_service.dtype) == (expected, expected)
    assert expected in line


def test_a_system_that_does_not_say_has_no_flags(tmp_path: Path) -> None:
    assert cpu_flags(tmp_path / "missing") == set()


def test_gpus_take_bfloat16_and_a_chosen_format_stays() -> None:
    config = TandemConfig(cluster=ClusterConfig(gpus_per_learner_rank=1, gpus_per_reward_replica=1))
    assert choose_dtypes(config, set()) == ""
    assert (config.model.dtype, config.reward_service.dtype) == ("bfloat16", "bfloat16")
    config = TandemConfig()
    config.model.dtype, config.reward_service.dtype = "float32", "bfloat16"
    assert choose_dtypes(config, {"avx512_bf16"}) == ""
    assert (config.model.dtype, config.reward_service.dtype) == ("float32", "bfloat16")
