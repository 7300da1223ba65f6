"""Translates PTX to C++: a call per instruction, a variable per register. ``semantics.h`` has the instructions.

Calls and the functions that they call are in two units. A kernel has tens of thousands of instructions but only a few
hundred different ones, so functions are compiled with optimization, and calls, without includes, in a few seconds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

TYPES = {
    *(f"{letter}{bits}" for letter in "sub" for bits in (8, 16, 32, 64)),
    *("f16", "f16x2", "bf16", "bf16x2", "f32", "f64", "pred"),
}
REGISTERS = {
    **{"pred": "bool", "f32": "float", "f64": "double", "f16": "uint16_t", "b16": "uint16_t"},
    **{f"{letter}{bits}": f"uint{bits}_t" for letter in "sub" for bits in (16, 32, 64)},
}
SPECIAL = {
    **{f"%tid.{axis}": f"uint32_t(threadIdx.{axis})" for axis in "xyz"},
    **{f"%ntid.{axis}": f"uint32_t(blockDim.{axis})" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"uint32_t(blockIdx.{axis})" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"uint32_t(gridDim.{axis})" for axis in "xyz"},
    "%laneid": "uint32_t(threadIdx.x % 32)",
}
#: Modifiers that say nothing about what a single thread reads or writes.
IGNORED = {
    "volatile",
    "nc",
    "relaxed",
    "weak",
    "gpu",
    "cta",
    "sys",
    "aligned",
    "uni",
    "L1::evict_first",
    "cg",
    "to",
}
SPACES = {"global", "shared", "param", "const", "local"}


class Unknown(Exception):
    """The PTX has something that the translator does not know."""


@dataclass
class Entry:
    """A kernel: its name, the bytes of its parameter, and its statements."""

    name: str
    param: str
    size: int
    statements: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Translation:
    """Two C++ units for one library.

    Attributes:
        calls: runs every kernel of a PTX file, as the shim's ``launch_<kernel>`` and ``size_<kernel>``.
        functions: the instructions that ``calls`` needs.
    """

    calls: str
    functions: str


#: What differs between instructions that share a function: constants and addresses.
_CONSTANT = re.compile(
    r"\b(?P<type>u?int(?:32|64)_t)\((?P<value>-?\d+u?ll|0x[0-9A-Fa-f]+(?:ull)?|uintptr_t\(table_\w+\))\)"
    r"|\bdecltype\((?P<typed>\w+)\)|\b(?P<site>site)\b|\b(?P<param>param)\b|(?<!::)\b(?P<name>[A-Za-z_]\w*)\b"
)


class Functions:
    """Functions of instructions, by their names."""

    def __init__(self) -> None:
        self.definitions: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def call(self, text: str, registers: Mapping[str, str], site: int) -> str:
        """A call that does the same as a statement.

        Args:
            text: C++ with registers, constants such as ``int64_t(5ll)``, ``param`` and ``site``.
            registers: C++ types of registers.
            site: number of the instruction.
        """
        given: dict[str, tuple[str, str]] = {}  # by argument: parameter and its type

        def parameter(match: re.Match[str]) -> str:
            if match["typed"]:
                return registers[match["typed"]]
            if match["name"] and match["name"] not in registers:
                return match[0]
            if match["site"]:
                argument, kind = str(site), "int"
            elif match["name"]:
                argument, kind = match["name"], f"{registers[match['name']]} &"
            else:
                kind, value = ("uint64_t", "param") if match["param"] else (match["type"], match["value"])
                argument = f"{kind}({value})"
            return given.setdefault(argument, (f"a{len(given)}", kind))[0]

        body = _CONSTANT.sub(parameter, text)
        signature = f"({', '.join(f'{kind} {name}' for name, kind in given.values())})"
        whole = f"{signature} {{ {body} }}"
        if whole not in self._names:
            name = f"i_{hashlib.sha256(whole.encode()).hexdigest()[:16]}"
            self._names[whole] = name
            self.definitions[name] = f'extern "C" void {name}{whole}'
        name = self._names[whole]
        return f"{name}({', '.join(given)});"

    def declarations(self) -> list[str]:
        """Declarations of all."""
        return [f"{definition.split(' {', 1)[0]};" for definition in self.definitions.values()]


def translate(text: str) -> Translation:
    """The C++ of a PTX file.

    Raises:
        Unknown: an instruction or directive that is not known.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    if re.search(r"^\s*\.shared\s", text, re.M) or ".local" in text:
        raise Unknown("statically allocated shared memory, or local memory")
    functions, lines = Functions(), []
    for kind, name, value in re.findall(
        r"^\s*(?:\.visible\s+)?\.(?:global|const)\s+\.align\s+\d+\s+\.(\w+)\s+([\w$]+)\s*=\s*(\w+)\s*;",
        text,
        re.M,
    ):
        lines.append(f'extern "C" const {REGISTERS[kind]} {_name(name)} = {value};')
    tables = re.findall(
        r"^\s*\.(?:global|const)\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]\s*=\s*\{([^}]*)\}\s*;", text, re.M
    )
    for name, count, values in tables:
        lines.append(f"alignas(16) static const uint8_t table_{_name(name)}[{count}] = {{{values}}};")
    symbols = {name: f"uint64_t(uintptr_t(table_{_name(name)}))" for name, _, _ in tables}
    symbols |= dict.fromkeys(
        re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", text), "0ull"
    )
    for entry in _entries(text):
        lines += _Kernel(entry, symbols, functions).lines()
    calls = ["#include <stdint.h>", _LAUNCH + ";", *functions.declarations(), *lines]
    launch = (
        _LAUNCH
        + " {\n    ptx::begin(shared_bytes, threads);\n    shim::launch(body, p, x, y, z, threads, shared_bytes);\n}"
    )
    made = [
        '#include "semantics.h"',
        launch,
        *(functions.definitions[name] for name in sorted(functions.definitions)),
    ]
    return Translation("\n".join(calls) + "\n", "\n".join(made) + "\n")


_LAUNCH = (
    'extern "C" void ptx_launch(void (*body)(const void *), const void *p, int x, int y, int z, int threads, '
    "int shared_bytes)"
)


def _entries(text: str) -> Iterator[Entry]:
    for found in re.finditer(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)[^{]*\{", text, re.S):
        param = re.search(r"\.param\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\]", found[2])
        if param is None:
            raise Unknown(f"the parameters of {found[1]}: {found[2]!r}")
        end, depth = found.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield Entry(found[1], param[1], int(param[2]), list(_statements(text[found.end() : end - 1])))


def _statements(body: str) -> Iterator[str]:
    """Statements, labels with their colon, and the braces of scopes."""
    place = 0
    pattern = re.compile(r"\s*(?:([{}])|([$\w]+:)(?!:)|([^;]*?);)", re.S)
    while match := pattern.match(body, place):
        place = match.end()
        yield (match[1] or match[2] or match[3]).strip()
    if body[place:].strip():
        raise Unknown(body[place : place + 60])


def _name(name: str) -> str:
    return re.sub(r"[^\w]", "_", name.lstrip("%"))


def _operands(text: str) -> list[str]:
    """Operands between commas; braces and brackets keep theirs."""
    found, depth = [""], 0
    for letter in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [each.strip() for each in found if each.strip()]


class _Kernel:
    """The C++ of one kernel.

    Args:
        entry: what was read.
        symbols: addresses by name.
        functions: collects the functions of instructions.
    """

    def __init__(self, entry: Entry, symbols: dict[str, str], functions: Functions) -> None:
        self.entry, self.functions = entry, functions
        self.symbols = {**symbols, entry.param: "param"}
        self.registers: dict[str, str] = {}
        self.site = 0

    def lines(self) -> list[str]:
        """All of it."""
        name = self.entry.name
        top: list[str] = []
        code: list[str] = []
        depth = 0
        for statement in self.entry.statements:
            depth += {"{": 1, "}": -1}.get(statement, 0)
            if statement.startswith(".reg"):
                (code if depth else top).append(self._registers(statement))
            else:
                code.append(self._statement(statement))
        return [
            f"static void body_{name}(const void *given) {{",
            "const uint64_t param = uint64_t(uintptr_t(given));",
            *top,
            *code,
            "}",
            f'extern "C" void launch_{name}(const void *p, int x, int y, int z, int threads, int shared_bytes) {{',
            f"    ptx_launch(body_{name}, p, x, y, z, threads, shared_bytes);",
            "}",
            f'extern "C" int size_{name}() {{ return {self.entry.size}; }}',
        ]

    def _registers(self, statement: str) -> str:
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S)
        if found is None or found[1] not in REGISTERS:
            raise Unknown(statement)
        names: list[str] = []
        for each in found[2].split(","):
            many = re.fullmatch(r"\s*(%\w+)<(\d+)>\s*", each)
            names += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [each.strip()]
        # A name in a scope may stand for another type than elsewhere, so the last declaration counts.
        self.registers |= dict.fromkeys(map(_name, names), REGISTERS[found[1]])
        return f"{REGISTERS[found[1]]} {', '.join(map(_name, names))};"

    def _statement(self, statement: str) -> str:
        if statement in "{}" or not statement:
            return statement
        if statement.endswith(":"):
            return f"{_name(statement[:-1])}:;"
        if statement.startswith((".pragma", ".loc", ".file")):
            return ""
        guarded = re.match(r"@(!?)(%\w+)\s+(.*)", statement, re.S)
        guard = f"if ({guarded[1]}{_name(guarded[2])}) " if guarded else ""
        parts = (guarded[3] if guarded else statement).split(None, 1)
        opcode, rest = parts[0], parts[1] if len(parts) > 1 else ""
        self.site += 1
        base = opcode.split(".")[0]
        if base == "bra":
            return f"{guard}goto {_name(rest)};"
        if base in ("ret", "exit"):
            return f"{guard}return;"
        text = self._instruction(opcode, _operands(rest))
        return f"{guard}{self.functions.call(text, self.registers, self.site)}" if text else ""

    def _instruction(self, opcode: str, operands: list[str]) -> str:
        base, *modifiers = opcode.split(".")
        types = [each for each in modifiers if each in TYPES]
        rest = [each for each in modifiers if each not in TYPES and each not in IGNORED]
        if base in ("bar", "barrier"):
            return (
                f"ptx::warp_barrier(site, {self._value(operands[0])});"
                if "warp" in rest
                else "ptx::barrier();"
            )
        if base in ("membar", "fence", "prefetch"):  # thread blocks follow each other, and there is no cache
            return ""
        if base in ("ld", "st", "atom", "red"):
            return self._memory(base, rest, types[-1], operands)
        if base == "mov" and (operands[0][0] == "{" or operands[1][0] == "{"):
            return self._vector_move(operands)
        if base == "mma":
            vectors = [f"{{{', '.join(map(self._value, self._parts(each)))}}}" for each in operands[1:]]
            sums = self._parts(operands[0])
            name = "_".join(each for each in rest if each.startswith("m"))
            lines = f"float d[4]; ptx::mma_{name}(site, d, {', '.join(vectors)}); "
            return lines + " ".join(
                f"{_name(each)} = ptx::into<decltype({_name(each)})>(d[{i}]);" for i, each in enumerate(sums)
            )
        if base in ("shfl", "vote", "redux", "movmatrix", "activemask"):
            return self._of_warp(base, rest, types, operands)
        if base == "cvta":
            base_of = "ptx::shared_base()" if "shared" in rest else "0"
            sign = "-" if "to" in modifiers else "+"
            return f"{_name(operands[0])} = {self._value(operands[1])} {sign} {base_of};"
        name = "_".join(("op", base, *(each.replace("::", "_") for each in rest)))
        arguments = ", ".join(self._value(each) for each in operands[1:])
        kinds = ", ".join(f"ptx::{each}" for each in types)
        target = _name(operands[0])
        return f"{target} = ptx::into<decltype({target})>(ptx::{name}<{kinds}>({arguments}));"

    def _of_warp(self, base: str, rest: list[str], types: list[str], operands: list[str]) -> str:
        target = operands[0].split("|")
        name = "_".join((base, *(each for each in rest if each not in ("sync", "m8n8"))))
        kinds = f"<ptx::{types[-1]}>" if base == "redux" else ""
        arguments = ", ".join(["site", *map(self._value, operands[1:])])
        if base != "shfl":
            return f"{_name(target[0])} = ptx::{name}{kinds}({arguments});"
        inside = f" {_name(target[1])} = inside;" if len(target) > 1 else ""
        return f"bool inside; {_name(target[0])} = ptx::{name}({arguments}, inside);{inside}"

    def _memory(self, base: str, rest: list[str], kind: str, operands: list[str]) -> str:
        space = next((each for each in rest if each in SPACES), "generic")
        count = next((int(each[1]) for each in rest if each in ("v2", "v4")), 1)
        where = operands[0] if base in ("st", "red") else operands[1]
        address = self._address(where)
        size = f"sizeof(ptx::{kind})"
        place = f"char *const at = ptx::{space}_place(site, {address}, {count} * {size}, {int(base != 'ld') + int(base in ('atom', 'red'))});"
        if base in ("atom", "red"):
            if rest[-1] != "add" and "add" not in rest:
                raise Unknown(f"{base}.{'.'.join(rest)}")
            value = self._value(operands[-1])
            target = (
                f"{_name(operands[0])} = ptx::into<decltype({_name(operands[0])})>" if base == "atom" else ""
            )
            return f"{place} {target}(ptx::add_at<ptx::{kind}>(at, {value}));"
        if base == "ld":
            names = [_name(each) for each in (self._parts(operands[0]) if count > 1 else operands[:1])]
            # All are read before any is written: a target may be the address.
            read = " ".join(
                f"const ptx::{kind} x{i} = ptx::read<ptx::{kind}>(at, {i});" for i in range(count)
            )
            return f"{place} {read} " + " ".join(
                f"{name} = ptx::into<decltype({name})>(x{i});" for i, name in enumerate(names)
            )
        values = self._parts(operands[1]) if count > 1 else operands[1:2]
        return f"{place} " + " ".join(
            f"ptx::write<ptx::{kind}>(at, {i}, {self._value(each)});" for i, each in enumerate(values)
        )

    def _vector_move(self, operands: list[str]) -> str:
        if operands[0][0] == "{":
            names = [_name(each) for each in self._parts(operands[0])]
            return f"ptx::split({self._value(operands[1])}, {', '.join(names)});"
        parts = ", ".join(map(self._value, self._parts(operands[1])))
        target = _name(operands[0])
        return f"{target} = ptx::into<decltype({target})>(ptx::join({parts}));"

    @staticmethod
    def _parts(vector: str) -> list[str]:
        return [each.strip() for each in vector.strip("{} \n\t").split(",")]

    def _address(self, operand: str) -> str:
        inner = operand.strip("[] \n\t")
        base, _, offset = inner.partition("+")
        return f"uint64_t({self._value(base.strip())})" + (
            f" + int64_t({offset.strip()}ll)" if offset else ""
        )

    def _value(self, operand: str) -> str:
        operand = operand.strip()
        if operand.startswith("!"):
            return f"!{self._value(operand[1:])}"
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand in self.symbols:
            return self.symbols[operand]
        if operand.startswith("0f"):
            return f"uint32_t(0x{operand[2:]})"
        if operand.startswith("0d"):
            return f"uint64_t(0x{operand[2:]})"
        if re.fullmatch(r"-?\d+", operand):
            return f"int64_t({operand}ll)"
        if re.fullmatch(r"0x[0-9A-Fa-f]+U?", operand):
            return f"int64_t({operand.rstrip('U')}ull)"
        if operand.startswith("%") or re.fullmatch(r"[A-Za-z_]\w*", operand):
            return _name(operand)
        raise Unknown(f"operand {operand!r}")
