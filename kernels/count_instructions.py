"""Count the instructions of the decode kernel's inner loops in machine code, weighted by the widths of real artifacts.

No GPU is needed: nvcc compiles, nvdisasm (PyPI: ``nvidia-cuda-nvdisasm``) disassembles. Printed and written is what a
thread issues per element of keys and of values: all instructions, those of the integer unit, which takes one every
other clock, and loads from global memory. Softmax and what else is done once a page are not among them.

An artifact whose heads are smaller than ``--head-dim`` has neighbouring heads laid out as one.
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
from kvq_calib.runtime.cuda.decode import DecodeVariant
from kvq_calib.runtime.cuda.kinds import KEY_KINDS, VALUE_KINDS, Widths, arrange_pairs, arrange_values
from kvq_calib.schema.geometry import KINDS, Kind, channel_pairs

#: Elements of a thread that one matrix product takes, where up to four query heads share a key-value head.
PRODUCT_ELEMENTS = 8
#: Opcodes of the integer unit, 16 lanes wide for 32 threads: logic, shifts, permutes, comparisons, conversions.
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
#: Of levels that are looked up.
_TABLE: Widths = (0, 0)


@dataclass(frozen=True)
class Loop:
    """Per element of an inner loop."""

    instructions: float
    alu: float
    loads: float

    @classmethod
    def of(cls, opcodes: Sequence[str]) -> Loop:
        """Of a loop's instructions."""
        names = Counter(opcode.split(".")[0] for opcode in opcodes)
        elements = PRODUCT_ELEMENTS * names["HMMA"]
        alu = sum(count for name, count in names.items() if name in ALU)
        return cls(len(opcodes) / elements, alu / elements, names["LDG"] / elements)


@dataclass(frozen=True)
class Count:
    """A line of the result."""

    recipe: str
    kind: Kind
    instructions: float
    alu: float
    loads: float
    mixed: float  # share of the elements that are in steps or tiles of mixed widths


class ToolMissing(Exception):
    """A program is not installed; the message says what to do."""


def disassembler(name: str) -> str:
    """``nvdisasm`` from the PATH, or of the PyPI package.

    Raises:
        ToolMissing: it is in neither.
    """
    packaged = [str(found) for folder in sys.path for found in Path(folder).glob(f"nvidia/cu*/bin/{name}")]
    for found in (shutil.which(name), *packaged):
        if found is not None:
            return found
    raise ToolMissing(f"{name} is not there; pip install nvidia-cuda-nvdisasm, or name it by --nvdisasm")


def inner_loops(listing: str) -> list[list[str]]:
    """Opcodes of the innermost loops of ``decode_attention`` that have matrix products, in the order of addresses."""
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


def variant_of(pair: dict[Kind, Quantizer], head_dim: int, group: int) -> DecodeVariant:
    """The decode kernel's variant for a layer."""
    key, value = pair["key"], pair["value"]

    def bits(quantizer: Quantizer) -> int:
        return 0 if isinstance(quantizer, TrellisQuantizer) else quantizer.layout.widths[0]

    return DecodeVariant(
        head_dim=head_dim,
        group=group,
        key_bits=bits(key),
        value_bits=bits(value),
        key_outliers=key.outlier_cap > 0,
        value_outliers=value.outlier_cap > 0,
        value_token=value.layout.token_params,
        rope=True,
        softcap=False,
        query_bfloat=False,
        storage_bfloat=False,
        key_paths=key.codes_in_blocks,
        value_paths=value.codes_in_blocks,
    )


def loops_of(variant: DecodeVariant, arch: str, tools: argparse.Namespace) -> dict[Kind, dict[Widths, Loop]]:
    """What the kernel has for each kind of steps and tiles."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "decode.cubin"
        cubin.write_bytes(compile_cubin("decode.cu", variant.defines, arch, None, tools.nvcc))
        done = subprocess.run(
            [disassembler(tools.nvdisasm), "-c", str(cubin)], capture_output=True, text=True, check=True
        )
    kinds: list[tuple[Kind, Widths]] = []
    kinds += [("key", kind) for kind in ([_TABLE] if variant.key_bits else KEY_KINDS)]
    # Tiles of no width have no loop.
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
    """Every head of a layer with the neighbours that make it ``heads`` times as large."""
    count = len(widths) // size
    for first in range(count):
        numbers = [(first + i) % count for i in range(heads)]
        yield [width for number in numbers for width in widths[size * number : size * (number + 1)]]


def kinds_of(quantizer: Quantizer, kind: Kind, head_dim: int) -> Counter[Widths]:
    """How many steps or tiles of each kind a layer has."""
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
    """Of one artifact; ``known`` are the loops of variants met before."""
    layers = KVArtifact.load(path).quantizers()
    variant = variant_of(layers[0], arguments.head_dim, arguments.group)
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
    """Print a line for keys and one for values of each artifact; return what they say."""
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
    """Print a table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--nvdisasm", default="nvdisasm")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--group", type=int, choices=range(1, 5), default=4, help="query heads per key-value head"
    )
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
