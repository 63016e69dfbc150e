"""Checks of `logger.trackers`."""

from importlib.util import find_spec

from contracts.config import LoggerConfig
from contracts.plugins import UnknownPlugin, find
from contracts.trackers import TRACKERS, Tracker


def tracker_conflicts(logger: LoggerConfig) -> list[str]:
    """Trackers that there are not, or whose packages are not installed."""
    conflicts = []
    for name in logger.trackers:
        try:
            kind = find(TRACKERS, name)
        except UnknownPlugin as error:
            conflicts.append(f"logger.trackers: {error}")
            continue
        if not (isinstance(kind, type) and issubclass(kind, Tracker)):
            rule = "a subclass of contracts.trackers.Tracker"
            conflicts.append(f"logger.trackers: {name} must be {rule}; found {kind!r}")
        elif kind.is_on(logger) and any(find_spec(module) is None for module in kind.packages):
            instead = f"`python -m pip install {' '.join(kind.packages.values())}`, or leave {name} out"
            conflicts.append(f"logger.trackers: {name} needs what is not installed; write {instead}")
    if len(set(logger.trackers)) < len(logger.trackers):
        conflicts.append(f"logger.trackers must name each of them once; found {', '.join(logger.trackers)}")
    return conflicts
