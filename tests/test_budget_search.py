"""A budget that is found by measurement."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_zoo import tiny_model, tiny_tokenizer
from test_cli import TEXT, assert_one_line, call

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.budget_search import STEP, find_budget
from kvq_calib.errors import CalibrationError


def curve(height, slope, bend=0.0):
    """A divergence that falls with bits."""
    return lambda bits: height * math.exp(-slope * (bits - 3.4) + bend * (bits - 3.4) ** 2)


@given(
    st.floats(1e-4, 0.5), st.floats(0.6, 2.5), st.floats(-0.1, 0.1), st.floats(-7, 0).map(lambda power: 10**power)
)  # fmt: skip
def test_the_budget_is_the_smallest_of_those_that_meet_the_target(height, slope, bend, target):
    divergence, asked = curve(height, slope, bend), []

    def measured(bits):
        asked.append(bits)
        return divergence(bits)

    if divergence(6.0) > target:
        with pytest.raises(CalibrationError, match="no budget up to 6 bits") as caught:
            find_budget(target, measured)
        enough = float(str(caught.value).split("--target-kl ")[1].split()[0])
        assert divergence(6.0) <= enough < 1.2 * divergence(6.0)
        assert len(asked) <= 6
        return
    found, tried = find_budget(target, measured)
    assert tried == {bits: divergence(bits) for bits in asked}
    assert len(set(asked)) == len(asked) <= 10
    assert 1.5 <= found <= 6
    assert round(found / STEP) == pytest.approx(found / STEP)
    assert tried[found] <= target
    assert found == 1.5 or tried[found] >= 0.95 * target or divergence(found - STEP) > target


def test_a_usual_curve_takes_few_measurements():
    found, tried = find_budget(0.02, curve(0.0125, 1.2))
    assert (found, len(tried)) == (3.05, 4)


def test_what_wavers_ends_too():
    """Fits are not quite monotonic."""
    wavering = {round(n * STEP, 2): math.exp(-n * STEP) * (1.3 if n % 2 else 0.8) for n in range(30, 121)}
    for target in (0.2, 0.05, 0.01):
        found, tried = find_budget(target, wavering.__getitem__)
        assert tried[found] <= target
        assert len(tried) < 12


# --------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT[::-1])
    (folder / "short.txt").write_text(TEXT[:100])  # three windows
    return folder


def calibrate(place, *arguments, text="text.txt", output="new.kvq.safetensors"):
    return call(
        "calibrate", str(place / "model"), "-o", str(place / output), "--dataset", str(place / text), "--samples",
        "3", "--seqlen", "32", "--device", "cpu", "--set", "allocation.self_generated=0", "--set", "learn=null", "--set",
        "allocation.corrections=0", *arguments,
    )  # fmt: skip


@pytest.mark.model
def test_the_artifact_is_that_of_the_budget_and_says_how_it_was_found(place):
    status, out, err = calibrate(
        place, "--target-kl", "0.1", "--held-out-windows", "2", output="found.kvq.safetensors"
    )
    assert status == 0, err
    found = KVArtifact.load(place / "found.kvq.safetensors")
    record = found.calibration["budget_search"]
    bits = found.calibration["settings"]["allocation"]["bits_per_element"]
    assert f"the budget is {bits:g} bits" in err
    assert found.calibration["recipe"] == f"kvq-{bits:g}"
    assert f"{found.bits_per_element(4096):.3f} bits per element" in out
    assert record["held_out"]["windows"] == 2
    assert record["kl"] <= record["target_kl"] == 0.1
    assert dict(map(tuple, record["measured"]))[bits] == record["kl"]
    assert all(kl > 0.1 or at >= bits for at, kl in record["measured"])

    status, _, err = calibrate(place, "--bits", f"{bits:g}", output="same.kvq.safetensors")
    assert status == 0, err
    same = KVArtifact.load(place / "same.kvq.safetensors")
    for one, other in zip(found.layers, same.layers, strict=True):
        for kind in ("key", "value"):
            a, b = (each.of(kind).tensors() for each in (one, other))
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.model
def test_what_is_measured_is_not_what_was_calibrated_on(place):
    status, _, err = calibrate(place, "--target-kl", "0.1", text="short.txt")
    assert status == 1
    assert_one_line(err, "no window that calibration does not use", "--held-out")
    status, _, err = calibrate(
        place, "--target-kl", "0.1", "--held-out", str(place / "other.txt"), text="short.txt", output="o.kvq.safetensors"
    )  # fmt: skip
    assert status == 0, err
    record = KVArtifact.load(place / "o.kvq.safetensors").calibration["budget_search"]
    assert record["held_out"]["dataset"] == "other.txt"


@pytest.mark.model
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--target-kl", "1e-9"), 1, ("no budget up to 6 bits", "--target-kl")),
        (("--target-kl", "0.01", "--bits", "3"), 2, ("leave out --config and --bits",)),
        (("--target-kl", "0.01", "--config", "kvq3"), 2, ("leave out --config and --bits",)),
        (("--target-kl", "0"), 2, ("target-kl",)),
        (("--target-kl", "0.01", "--held-out", "nowhere.txt"), 1, ("nowhere.txt",)),
    ],
)
def test_what_cannot_be_is_said_in_a_line(place, arguments, status, words):
    found, _, err = calibrate(place, *arguments, output="none.kvq.safetensors")
    assert found == status
    assert "Traceback" not in err
    for word in words:
        assert word in err.strip().splitlines()[-1]
    assert not (place / "none.kvq.safetensors").exists()
