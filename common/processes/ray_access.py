"""Starting or joining Ray so that nobody else gives it orders: whoever can submit a task to a cluster runs code on it.

An embedded Ray listens on every interface and asks for a token, which Ray keeps in `~/.ray/auth_token`, readable by all
where the umask says so. A cluster that was started by hand asks for none unless it was told to.
"""

import os
import secrets
import stat
from pathlib import Path
from typing import Any

from common.processes.process_env import ray_options
from contracts.checks.scorer_checks import is_loopback
from contracts.checks.validation import ConfigError
from contracts.config import ClusterConfig


def start_ray(cluster: ClusterConfig, namespace: str) -> None:
    """Start an embedded Ray, or join the cluster at `cluster.address`.

    Raises:
        ConfigError: where that cluster can be reached from other machines and takes orders without a token.
    """
    import ray

    token = private_token(os.environ)
    # An embedded Ray asks for the token unless RAY_AUTH_MODE says otherwise; to set it here would be too late, as Ray reads
    # it when it is imported.
    ray.init(**ray_options(cluster, namespace))
    if cluster.address != "local":
        try:
            check_access(os.environ.get("RAY_AUTH_MODE", ""), ray.get_runtime_context().gcs_address, token)
        except ConfigError:
            ray.shutdown()
            raise


def process_is_gone(error: BaseException) -> bool:
    """Whether an actor of Ray, or what it was asked, is lost with its process: that ended, its node did, or Ray's monitor
    of memory has ended it."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    return isinstance(error, (RayActorError, OutOfMemoryError))


def check_access(mode: str, gcs_address: str, token: Path | None) -> None:
    """Raises ConfigError where the cluster at `gcs_address` is not on loopback and this process uses no token."""
    host = gcs_address.rsplit(":", 1)[0].strip("[]")
    if mode.lower() != "token" and not is_loopback(host):
        where = f"the token is in {token}" if token else "the token is in RAY_AUTH_TOKEN"
        raise ConfigError(
            f"the Ray cluster at {gcs_address} takes orders from anyone who reaches it, and joining it would send model "
            f"and data there: start its nodes and this program with RAY_AUTH_MODE=token ({where}; nodes need the same)"
        )


def private_token(environ: Any) -> Path | None:
    """The file with Ray's token, made where there is none and readable by its owner alone; None where the environment holds
    the token itself."""
    if environ.get("RAY_AUTH_TOKEN"):
        return None
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(draft, path)  # whole, or another process's
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    found = path.stat()
    if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077:
        path.chmod(0o600)
    return path
