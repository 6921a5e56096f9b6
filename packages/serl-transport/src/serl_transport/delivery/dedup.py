"""Which items have been taken: at-least-once delivery becomes exactly-once storage.

Keyed by (actor_id, boot_id, seq). The server's own data stores use it in memory; a gateway rebuilds its own from the
journal with the same class.
"""

from bisect import bisect_right


class SeenItems:
    """Remembers seqs per (actor, boot) as sorted, disjoint ranges: one or two per boot, whatever the item count."""

    def __init__(self) -> None:
        self._ranges: dict[tuple[str, str], list[tuple[int, int]]] = {}  # inclusive (first, last)

    def add(self, actor_id: str, boot_id: str, seq: int) -> bool:
        """Remember an item; False when it was known already."""
        ranges = self._ranges.setdefault((actor_id, boot_id), [])
        after = bisect_right(ranges, seq, key=lambda span: span[0])
        if after and ranges[after - 1][1] >= seq:
            return False
        first = last = seq
        joins_next = after < len(ranges) and ranges[after][0] == seq + 1
        joins_previous = after > 0 and ranges[after - 1][1] == seq - 1
        if joins_next:
            last = ranges.pop(after)[1]
        if joins_previous:
            first = ranges.pop(after - 1)[0]
            after -= 1
        ranges.insert(after, (first, last))
        return True

    def __contains__(self, item: tuple[str, str, int]) -> bool:
        actor_id, boot_id, seq = item
        ranges = self._ranges.get((actor_id, boot_id), [])
        after = bisect_right(ranges, seq, key=lambda span: span[0])
        return bool(after) and ranges[after - 1][1] >= seq
