"""A checkpoint is all of its bytes, and costs their reading once."""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from common.files import fingerprints
from common.files.fingerprints import PIECE_BYTES, checkpoint_fingerprint, file_hashes
from common.models.loading import loading_report


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_known", {})


def checkpoint(path: Path, files: dict[str, bytes]) -> str:
    for file, content in files.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(content)
    return str(path)


BIG = bytes(9 << 20)
BASE = {"config.json": b"{}", "sub/model.safetensors": BIG}
CHANGES: dict[str, dict[str, bytes]] = {
    "config": {"config.json": b"[]"},
    "first byte": {"sub/model.safetensors": b"x" + BIG[1:]},
    "a byte in the middle": {"sub/model.safetensors": BIG[: 4 << 20] + b"x" + BIG[(4 << 20) + 1 :]},
    "last byte": {"sub/model.safetensors": BIG[:-1] + b"x"},
    "a byte more": {"sub/model.safetensors": BIG + b"\0"},
    "a file more": {"more": b""},
    "a template": {"chat_template.jinja": b"x"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_byte_counts(change: str, tmp_path: Path) -> None:
    same = checkpoint_fingerprint(checkpoint(tmp_path / "a", BASE))
    assert checkpoint_fingerprint(checkpoint(tmp_path / "b", BASE)) == same  # the path does not
    assert checkpoint_fingerprint(checkpoint(tmp_path / "c", BASE | CHANGES[change])) != same


def test_what_decides_nothing_does_not_count(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, BASE)
    before = checkpoint_fingerprint(path)
    checkpoint(
        tmp_path, {"README.md": b"x", "golden.json": b"[]", ".cache/huggingface/x.lock": b"", ".gitattributes": b""}
    )
    assert checkpoint_fingerprint(path) == before


def test_two_models_that_differ_in_their_top_layers_alone(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        model.model.layers[5].mlp.up_proj.weight[7, 7] += 1.0
    model.save_pretrained(tmp_path / "b")
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.stat().st_size == b.stat().st_size
    assert a.read_bytes()[: 1 << 20] == b.read_bytes()[: 1 << 20]  # as an earlier fingerprint saw them
    assert a.read_bytes()[-(1 << 20) :] == b.read_bytes()[-(1 << 20) :]
    assert checkpoint_fingerprint(str(tmp_path / "a")) != checkpoint_fingerprint(str(tmp_path / "b"))


def test_pieces_are_hashed_in_order(tmp_path: Path) -> None:
    content = os.urandom(2 * PIECE_BYTES + 5)
    (tmp_path / "file").write_bytes(content)
    parts = [content[:PIECE_BYTES], content[PIECE_BYTES : 2 * PIECE_BYTES], content[2 * PIECE_BYTES :]]
    expected = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    assert file_hashes([tmp_path / "file"]) == [expected]


def test_a_file_that_has_not_changed_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    piece = fingerprints._piece

    def counted(file: Path, start: int) -> bytes:
        read.append(file.name)
        return piece(file, start)

    monkeypatch.setattr(fingerprints, "_piece", counted)
    monkeypatch.setattr(fingerprints, "SETTLED_S", -1.0)  # the files are of this very moment
    path, memory = checkpoint(tmp_path / "model", {"a": b"1", "b": b"2"}), tmp_path / "memory.json"
    first = checkpoint_fingerprint(path, memory=memory)
    monkeypatch.setattr(fingerprints, "_known", {})  # another process
    assert checkpoint_fingerprint(path, memory=memory) == first
    assert sorted(read) == ["a", "b"]
    # The same size and the same time of writing, as copying tools set it back.
    stat = (tmp_path / "model/a").stat()
    (tmp_path / "model/a").write_bytes(b"3")
    os.utime(tmp_path / "model/a", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert checkpoint_fingerprint(path, memory=memory) != first
    assert sorted(read) == ["a", "a", "b"]
    for torn in ("", "[1]", '{"'):  # it only saves time
        memory.write_text(torn)
        monkeypatch.setattr(fingerprints, "_known", {})
        checkpoint_fingerprint(path, memory=memory)
        assert len(json.loads(memory.read_text())) == 2


def test_a_file_that_may_still_be_written_is_not_remembered(tmp_path: Path) -> None:
    path, memory = checkpoint(tmp_path / "model", {"a": b"1"}), tmp_path / "memory.json"
    checkpoint_fingerprint(path, memory=memory)
    assert not memory.exists()
    assert fingerprints._known == {}


def test_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED_S", -1.0)
    path, memory, found = (
        checkpoint(tmp_path / "model", {f"{i}": bytes([i]) for i in range(40)}),
        tmp_path / "m",
        set[str](),
    )
    threads = [
        threading.Thread(target=lambda: found.add(checkpoint_fingerprint(path, memory=memory))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1
    assert len(json.loads(memory.read_text())) == 40


def test_a_hub_id_is_the_commit_that_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache as huggingface_hub lays it out; nothing is asked for over the network."""
    cache = tmp_path / "models--owner--model"
    for name, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / name).write_text(commit)
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    main = checkpoint_fingerprint("owner/model")
    assert checkpoint_fingerprint("owner/model", "main") == main != checkpoint_fingerprint("owner/model", "v2")
    (cache / "refs/main").write_text("b" * 40)  # somebody has uploaded other weights
    fingerprints._hub_commit.cache_clear()
    assert checkpoint_fingerprint("owner/model") == checkpoint_fingerprint("owner/model", "v2") != main
    with pytest.raises(OSError, match="cannot find the requested files in the local cache"):
        checkpoint_fingerprint("owner/no-such")
    with pytest.raises(ValueError, match="Repo id"):
        checkpoint_fingerprint(str(tmp_path / "no/such/directory"))
    fingerprints._hub_commit.cache_clear()


# ---- what a load reads is what was hashed

NAME = "model-00001-of-00001.safetensors"


def index_of(*names: Any) -> bytes:
    return json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(names)}}).encode()


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        checkpoint_fingerprint(str(path))
    return str(error.value)


@pytest.mark.parametrize("name", ["../other/x.safetensors", "/x.bin", ".hidden/x.safetensors", "a/../x", "", "x.md"])
def test_an_index_names_files_of_its_own_directory(name: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, {"config.json": b"{}", NAME: b"", "model.safetensors.index.json": index_of(NAME)})
    checkpoint_fingerprint(str(tmp_path))
    checkpoint(tmp_path, {"model.safetensors.index.json": index_of(NAME, name)})
    assert refused(tmp_path).endswith(
        f"must name files of its own directory; found {name!r}; write a checkpoint with all its files"
    )


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"weight_map": []}', b"{}", index_of(["x"]), index_of(1), b"\xff"])
def test_an_index_that_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    checkpoint(tmp_path, {NAME: b"", "model.safetensors.index.json": content})
    assert "model.safetensors.index.json" in refused(tmp_path)


def test_weights_that_another_reader_would_take_are_refused(tmp_path: Path) -> None:
    """vLLM loads what it finds where there is no index, transformers the file of the usual name."""
    checkpoint(tmp_path, {"model.safetensors": b"", "model-00002-of-00002.safetensors": b""})
    assert "must hold one set of weights; found model-00002-of-00002.safetensors beside another" in refused(tmp_path)
    checkpoint(tmp_path, {"model.safetensors.index.json": index_of("model-00002-of-00002.safetensors")})
    assert "found model.safetensors beside model.safetensors.index.json; write a directory without it" in refused(
        tmp_path
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_weights_are_no_pickle(name: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, {"config.json": b"{}", name: b""})
    assert f"must hold its weights as safetensors; found {name}, a pickle" in refused(tmp_path)
    with pytest.raises(ValueError, match="must hold its weights as safetensors"):
        loading_report(None, str(tmp_path))
    checkpoint(tmp_path, {"model.safetensors": b""})
    checkpoint_fingerprint(str(tmp_path))  # nobody reads the other one


def test_links_lead_nowhere_else(tmp_path: Path) -> None:
    checkpoint(tmp_path / "other", {"shard": b"other", "sub/shard": b"other"})
    path = Path(checkpoint(tmp_path / "model", {"config.json": b"{}", "weights": b"own"}))
    (tmp_path / "link").symlink_to(path)
    assert checkpoint_fingerprint(str(tmp_path / "link")) == checkpoint_fingerprint(str(path))
    (path / "model.safetensors").symlink_to("weights")
    checkpoint_fingerprint(str(path))
    for target in (tmp_path / "other/shard", tmp_path / "other/sub", tmp_path / "nothing", path):
        (path / "model.safetensors").unlink()
        (path / "model.safetensors").symlink_to(target)
        assert "must be a file, or a link to one of the same directory or of a hub cache; it leads to" in refused(path)


def test_a_snapshot_of_a_hub_cache_is_links_into_its_blobs(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hub/models--a--b/blobs", {"0a": b"weights", "0b": b"{}"})
    snapshot = tmp_path / "hub/models--a--b/snapshots/1234"
    snapshot.mkdir(parents=True)
    for name, blob in (("model.safetensors", "0a"), ("config.json", "0b")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    plain = checkpoint(tmp_path / "plain", {"model.safetensors": b"weights", "config.json": b"{}"})
    assert checkpoint_fingerprint(str(snapshot)) == checkpoint_fingerprint(plain)
