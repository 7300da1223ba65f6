"""Count instructions in the machine code of the decode kernel's inner loops, weighted by widths of real artifacts.

No GPU is needed: nvcc compiles, and nvdisasm (PyPI: ``nvidia-cuda-nvdisasm``) disassembles. It prints and writes what a
thread issues per element of keys and of values: all instructions, instructions of the integer unit, which takes one
every other clock, and loads from global memory. Softmax and other work once per page is not counted.

For an artifact whose heads are smaller than ``--head-dim``, neighbouring heads are joined.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.codec.trellis import TrellisQuantizer
from kvq_calib.errors import KVQError
from kvq_calib.files import write_atomically
from kvq_calib.runtime.cuda.build import compile_cubin
from kvq_calib.runtime.cuda.decode import FEW_HEADS, DecodeVariant
from kvq_calib.runtime.cuda.kinds import KEY_KINDS, VALUE_KINDS, Widths, arrange_pairs, arrange_values
from kvq_calib.schema.geometry import KINDS, Kind, channel_pairs

#: Elements per thread in one matrix product, for up to four query heads per key-value head.
PRODUCT_ELEMENTS = 8
#: Opcodes of the integer unit, which has 16 lanes for 32 threads: logic, shifts, permutes, comparisons, conversions.
ALU = frozenset(
    (
        *(
            "PRMT",
            "LOP3",
            "SHF",
            "IADD3",
            "IADD",
            "VIADD",
            "LEA",
            "SEL",
            "FSEL",
            "MOV",
            "SGXT",
            "BMSK",
            "BREV",
            "POPC",
        ),
        *("ISETP", "FSETP", "PLOP3", "FMNMX", "VIMNMX", "VIADDMNMX", "I2FP", "F2FP", "P2R", "R2P"),
    )
)
#: Opcodes of table look-ups of levels.
_TABLE: Widths = (0, 0)


@dataclass(frozen=True)
class Loop:
    """Counts per element of an inner loop."""

    instructions: float
    alu: float
    loads: float

    @classmethod
    def of(cls, opcodes: Sequence[str]) -> Loop:
        """Count the instructions of a loop."""
        names = Counter(opcode.split(".")[0] for opcode in opcodes)
        elements = PRODUCT_ELEMENTS * names["HMMA"]
        alu = sum(count for name, count in names.items() if name in ALU)
        return cls(len(opcodes) / elements, alu / elements, names["LDG"] / elements)


@dataclass(frozen=True)
class Count:
    """One line of the result."""

    recipe: str
    kind: Kind
    instructions: float
    alu: float
    loads: float
    mixed: float  # share of the elements in steps or tiles of mixed widths


class ToolMissing(Exception):
    """A program is not installed. The message says what to do."""


def disassembler(name: str) -> str:
    """Path of ``nvdisasm``: from PATH, or from the PyPI package.

    Raises:
        ToolMissing: it is not installed.
    """
    packaged = [str(found) for folder in sys.path for found in Path(folder).glob(f"nvidia/cu*/bin/{name}")]
    for found in (shutil.which(name), *packaged):
        if found is not None:
            return found
    raise ToolMissing(f"{name} is not there; pip install nvidia-cuda-nvdisasm, or name it by --nvdisasm")


def inner_loops(listing: str) -> list[list[str]]:
    """Opcodes of the innermost loops with matrix products in ``decode_attention``, in the order of addresses."""
    start = listing.index(".text.decode_attention")
    opcodes: list[str] = []
    label_at: dict[str, int] = {}
    back: list[tuple[int, int]] = []
    for line in listing[start:].splitlines():
        if line.startswith("//-----") and opcodes:
            break
        if label := re.match(r"(\.L_x_\d+):", line):
            label_at[label[1]] = len(opcodes)
        if found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*?)\s*;", line):
            target = re.search(r"`\((\.L_x_\d+)\)", found[2])
            if found[1].startswith("BRA") and target and target[1] in label_at:
                back.append((label_at[target[1]], len(opcodes)))
            opcodes.append(found[1])
    inner = [
        (first, last)
        for first, last in sorted(back)
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in back)
    ]
    loops = [opcodes[first : last + 1] for first, last in inner]
    return [loop for loop in loops if any(opcode.startswith("HMMA") for opcode in loop)]


def variant_of(pair: dict[Kind, Quantizer], head_dim: int) -> DecodeVariant:
    """The variant of the decode kernel for a layer, for up to four query heads per key-value head."""
    key, value = pair["key"], pair["value"]

    def bits(quantizer: Quantizer) -> int:
        return 0 if isinstance(quantizer, TrellisQuantizer) else quantizer.layout.widths[0]

    return DecodeVariant(
        head_dim=head_dim,
        heads=FEW_HEADS,
        key_bits=bits(key),
        value_bits=bits(value),
        outliers=key.outlier_cap + value.outlier_cap > 0,
        key_paths=key.codes_in_blocks,
        value_paths=value.codes_in_blocks,
    )


def loops_of(variant: DecodeVariant, arch: str, tools: argparse.Namespace) -> dict[Kind, dict[Widths, Loop]]:
    """The loops of the kernel for each kind of steps and tiles."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "decode.cubin"
        cubin.write_bytes(compile_cubin("decode.cu", variant.defines, arch, None, tools.nvcc))
        done = subprocess.run(
            [disassembler(tools.nvdisasm), "-c", str(cubin)], capture_output=True, text=True, check=True
        )
    kinds: list[tuple[Kind, Widths]] = []
    kinds += [("key", kind) for kind in ([_TABLE] if variant.key_bits else KEY_KINDS)]
    # Tiles of width 0 have no loop.
    kinds += [("value", kind) for kind in ([_TABLE] if variant.value_bits else VALUE_KINDS[1:])]
    loops = inner_loops(done.stdout)
    if len(loops) != len(kinds):
        raise SystemExit(f"{len(loops)} inner loops with matrix products where {len(kinds)} were expected")
    found: dict[Kind, dict[Widths, Loop]] = {"key": {}, "value": {}}
    for (kind, widths), opcodes in zip(kinds, loops, strict=True):
        found[kind][widths] = Loop.of(opcodes)
    if not variant.value_bits:
        found["value"][VALUE_KINDS[0]] = Loop(0.0, 0.0, 0.0)
    return found


def joined_heads(widths: Sequence[int], size: int, heads: int) -> Iterator[list[int]]:
    """The widths of a layer with every ``heads`` neighbouring heads joined."""
    count = len(widths) // size
    for first in range(count):
        numbers = [(first + i) % count for i in range(heads)]
        yield [width for number in numbers for width in widths[size * number : size * (number + 1)]]


def kinds_of(quantizer: Quantizer, kind: Kind, head_dim: int) -> Counter[Widths]:
    """Number of steps or tiles of each kind in a layer."""
    if not isinstance(quantizer, TrellisQuantizer):
        return Counter({_TABLE: 1})
    size = quantizer.shape.head_dim
    heads = max(head_dim // size, 1)
    found: Counter[Widths] = Counter()
    for widths in joined_heads(quantizer.widths, size, heads):
        if kind == "key":
            pairs = channel_pairs(quantizer.rope, size)
            made = arrange_pairs(
                widths, [(a + size * head, b + size * head) for head in range(heads) for a, b in pairs]
            )
        else:
            made = arrange_values(widths)
        before = 0
        for name, end in zip(KEY_KINDS if kind == "key" else VALUE_KINDS, made.ends, strict=True):
            found[name] += end - before
            before = end
    return found


Loops = dict[Kind, dict[Widths, Loop]]


def counts_of(path: Path, arguments: argparse.Namespace, known: dict[DecodeVariant, Loops]) -> list[Count]:
    """Counts for one artifact. ``known`` has the loops of earlier variants."""
    layers = KVArtifact.load(path).quantizers()
    variant = variant_of(layers[0], arguments.head_dim)
    if variant not in known:
        known[variant] = loops_of(variant, arguments.arch, arguments)
    loops = known[variant]
    result = []
    for kind in KINDS:
        kinds: Counter[Widths] = Counter()
        for layer in layers:
            kinds += kinds_of(layer[kind], kind, arguments.head_dim)
        total = sum(kinds.values())

        def mean(field: str, kind: Kind = kind, kinds: Counter[Widths] = kinds, total: int = total) -> float:
            weighted = sum(getattr(loops[kind][name], field) * number for name, number in kinds.items())
            return round(weighted / total, 3)

        mixed = sum(number for name, number in kinds.items() if min(name) < 0) / total
        recipe = path.name.removesuffix(".kvq.safetensors")
        result.append(Count(recipe, kind, mean("instructions"), mean("alu"), mean("loads"), round(mixed, 3)))
    return result


def print_counts(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Print one line for keys and one for values of each artifact, and return them."""
    print(f"{'recipe':<10}{'kind':<7}{'all':>7}{'ALU':>7}{'loads':>7}{'mixed':>7}")
    counts: list[dict[str, object]] = []
    known: dict[DecodeVariant, Loops] = {}
    for path in arguments.artifacts:
        for count in counts_of(path, arguments, known):
            counts.append(asdict(count))
            print(
                f"{count.recipe:<10}{count.kind:<7}{count.instructions:>7.2f}{count.alu:>7.2f}{count.loads:>7.3f}"
                f"{count.mixed:>7.2f}",
                flush=True,
            )
    return counts


def main() -> int:
    """Print a table, and write it if requested."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--nvdisasm", default="nvdisasm")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    try:
        counts = print_counts(arguments)
        if arguments.json:
            write_atomically(arguments.json, (json.dumps(counts, indent=2) + "\n").encode())
    except (KVQError, ToolMissing) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
