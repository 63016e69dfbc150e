"""Cutting sequences into microbatches: neighbours in length together, equal counts on every rank."""

import heapq


def cut_microbatches(
    lengths: list[int], token_budget: int, ranks: int, groups: list[int] | None = None
) -> list[list[list[int]]]:
    """Indices of `lengths` as [rank][microbatch][row].

    Sequences are sorted by length, those of a group (`groups` has its number for each sequence) by that of its longest, so
    that they are neighbours, and cut where the next one would push the sum over `token_budget`; a sequence longer
    than the budget travels alone. Every rank gets the same number of microbatches, since the collectives of a sharded
    model run once a microbatch on all ranks, and about the same number of tokens. No microbatch is empty: where too few
    sequences are left to give every rank one more, some travel together over the budget.

    Raises:
        ValueError: with fewer sequences than ranks.
    """
    if len(lengths) < ranks:
        raise ValueError(f"{len(lengths)} sequences cannot feed {ranks} ranks")
    groups = groups or list(range(len(lengths)))
    longest: dict[int, int] = {}
    for group, length in zip(groups, lengths, strict=True):
        longest[group] = max(length, longest.get(group, 0))
    order = sorted(range(len(lengths)), key=lambda i: (longest[groups[i]], groups[i], lengths[i], i))
    batches: list[list[int]] = []
    tokens = 0
    for i in order:
        tokens += lengths[i]
        if batches and tokens <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            tokens = lengths[i]
    target = -(-len(batches) // ranks) * ranks
    if target > len(lengths):  # one sequence for each is too many: the cheapest travel together, over the budget
        target -= ranks
    batches = _merge(_split(batches, lengths, target), lengths, target)
    return _balance(batches, [sum(lengths[i] for i in b) for b in batches], ranks)


def _split(batches: list[list[int]], lengths: list[int], target: int) -> list[list[int]]:
    """Halves the largest batch, by sequences and then tokens, until there are `target`; of equals the one that is last."""
    heap = [(-len(b), -sum(lengths[i] for i in b), -n, b) for n, b in enumerate(batches)]
    if len(heap) >= target:
        return batches
    heapq.heapify(heap)
    halves: list[tuple[int, int, int, list[int]]] = []
    for n in range(len(heap), 2 * target - len(heap), 2):
        for half in halves:
            heapq.heappush(heap, half)
        *_, largest = heapq.heappop(heap)
        middle = len(largest) // 2
        parts = largest[:middle], largest[middle:]
        halves = [(-len(b), -sum(lengths[i] for i in b), -n - k, b) for k, b in enumerate(parts)]
    return [b for *_, b in (*sorted(heap, reverse=True), *halves)]


def _merge(batches: list[list[int]], lengths: list[int], target: int) -> list[list[int]]:
    """Joins the two batches with the fewest tokens until there are `target`; of equals the one that was joined last."""
    heap = [(sum(lengths[i] for i in b), n, b) for n, b in enumerate(batches)]
    if len(heap) <= target:
        return batches
    heapq.heapify(heap)
    for n in range(len(heap) - target):
        (tokens, _, first), (more, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (tokens + more, -n - 1, first + second))
    newest = min(heap, key=lambda entry: entry[1])
    return [newest[2], *(b for _, n, b in sorted(heap) if n != newest[1])]


def _balance(batches: list[list[int]], costs: list[int], ranks: int) -> list[list[list[int]]]:
    """Give each rank equally many batches and about equal cost: the dearest goes to the rank with least so far."""
    share = len(batches) // ranks
    result: list[list[list[int]]] = [[] for _ in range(ranks)]
    queue = [(0, rank) for rank in range(ranks)]
    for i in sorted(range(len(batches)), key=lambda i: -costs[i]):
        cost, rank = heapq.heappop(queue)
        result[rank].append(batches[i])
        if len(result[rank]) < share:
            heapq.heappush(queue, (cost + costs[i], rank))
    return result


def cut_padded(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Indices of `lengths`, shortest first, as batches whose longest x count is at most `token_budget`.

    A sequence longer than the budget travels alone.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and lengths[i] * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
