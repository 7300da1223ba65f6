"""A small part of benchmarks/robustness.py: hostile files are refused, and a killed run leaves no half-written file."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
from typing import Any

import pytest

from kvq_calib import KVArtifact
from kvq_calib.artifact.errors import ArtifactError

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("importable_benchmarks")]

SEED = 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from robustness_model import prepare

    return prepare(tmp_path_factory.mktemp("robustness"))


def failures(kind: str, place: Any, count: int) -> list[str]:
    import robustness_cases

    results = robustness_cases.run(kind, place, count, SEED)
    assert len(results) == count
    assert any(result.outcome == "refused" for result in results)
    return [result.line() for result in results if result.failed]


def test_artifacts(place: Any) -> None:
    assert not failures("artifacts", place, 300)


def test_saved_caches(place: Any) -> None:
    assert not failures("caches", place, 60)


def test_checkpoints_of_a_calibration(place: Any) -> None:
    assert not failures("checkpoints", place, 8)


def test_hostile_pickles(place: Any) -> None:
    assert not failures("pickles", place, 40)


@pytest.mark.parametrize("kind", ["kvq-calibrate", "kvq-eval --json", "saving a cache"])
def test_kill_leaves_nothing_half_written(place: Any, kind: str) -> None:
    import robustness_kills

    found = robustness_kills.run(kind, place, 1, SEED)
    assert found["kills"] == 1
    assert not found["failures"]


def test_the_record_counts_and_names_what_failed(place: Any) -> None:
    import robustness
    from common import environment
    from robustness_cases import Result

    content = {
        "environment": environment(),
        **robustness.measure(place, {"pickles": 3, "caches": 0}, 0, SEED),
    }
    assert list(content["files"]) == ["pickles"]
    assert sum(content["files"]["pickles"]["outcomes"].values()) == 3
    lines = robustness.report(content)
    assert any(line.startswith("| pickles | 3 |") for line in lines)
    assert "Nothing failed." in lines
    results = [
        Result("pickles", 0, "program", "refused", "no"),
        Result("pickles", 1, "program", "crash", "exit status -6"),
    ]
    content["files"]["pickles"] = robustness._summary(results)
    assert robustness.failures(content) == ["pickles: case 1, program: crash exit status -6"]
    assert robustness.report(content)[-1] == "- pickles: case 1, program: crash exit status -6"


# What follows holds the judge: it must notice what the tests above never show it.


@pytest.fixture(scope="module")
def good(place: Any) -> bytes:
    data: bytes = place.artifacts[0]
    return data


def test_what_is_accepted_with_other_content_is_a_failure(good: bytes) -> None:
    from hostile_files import hostile_file
    from robustness_cases import judged

    def careless(data: bytes) -> bytes:
        return data

    cases = [hostile_file(good, random.Random(number), sign=True) for number in range(200)]
    outcomes = [judged(case, careless, good)[0] for case in cases]
    assert all(outcome in ("changed", "same", "valid") for outcome in outcomes)
    assert {case.name for case, outcome in zip(cases, outcomes, strict=True) if outcome == "changed"} >= {
        *("flip_bits", "cut", "swap_tensors", "change_metadata", "change_values", "change_offsets"),
    }
    # Hardly any leaves the file as it is.
    assert sum(case.data == good for case in cases) < 5


def test_an_unforeseen_error_is_a_failure() -> None:
    from hostile_files import Case
    from robustness_cases import Refused, Result, judged

    def fails(error: BaseException) -> Any:
        def read(data: bytes) -> bytes:
            raise error

        return read

    for error, outcome in ((ValueError("x"), "error"), (MemoryError(), "error"), (Refused("no"), "refused")):
        assert judged(Case("any", b""), fails(error), b"good")[0] == outcome
    forged = Case("any", b"a", forged=True)
    assert judged(forged, lambda data: data, b"good") == ("valid", "")
    assert judged(forged, lambda data: data + b"x", b"good")[0] == "changed"
    for sound, outcome in ((True, "valid"), (False, "changed")):
        assert judged(forged, lambda data: b"content", b"good", lambda content, it=sound: it)[0] == outcome
    for outcome in ("changed", "error", "slow", "memory", "executed", "crash", "hang"):
        assert Result("any", 0, "attack", outcome, "").failed


def test_a_forger_can_sign(good: bytes) -> None:
    """The digest of docs/reference/format.md is no secret, so values are checked although it is right."""
    from hostile_files import Parts, can_sign, signed

    assert can_sign(good)
    parts = Parts.of(good)
    key, metadata = parts.metadata()
    metadata["calibration"]["recipe"] = "forged"
    parts.set_metadata(key, metadata)
    assert not can_sign(parts.joined())
    with pytest.raises(ArtifactError, match="digest"):
        KVArtifact.from_bytes(parts.joined())
    assert KVArtifact.from_bytes(signed(parts.joined())).calibration["recipe"] == "forged"


class Obedient(pickle.Unpickler):
    """Calls whatever a pickle names; for all but arrays and tensors that is something that notes the marker."""

    harmless = (
        "_reconstruct",
        "ndarray",
        "dtype",
        "_rebuild_tensor_v2",
        "_load_from_bytes",
        "OrderedDict",
        "encode",
    )

    def __init__(self, data: bytes, marker: str) -> None:
        super().__init__(io.BytesIO(data))
        self.marker = marker
        self.obeyed = False

    def find_class(self, module: str, name: str) -> Any:
        def obey(*arguments: Any, **options: Any) -> None:
            self.obeyed |= self.marker in str(arguments)

        return super().find_class(module, name) if name in self.harmless else obey


def test_the_attacks_are_real() -> None:
    """They are programs that an unpickler which runs what it is told would run, wherever in the pickle they stand."""
    from hostile_pickles import hostile_pickle, quantizers

    content, obeyed, programs = quantizers(1, 4), 0, 0
    for number in range(300):
        case = hostile_pickle(content, random.Random(number), "/the/marker")
        if case.name == "program":
            unpickler = Obedient(case.data, "/the/marker")
            with contextlib.suppress(Exception):
                unpickler.load()
            programs += 1
            obeyed += unpickler.obeyed
    assert programs > 50
    assert obeyed > programs / 6
