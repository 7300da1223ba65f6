"""The order of channels with different widths in the decode kernel.

The kernel reads four RoPE pairs of keys at a time (a *step*), or 16 channels of values (a *tile*). The *kind* of a step
is the widths of its pairs' first and second channels; the kind of a tile is the widths of its first and second eight
channels. The kernel has a loop for each kind, so channels are sorted by width. Remaining channels go to slower kinds,
for any widths up to 3, up to 5, or up to 8.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = [
    "ANY",
    "KEY_KINDS",
    "KIND_ROOM",
    "MEDIUM",
    "NARROW",
    "VALUE_KINDS",
    "Arrangement",
    "arrange_pairs",
    "arrange_values",
]

#: Instead of a width: channels of up to 3 bits, up to 5, or any.
NARROW, MEDIUM, ANY = -1, -2, -3
_MOST = {NARROW: 3, MEDIUM: 5, ANY: 8}
Widths = tuple[int, int]
#: Widths of a pair's first and second channel, in the order of their steps. ``decode_params.cuh`` has the same list.
KEY_KINDS: tuple[Widths, ...] = (
    *((0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4)),
    *((4, 4), (4, 5), (5, 5), (5, 6), (6, 6)),
    *((NARROW, NARROW), (MEDIUM, MEDIUM), (ANY, ANY)),
)
#: Widths of a tile's first and second eight channels, in the order of their tiles.
VALUE_KINDS: tuple[Widths, ...] = (
    *((0, 0), (1, 1), (1, 2), (2, 2), (2, 3), (2, 4), (3, 3), (3, 4), (3, 5), (4, 4), (4, 5), (5, 5)),
    *((5, 6), (6, 6), (MEDIUM, MEDIUM), (ANY, ANY)),
)
#: Bytes of a head's table of ends.
KIND_ROOM = 24
_STEP, _TILE = 4, 16

Item = TypeVar("Item")


@dataclass(frozen=True)
class Arrangement:
    """The order of the channels of one head.

    Attributes:
        order: coordinates. Keys are in pairs, with the narrower channel first.
        widths: the width that the kernel assumes for each channel in ``order``, or :data:`NARROW`, :data:`MEDIUM`,
            :data:`ANY`.
        ends: number of steps or tiles up to the last of each kind.
    """

    order: tuple[int, ...]
    widths: tuple[int, ...]
    ends: tuple[int, ...]


def arrange_pairs(widths: Sequence[int], pairs: Sequence[tuple[int, int]]) -> Arrangement:
    """Arrange the keys of one head.

    Args:
        widths: widths of its channels.
        pairs: coordinates of all pairs, a multiple of four pairs.
    """
    by_widths: dict[Widths, list[tuple[int, int]]] = defaultdict(list)
    for pair in pairs:
        first, second = sorted(pair, key=lambda coordinate: widths[coordinate])
        by_widths[widths[first], widths[second]].append((first, second))
    steps: dict[Widths, list[tuple[int, int]]] = {kind: [] for kind in KEY_KINDS}
    left: list[tuple[int, int]] = []
    for kind in sorted(by_widths):
        whole, rest = _cut(by_widths[kind], _STEP if kind in steps else 0)
        if whole:
            steps[kind] = whole
        left += rest
    for most in (NARROW, MEDIUM, ANY):
        fitting = [pair for pair in left if widths[pair[1]] <= _MOST[most]]
        steps[most, most], _ = _cut(fitting, _STEP)
        left = [pair for pair in left if pair not in steps[most, most]]
    coordinates = {kind: [coordinate for pair in steps[kind] for coordinate in pair] for kind in KEY_KINDS}
    return _arranged(coordinates, 2 * _STEP, 1)


def arrange_values(widths: Sequence[int]) -> Arrangement:
    """Arrange the values of one head, given the widths of its channels, a multiple of 16."""
    half = _TILE // 2
    tiles: dict[Widths, list[int]] = {kind: [] for kind in VALUE_KINDS}
    eights: dict[int, list[int]] = {}  # eight channels of one width that are not in a tile yet
    left: list[int] = []
    for width in sorted(set(widths)):
        channels = [channel for channel, own in enumerate(widths) if own == width]
        tiles_of_width, rest = _cut(channels, _TILE if (width, width) in tiles else 0)
        if tiles_of_width:
            tiles[width, width] = tiles_of_width
        if len(rest) >= half:
            eights[width], rest = rest[:half], rest[half:]
        left += rest
    for more in (1, 2):
        for width in sorted(eights):
            if (width, width + more) in tiles and width in eights and width + more in eights:
                tiles[width, width + more] += eights.pop(width) + eights.pop(width + more)
    left += [channel for channels in eights.values() for channel in channels]
    left.sort(key=lambda channel: widths[channel])
    tiles[MEDIUM, MEDIUM], _ = _cut([channel for channel in left if widths[channel] <= _MOST[MEDIUM]], _TILE)
    tiles[ANY, ANY] = [channel for channel in left if channel not in tiles[MEDIUM, MEDIUM]]
    return _arranged(tiles, _TILE, half)


def _cut(items: list[Item], size: int) -> tuple[list[Item], list[Item]]:
    """Split a list into whole groups of a size, and the rest. With size 0, all is rest."""
    whole = len(items) // size * size if size else 0
    return items[:whole], items[whole:]


def _arranged(by_kind: Mapping[Widths, Sequence[int]], size: int, run: int) -> Arrangement:
    """Join channels by kind, in groups of ``size``, in which runs of ``run`` channels alternate between two widths."""
    order: list[int] = []
    widths: list[int] = []
    ends: list[int] = []
    for kind, channels in by_kind.items():
        order += channels
        widths += [kind[place // run % 2] for place in range(len(channels))]
        ends.append(len(order) // size)
    return Arrangement(tuple(order), tuple(widths), tuple(ends))
