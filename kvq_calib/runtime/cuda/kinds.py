"""How the decode kernel takes channels whose widths differ: sorted, so that it meets few kinds of them.

The kernel reads four RoPE pairs of keys at a time (a *step*), and 16 channels of values (a *tile*). It has code of its
own for each *kind* of them: pairs whose first channel has one width and whose second has another, and tiles whose first
and second eight channels have these widths. What fits no kind is of the last, which takes any widths, more slowly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["ANY", "KEY_KINDS", "KIND_ROOM", "VALUE_KINDS", "Arrangement", "arrange_pairs", "arrange_values"]

#: Widths of the last kind.
ANY = (-1, -1)
#: Widths of a pair's first and second channel, in the order in which their steps stand; ``decode_params.cuh`` has the
#: same.
KEY_KINDS = (
    *((0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3)),
    *((3, 3), (3, 4), (4, 4), (4, 5), (5, 5), ANY),
)
#: Widths of a tile's first and second eight channels.
VALUE_KINDS = ((0, 0), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4), (4, 5), (5, 5), ANY)
#: Bytes of a head's table of ends.
KIND_ROOM = 16
_STEP, _TILE = 4, 16

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Arrangement:
    """The channels of one head as the kernel takes them.

    Attributes:
        order: coordinates; of keys pair after pair, the narrower channel first.
        ends: of each kind, the number of steps or tiles up to its last.
    """

    order: tuple[int, ...]
    ends: tuple[int, ...]


def arrange_pairs(widths: Sequence[int], pairs: Sequence[tuple[int, int]]) -> Arrangement:
    """Keys of one head.

    Args:
        widths: of its channels.
        pairs: their coordinates, all of them, a multiple of four pairs.
    """
    sorted_pairs = [tuple(sorted(pair, key=lambda coordinate: widths[coordinate])) for pair in pairs]
    by_kind = _grouped({pair: (widths[pair[0]], widths[pair[1]]) for pair in sorted_pairs})
    steps, left = _whole(by_kind, KEY_KINDS, _STEP)
    steps[ANY] = left
    order = [coordinate for kind in KEY_KINDS for pair in steps[kind] for coordinate in pair]
    return Arrangement(tuple(order), _ends([len(steps[kind]) // _STEP for kind in KEY_KINDS]))


def arrange_values(widths: Sequence[int]) -> Arrangement:
    """Values of one head, a multiple of 16 channels of these widths."""
    half = _TILE // 2
    by_width = _grouped(dict(enumerate(widths)))
    tiles: dict[tuple[int, int], list[int]] = {kind: [] for kind in VALUE_KINDS}
    single: dict[int, list[int]] = {}  # eight channels of a width that found no others
    left: list[int] = []
    for width in sorted(by_width):
        channels = by_width[width]
        if (width, width) in tiles:
            whole = len(channels) // _TILE * _TILE
            tiles[width, width] += channels[:whole]
            channels = channels[whole:]
            if len(channels) >= half:
                single[width], channels = channels[:half], channels[half:]
        left += channels
    for width in list(single):
        if width not in single:
            continue
        own, other = single.pop(width), None
        if (width, width + 1) in tiles:
            other = single.pop(width + 1, None)
        if other is None:
            left += own
        else:
            tiles[width, width + 1] += own + other
    tiles[ANY] = sorted(left, key=lambda coordinate: widths[coordinate])
    order = [coordinate for kind in VALUE_KINDS for coordinate in tiles[kind]]
    return Arrangement(tuple(order), _ends([len(tiles[kind]) // _TILE for kind in VALUE_KINDS]))


def _grouped(keys: Mapping[Item, Key]) -> dict[Key, list[Item]]:
    found: dict[Key, list[Item]] = defaultdict(list)
    for item, key in keys.items():
        found[key].append(item)
    return found


def _whole(
    groups: Mapping[Key, list[Item]], kinds: Sequence[Key], size: int
) -> tuple[dict[Key, list[Item]], list[Item]]:
    """What of each kind comes in whole groups of a size, and what is left, sorted by kind."""
    found = {kind: groups[kind][: len(groups[kind]) // size * size] if kind in groups else [] for kind in kinds}
    left = [item for kind in sorted(groups) for item in groups[kind][len(found.get(kind, ())) :]]
    return found, left


def _ends(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(counts[: number + 1]) for number in range(len(counts)))
