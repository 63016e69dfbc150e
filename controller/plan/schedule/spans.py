"""Who did what when: what a simulation remembers of its processes."""

from dataclasses import dataclass, field

ACTOR, LEARNER, REWARD = "actor", "learner rank", "reward replica"
GENERATE, LOAD, TRAIN, PUBLISH, SCORE = "generate", "load weights", "train", "publish", "score"
TOUCHING_S = 1e-6  # a gap below it is none


@dataclass(frozen=True)
class Lane:
    side: str
    number: int

    def __str__(self) -> str:
        return f"{self.side} {self.number}"


@dataclass
class Spans:
    lanes: dict[Lane, list[tuple[str, float, float]]] = field(default_factory=dict)  # kind, start, end in seconds

    def open(self, lane: Lane) -> Lane:
        """Of a process that may work."""
        self.lanes[lane] = []
        return lane

    def add(self, lane: Lane, kind: str, start_s: float, end_s: float) -> None:
        """Of one lane in order; neighbours of a kind become one."""
        spans = self.lanes[lane]
        if spans and spans[-1][0] == kind and start_s - spans[-1][2] < TOUCHING_S:
            start_s = spans.pop()[1]
        spans.append((kind, start_s, end_s))

    def busy(self, side: str, start_s: float, end_s: float) -> float:
        """Share of a stretch in which a process of this side worked, mean over all that there are."""
        lanes = [spans for lane, spans in self.lanes.items() if lane.side == side]
        worked = sum(max(0.0, min(b, end_s) - max(a, start_s)) for spans in lanes for _, a, b in spans)
        return worked / (len(lanes) * (end_s - start_s)) if lanes and end_s > start_s else 0.0
