"""Which version of Tandem made a result: a digest of its sources, where no version number would tell two edits apart."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAKERS = ("train.py", "actors", "contracts", "controller", "learner", "reward_service")
READERS = ("controller/report", "controller/study")  # they look at results and make none


def code_digest(root: Path = ROOT) -> str:
    """SHA-256 (hex) over names and bytes of the Python files that decide what a run does."""
    makers = [root / name for name in MAKERS]
    files = [path for maker in makers for path in ([maker] if maker.is_file() else maker.rglob("*.py"))]
    digest = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(root).as_posix()
        if not name.startswith(READERS):
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
