"""A hub model of a revision is read as of that revision wherever it is read. The hub is a cache as huggingface_hub lays it
out, in which `main` has moved on; nothing is asked for over the network."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.files import fingerprints
from common.files.fingerprints import checkpoint_fingerprint
from common.text.tokenizers import known_ids, load_decoder, local_checkpoint, pinned, text_start, vocabulary
from contracts.checks.validation import ConfigError
from contracts.config import ModelConfig, TandemConfig
from contracts.records import ScoringItem
from controller.cluster.runtime import Runtime
from controller.pipeline.context import StageContext
from controller.start_checks.amounts import check_model
from reward_service.scorer_kind import text_reader


def hub_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **revisions: dict[str, str]) -> None:
    """owner/model with these files."""
    cache = folder / "hub/models--owner--model"
    (cache / "refs").mkdir(parents=True, exist_ok=True)
    for name, files in revisions.items():
        commit = hashlib.sha1(json.dumps(files).encode()).hexdigest()
        (cache / "refs" / name).write_text(commit)
        (cache / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (cache / "snapshots" / commit / file).write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fingerprints._hub_commit.cache_clear()


def files_of(*words: str, layers: int = 2) -> dict[str, str]:
    """A model whose tokenizer has these words."""
    tokens = {word: number for number, word in enumerate(words)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": tokens, "unk_token": words[0]},
        "pre_tokenizer": {"type": "Whitespace"},
    }
    config = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": len(words)}
    return {"config.json": json.dumps(config), "tokenizer.json": json.dumps(tokenizer)}


PINNED = ModelConfig(path="owner/model", revision="v1")


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    hub_of(tmp_path, monkeypatch, v1=files_of("no", "yes"), main=files_of("up", "down", "left", layers=9))
    yield
    fingerprints._hub_commit.cache_clear()


def test_the_name_of_a_pinned_model_leads_to_its_revision() -> None:
    name = pinned("owner/model", PINNED)
    assert name == "owner/model@v1"
    assert vocabulary(name) == {"no": 0, "yes": 1}
    assert known_ids(name) == {0, 1}
    assert load_decoder(name)([1]) == "yes"
    assert text_start(name) is None
    assert local_checkpoint(name) == local_checkpoint("owner/model", "v1") != local_checkpoint("owner/model")
    assert vocabulary("owner/model") == {"up": 0, "down": 1, "left": 2}
    assert pinned("owner/other", PINNED) == "owner/other"  # the revision is of model.path


def test_a_directory_has_no_revision(tmp_path: Path) -> None:
    path = str(tmp_path / "a@b")
    Path(path).mkdir()
    assert pinned(path, ModelConfig(path=path, revision="v1")) == path
    assert local_checkpoint(path) == Path(path)


def test_rules_read_what_the_pinned_tokenizer_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, days = [], []

    class Service:
        scorers: Any = None

        def __init__(self, service: Any, cluster: Any, env: Any, tokenizer: str, placement: Any, date: str):
            asked.append(tokenizer)
            days.append(date)

        def start(self, scorers: Any) -> None: ...

        def client(self) -> None: ...

    monkeypatch.setattr("reward_service.app.RewardService", Service)
    monkeypatch.setattr(Runtime, "start", lambda runtime: None)
    runtime = Runtime(TandemConfig(model=replace(PINNED, template_date="2024-02-29")))
    placement: Any = type("Placement", (), {"num_scorers": 0})
    runtime._placement = placement
    runtime.service({})
    [tokenizer] = asked
    assert days == ["2024-02-29"]  # of its templates over HTTP
    [text] = text_reader(tokenizer)([ScoringItem((0, 1, 1, 0), 1)])
    assert (text.prompt, text.completion) == ("no", "yes yes")


def test_a_policy_that_is_the_pinned_model_is_known_by_its_commit(tmp_path: Path) -> None:
    context: Any = object.__new__(StageContext)  # without what fingerprints do not need
    context.config = TandemConfig(cache_dir=str(tmp_path), model=PINNED)
    assert context.fingerprint("owner/model") == checkpoint_fingerprint("owner/model", "v1")
    assert context.fingerprint("owner/model") != checkpoint_fingerprint("owner/model")


def test_a_checkpoint_that_is_the_pinned_model_is_checked_as_that(tmp_path: Path) -> None:
    """`sft_model=${model.path}`: main has other words and other layers."""
    config = TandemConfig(
        stage="evaluate",
        method="none",
        run_dir=str(tmp_path),
        cache_dir=str(tmp_path),
        model=PINNED,
        sft_model=PINNED.path,
    )
    check_model(config)
    config.model = ModelConfig(path=str(local_checkpoint("owner/model", "v1")))
    with pytest.raises(ConfigError, match="sft_model=owner/model must be a model with the vocabulary"):
        check_model(config)
