"""Reads hostile files one after the other, in a process that is replaced if a file crashes or blocks it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hostile_files import Case, can_sign, hostile_file
from hostile_pickles import hostile_pickle, quantizers
from robustness_model import (
    CACHE_TOKENS,
    HEAD_SIZE,
    HEADS,
    LAYERS,
    RECIPES,
    Place,
    calibration,
    call,
    load_model,
    started,
)

from kvq_calib import KVArtifact, KVQCache
from kvq_calib.errors import KVQError

#: Limits for one case: processor time, and growth of the peak resident memory.
SECONDS = 20.0
#: Seconds of wall time after which the reading process is replaced.
_PATIENCE = 60.0
GROWTH = 512 << 20
#: Additional memory that the reading process may reserve, to protect the machine.
_RESERVE = 6 << 30
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
#: Audit events that must not occur while a file is read.
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "ctypes.dlopen",
    "pty.spawn",
)
_PASSED = ("refused", "same", "valid")


class Refused(KVQError):
    """A command refused a file with an error of the package."""


@dataclass(frozen=True)
class Result:
    """What became of one case.

    Attributes:
        kind, number: identify the case.
        name: name of the attack.
        outcome: "refused", "same" (as the good file), "valid" (another one, signed again), "changed", "error", "slow",
            "memory", "executed", "crash" or "hang".
        detail: explanation, for readers.
        seconds: processor time.
        growth: growth of the peak resident memory in bytes.
    """

    kind: str
    number: int
    name: str
    outcome: str
    detail: str
    seconds: float = 0.0
    growth: int = 0

    @property
    def failed(self) -> bool:
        """Whether the outcome is a failure."""
        return self.outcome not in _PASSED

    def line(self) -> str:
        """One line for the record."""
        return f"case {self.number}, {self.name}: {self.outcome} {self.detail}".rstrip()


# --------------------------------------------------------------------------------- reading a kind of file

Read = Callable[[bytes], bytes]
"""Returns the content of a file in a comparable form."""
Whole = Callable[[bytes], bool]
"""Whether such content, from a forged file, is that of a valid file."""


@dataclass(frozen=True)
class _Good:
    """A valid file, and how such files are read.

    Attributes:
        data: the file.
        read: reads a file.
        sign: whether the digest can be computed.
        whole: checks the content. Without it, the content is itself a file of this kind, and must read as itself.
    """

    data: bytes
    read: Read
    sign: bool = False
    whole: Whole | None = None


def _artifacts(place: Place) -> list[_Good]:
    def read(data: bytes) -> bytes:
        artifact = KVArtifact.from_bytes(data)
        artifact.bits_per_element(4096)
        artifact.quantizers()
        return artifact.to_bytes()

    return [_Good(data, read, can_sign(data)) for data in place.artifacts]


def _caches(place: Place) -> list[_Good]:
    model = load_model(place)
    file = place.folder / "read.safetensors"

    def reader(recipe: str) -> Read:
        artifact = KVArtifact.load(place.artifact(recipe))

        def read(data: bytes) -> bytes:
            file.write_bytes(data)
            KVQCache.load(file, artifact, model).save(file)
            return file.read_bytes()

        return read

    readers = [read for recipe in RECIPES for read in [reader(recipe)] * len(CACHE_TOKENS)]
    return [_Good(data, read, can_sign(data)) for data, read in zip(place.caches, readers, strict=True)]


def _checkpoints(place: Place) -> list[_Good]:
    outputs = [place.folder / f"resumed-{recipe}.kvq.safetensors" for recipe in RECIPES]
    checkpoint = place.folder / f"{outputs[0].name}.checkpoint"
    words = calibration(place.folder, place.folder / "resumed-{recipe}.kvq.safetensors", "--resume")

    def read(data: bytes) -> bytes:
        for output in outputs:
            output.unlink(missing_ok=True)
        checkpoint.write_bytes(data)
        _command("kvq-calibrate", words)
        return b"".join(output.read_bytes() for output in outputs)

    def whole(content: bytes) -> bool:
        """Whether the files that the run wrote are artifacts."""
        return all(KVArtifact.load(output).to_bytes() == output.read_bytes() for output in outputs)

    return [_Good(data, read, can_sign(data), whole) for data in place.checkpoints]


def _pickles(place: Place) -> list[_Good]:
    file, output = place.folder / "quantizers.pickle", place.folder / "imported.kvq.safetensors"

    def read(data: bytes) -> bytes:
        file.write_bytes(data)
        output.unlink(missing_ok=True)
        _command(
            "kvq-artifact", ["import-kvquant", str(file), "-o", str(output), "--model", str(place.model)]
        )
        return output.read_bytes()

    return [_Good(pickle.dumps(_QUANTIZERS, protocol=2), read)]


_QUANTIZERS = quantizers(LAYERS, HEADS * HEAD_SIZE)
_KINDS: dict[str, Callable[[Place], list[_Good]]] = {
    "artifacts": _artifacts,
    "caches": _caches,
    "checkpoints": _checkpoints,
    "pickles": _pickles,
}


def _command(command: str, words: list[str]) -> None:
    status, _, err = call(command, words)
    last = (err.strip().splitlines() or [""])[-1]
    if status == 1 and last.startswith("error: ") and "--debug" not in last:
        raise Refused(last)
    if status:
        raise RuntimeError(f"exit status {status}: {last}")


# ------------------------------------------------------------------------------------------------- a case


class _Reader:
    """Makes and reads the cases of one kind.

    Args:
        kind: kind of file.
        place: see :func:`robustness_model.prepare`.
        seed: seed of the cases.
    """

    def __init__(self, kind: str, place: Place, seed: int) -> None:
        torch.set_num_threads(1)
        self.kind, self.seed = kind, seed
        self.goods = _KINDS[kind](place)
        self.contents = [good.read(good.data) for good in self.goods]
        self.marker = place.folder / "executed"
        self.forbidden: list[str] = []
        sys.addaudithook(self._listen)

    def _listen(self, event: str, _: Any) -> None:
        if event in _FORBIDDEN:
            self.forbidden.append(event)

    def case(self, number: int) -> tuple[Case, int]:
        """A case, and the number of the valid file from which it was made."""
        draw = random.Random(f"{self.seed} {self.kind} {number}")
        chosen = draw.randrange(len(self.goods))
        if self.kind == "pickles":
            return hostile_pickle(_QUANTIZERS, draw, str(self.marker)), chosen
        return hostile_file(self.goods[chosen].data, draw, self.goods[chosen].sign), chosen

    def result(self, number: int) -> Result:
        """Read one case."""
        case, chosen = self.case(number)
        peak, began = _peak(), time.process_time()
        self.forbidden.clear()
        good = self.goods[chosen]
        outcome, detail = judged(case, good.read, self.contents[chosen], good.whole)
        seconds, growth = time.process_time() - began, _peak() - peak
        if self.forbidden or self.marker.exists():
            outcome, detail = "executed", f"{self.forbidden} {detail}"
            self.marker.unlink(missing_ok=True)
        elif seconds > SECONDS:
            outcome, detail = "slow", f"{seconds:.0f} s, {outcome} {detail}"
        elif growth > GROWTH:
            outcome, detail = "memory", f"{growth >> 20} MiB, {outcome} {detail}"
        return Result(self.kind, number, case.name, outcome, detail, seconds, growth)


def judged(case: Case, read: Read, good: bytes, whole: Whole | None = None) -> tuple[str, str]:
    """Outcome and detail of a case.

    Args:
        case: the file.
        read: reads a file.
        good: content of the valid file.
        whole: see :class:`_Good`.
    """
    try:
        content = read(case.data)
        if content == good:
            return "same", ""
        if not case.forged:
            return "changed", "accepted with other content"
        sound = read(content) == content if whole is None else whole(content)
        return ("valid", "") if sound else ("changed", "it does not read what it writes")
    except KVQError as error:
        return "refused", " ".join(str(error).split())[:200]
    except BaseException as error:
        return "error", " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


def _bound_memory() -> None:
    """Limit the memory of the process far above what a reader needs."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        held = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + _RESERVE, resource.RLIM_INFINITY))


# ---------------------------------------------------------------------------------------------- all cases


def read_cases(connection: Any, kind: str, place: Place, seed: int, numbers: range) -> None:
    """The reading process: for each case, send its name, then its result."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries write to these directly
        os.dup2(null, stream)
    reader = _Reader(kind, place, seed)
    _bound_memory()
    for number in numbers:
        connection.send(reader.case(number)[0].name)
        connection.send(reader.result(number))
    connection.close()


def run(kind: str, place: Place, count: int, seed: int) -> list[Result]:
    """Read the first ``count`` cases of a kind.

    Raises:
        RuntimeError: the reading process cannot read the valid files.
    """
    results: list[Result] = []
    while len(results) < count:
        known = len(results)
        results += _until_one_ends_it(kind, place, seed, range(known, count))
        print(f"{kind}: {len(results)} of {count}", file=sys.stderr)
        if len(results) == known:
            raise RuntimeError(f"the good {kind} cannot be read; --case {kind}:0 shows why")
    return results


def _until_one_ends_it(kind: str, place: Place, seed: int, numbers: range) -> Iterator[Result]:
    """Results of one process. If it crashed or hung, that is the last result."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = started(read_cases, theirs, kind, place, seed, numbers)
    theirs.close()
    try:
        for number in numbers:
            name = ""
            try:
                name = ours.recv() if ours.poll(120) else ""
                if not name:
                    return
                if ours.poll(_PATIENCE):
                    yield ours.recv()
                    continue
                outcome, detail = "hang", f"more than {_PATIENCE:.0f} s"
            except EOFError:
                process.join()
                outcome, detail = "crash", f"exit status {process.exitcode}"
            if name:
                yield Result(kind, number, name, outcome, detail, _PATIENCE)
            return
    finally:
        process.kill()
        process.join()


def show(kind: str, place: Place, number: int, seed: int) -> None:
    """Repeat one case in this process, with its traceback."""
    reader = _Reader(kind, place, seed)
    case, chosen = reader.case(number)
    print(f"{kind} {number}: {case.name}, {len(case.data)} bytes", file=sys.stderr)
    content = reader.goods[chosen].read(case.data)
    print("read as the good file" if content == reader.contents[chosen] else "read with other content")
