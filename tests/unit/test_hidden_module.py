"""What a library would import by the way stays out."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from common.processes.hidden_module import hidden_module
from tests.conftest import ROOT


def test_it_is_as_if_it_were_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "by_the_way.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError), hidden_module("by_the_way"):
        importlib.import_module("by_the_way")
    assert importlib.import_module("by_the_way").VALUE == 1
    with hidden_module("by_the_way"):  # somebody has it already
        assert importlib.import_module("by_the_way").VALUE == 1
    assert "by_the_way" in sys.modules


def test_deepspeed_does_not_bring_mlflow() -> None:
    code = "import sys, learner.engine; assert 'mlflow' not in sys.modules; import mlflow"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
