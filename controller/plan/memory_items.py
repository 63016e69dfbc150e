"""What a plan is made of: the parts of each process's memory, with the arithmetic in words; processes; stages."""

from dataclasses import dataclass

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Item:
    """One part of a process's memory at its peak, in bytes."""

    what: str
    nbytes: float
    how: str
    on_gpu: bool = False
    file: str = ""  # of a checkpoint, where it is pages of that: all processes of a node that map them have them once
    least: float | None = (
        None  # what of it is certain, where that is not all; of `file`, which can be read again, nothing
    )


@dataclass(frozen=True)
class Process:
    """`count` processes of one kind, each with these items."""

    role: str
    count: int
    items: tuple[Item, ...]
    bundles: tuple[int, ...] = ()  # of the placement, where each of them lies; empty: with the driver

    @property
    def cpu(self) -> float:
        return sum(item.nbytes for item in self.items if not item.on_gpu)

    @property
    def gpu(self) -> float:
        return sum(item.nbytes for item in self.items if item.on_gpu)

    @property
    def least(self) -> float:
        """Of `cpu`, what is certain."""
        certain = [0.0 if i.file else i.nbytes if i.least is None else i.least for i in self.items if not i.on_gpu]
        return sum(certain)


@dataclass(frozen=True)
class Movement:
    """Bytes that are written, sent or read again and again."""

    what: str
    nbytes: float
    how: str


@dataclass(frozen=True)
class StagePlan:
    title: str
    processes: tuple[Process, ...]
    movements: tuple[Movement, ...] = ()

    @property
    def cpu(self) -> float:
        return sum(process.count * process.cpu for process in self.processes)

    @property
    def gpu(self) -> float:
        return sum(process.count * process.gpu for process in self.processes)

    @property
    def least(self) -> float:
        return sum(process.count * process.least for process in self.processes)


@dataclass(frozen=True)
class JobPlan:
    """The stages follow one another, so that a job's peak is that of its largest."""

    stages: tuple[StagePlan, ...]

    @property
    def largest(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.cpu + stage.gpu)


def shown(nbytes: float) -> str:
    """As "3.1 GiB"; below a tenth of one in MiB."""
    return f"{nbytes / GIB:.2f} GiB" if abs(nbytes) >= GIB / 10 else f"{nbytes / MIB:.0f} MiB"
