"""Files with records, and directories that appear whole; a real limit of the kernel stands for a full disk."""

import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.files import durable
from common.files.durable import FileRecord, RawTensor, publish, replace_text, write_chunks, write_json, write_tensors


def raw(tensor: torch.Tensor, dtype: str) -> RawTensor:
    return RawTensor(dtype, tuple(tensor.shape), memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))


@pytest.mark.parametrize("size", [0, 1, 4096, durable.PIECE_BYTES, 2 * durable.PIECE_BYTES + 4099])
def test_a_record_is_of_the_content(size: int, tmp_path: Path) -> None:
    content = random.Random(size).randbytes(size)
    record = write_chunks(tmp_path / "a", [content[:5], b"", memoryview(content)[5:]])
    assert (tmp_path / "a").read_bytes() == content
    assert record == (len(content), hashlib.sha256(content).hexdigest())
    assert durable.record(tmp_path / "a") == record
    assert durable.problem(tmp_path / "a", record) is None


def test_a_file_system_without_o_direct(tmp_path: Path) -> None:
    """As the one is in which the kernel has anonymous files."""
    file = os.memfd_create("a")
    assert not durable._set_direct(file, True)
    content = np.arange(durable.PIECE_BYTES // 2 + 99, dtype=np.uint32).view(np.uint8)
    durable._write(file, [content[:77], content[77:]])
    assert os.pread(file, 1 << 30, 0) == content.tobytes()
    os.close(file)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    write_json(tmp_path / "a", 1)
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "a", 2)
    assert json.loads((tmp_path / "a").read_text()) == 1


def test_other_libraries_read_the_tensors(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5),
        "scalar": torch.tensor(7.5),
        "rounded": torch.randn(4, 2).to(torch.bfloat16),
        "empty": torch.zeros(0, 3, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
    }
    names = {"matrix": "F32", "scalar": "F32", "rounded": "BF16", "empty": "I64", "flags": "BOOL"}
    write_tensors(tmp_path / "t.safetensors", {n: raw(t, names[n]) for n, t in tensors.items()}, {"what": "ä"})
    loaded = load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 999 bytes instead of 1000"),
        (lambda path: path.write_bytes(b"y" + path.read_bytes()[1:]), "has SHA-256"),
    ],
)
def test_damage_is_named(damage, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    record = write_chunks(path, [b"x" * 1000])
    damage(path)
    assert reason in (durable.problem(path, record) or "")


def test_without_the_content_only_the_size_counts(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    assert durable.problem(path, FileRecord(1, "0" * 64), content=False) is None


def test_a_directory_appears_with_all_of_its_files(tmp_path: Path) -> None:
    (tmp_path / ".new/deep").mkdir(parents=True)
    write_json(tmp_path / ".new/deep/a", 1)
    publish(tmp_path / ".new", tmp_path / "done")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["done", "done/deep", "done/deep/a"]
    (tmp_path / ".new").mkdir()
    with pytest.raises(FileExistsError):
        publish(tmp_path / ".new", tmp_path / "done")


def test_threads_replace_one_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        [*threads.map(lambda n: replace_text(tmp_path / "file", f"{n:04}" * 1000), range(200))]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert len({*re.findall("....", (tmp_path / "file").read_text())}) == 1


def test_a_disk_without_room_is_an_error(tmp_path: Path) -> None:
    """The kernel refuses to write on in the middle of the file, as it does on a full disk."""
    script = """
import resource, sys
from pathlib import Path
from common.files.durable import write_chunks
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
write_chunks(Path(sys.argv[1]), [bytes(3 << 19), bytes(3 << 19)])
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1, signal.strsignal(-done.returncode)
    assert "OSError" in done.stderr
    assert (tmp_path / "a").stat().st_size == 1 << 20
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1 << 20
