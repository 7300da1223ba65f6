"""The benchmark scripts run, in seconds on a tiny model."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import sys
import time
import types
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifact_factory import RECIPES, artifact_for
from models_zoo import needs_whole_models_on_disk, tiny_model, tiny_tokenizer

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.data import load_windows
from kvq_calib.model.load import LoadedModel
from kvq_calib.schema.recipe import calibration_config
from kvq_calib.schema.spec import LayerSpec

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("importable_benchmarks")]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(tiny_model("llama"), tiny_tokenizer(), "tiny")


def _silent(what: str, done: int, total: int) -> None:
    pass


def test_every_row_of_the_ablation_changes_the_base_recipe() -> None:
    import ablation

    rows = ablation.variants()
    configs = [row.config() for row in rows]
    assert rows[0].name == "base"
    assert len({row.name for row in rows}) == len(rows)
    settings = [config.model_dump_json(exclude={"description"}) for config in configs]
    assert len(set(settings)) == len(rows)


def test_the_ablation_covers_every_switch() -> None:
    """Each field of the specs that KVQuant's recipes may set takes more than one value over the rows."""
    import ablation

    configs = [row.config() for row in ablation.variants()]

    def values(get: Any) -> set[Any]:
        return {get(config) for config in configs}

    for kind in ("key", "value"):
        assert {"channel", "token"} <= values(lambda c, k=kind: getattr(c.cache, k).thresholds)
        assert values(lambda c, k=kind: getattr(c.cache, k).levels) == {"uniform", "normal_float", "kmeans"}
        assert {0.0, 0.005, 0.01, 0.02, 0.05} <= values(
            lambda c, k=kind: getattr(c.cache, k).outliers.fraction
        )
        assert len(values(lambda c, k=kind: getattr(c.cache, k).outliers.max_per_token)) > 1
        assert values(lambda c, k=kind: getattr(c.cache, k).q_norm) == {False, True}
        assert values(lambda c, k=kind: getattr(c.cache, k).bits) == {2, 3, 4}
    assert values(lambda c: c.cache.key.pre_rope) == {False, True}
    assert "channel_online" in values(lambda c: c.cache.key.thresholds)
    assert "token_normalized" in values(lambda c: c.cache.value.thresholds)
    assert values(lambda c: c.fit.weights) == {"fisher", "uniform"}
    assert values(lambda c: c.fit.solver) == {"exact", "lloyd"}
    assert values(lambda c: c.cache.sink_tokens) == {0, 1, 4}
    assert any(config.cache.layers for config in configs)


def test_overrides_of_the_edges_change_nothing_but_the_width() -> None:
    import ablation

    cache = next(row for row in ablation.variants() if row.name == "edges-4").config().cache
    layers = cache.resolved(4)
    for edge in (layers[0], layers[3]):
        assert edge.key == cache.key.model_copy(update={"bits": 4})
        assert edge.value == cache.value.model_copy(update={"bits": 4})
    assert layers[1].key.bits == 3


def test_ablation_goes_on_where_it_stopped(
    model_folder: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ablation

    output, work = tmp_path / "out.json", tmp_path / "work"
    arguments = [str(model_folder), "--calibration", str(text), "--evaluation", str(text), "--samples", "2"]
    arguments += ["--seqlen", "48", "--windows", "1", "--work", str(work), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/ablation.py", *arguments])
    ablation.main([*arguments, "--only", "base", "plain"])
    first = json.loads(output.read_text(encoding="utf-8"))
    assert [row["name"] for row in first["rows"]] == ["base", "plain"]
    assert str(tmp_path) not in output.read_text(encoding="utf-8")

    made = {file.name: file.stat().st_mtime_ns for file in work.iterdir()}
    ablation.main([*arguments, "--only", "base", "sink-0", "plain"])
    second = json.loads(output.read_text(encoding="utf-8"))
    assert [row["name"] for row in second["rows"]] == ["base", "sink-0", "plain"]
    assert [second["rows"][0], second["rows"][2]] == first[
        "rows"
    ]  # with the seconds they took: not measured again
    assert made.items() <= {file.name: file.stat().st_mtime_ns for file in work.iterdir()}.items()

    table = output.with_suffix(".md").read_text(encoding="utf-8")
    assert f"{second['rows'][1]['perplexity']:.3f}" in table
    assert "no exact sink token" in table
    assert "nuq3-1p" in capsys.readouterr().out


@pytest.mark.parametrize(("script", "first"), [("ablation", "base"), ("frontier", "kvq2")])
def test_an_unknown_row_is_refused(
    script: str, first: str, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stopped:
        module.main(["m", "--calibration", str(text), "--evaluation", str(text), "--only", "nothing"])
    assert stopped.value.code == 2
    assert f"the rows are {first}" in capsys.readouterr().err


def test_every_step_of_the_frontier_changes_the_one_before_and_the_last_is_the_recipe() -> None:
    import frontier

    steps = [
        row for row in frontier.variants() if row.name.startswith("step-") or row.name == frontier.THREE_BITS
    ]
    assert [row.name for row in steps] == [*(f"step-{number}" for number in range(14)), frontier.THREE_BITS]
    configs = [row.config() for row in steps]
    for before, after in pairwise(configs):
        assert before.model_dump(exclude={"description"}) != after.model_dump(exclude={"description"})
    for before, after in pairwise(steps[4:]):
        assert set(after.assignments) < set(before.assignments)
    unshaped = ("cache.value.noise_shaping=false",)
    assert configs[-1] == calibration_config(frontier.THREE_BITS, assignments=unshaped)


def test_the_frontier_measures_recipes_and_rivals(
    model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import frontier

    output = tmp_path / "out.json"
    arguments = [str(model_folder), "--calibration", str(text), "--evaluation", str(text), "--samples", "2"]
    arguments += ["--seqlen", "48", "--windows", "1", "--work", str(tmp_path), "--output", str(output)]
    arguments += ["--only", "step-0", "kivi-2", "kivi-4", "rotation-2", "rotation-4"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/frontier.py", *arguments])
    frontier.main(arguments)
    rows = {row["name"]: row for row in json.loads(output.read_text(encoding="utf-8"))["rows"]}
    assert set(rows) == {"step-0", "kivi-2", "kivi-4", "rotation-2", "rotation-4"}
    for rival in ("kivi", "rotation"):
        assert rows[f"{rival}-4"]["kl_mean"] < rows[f"{rival}-2"]["kl_mean"]
    assert rows["kivi-2"]["bits_per_element"] == 3.0
    assert output.with_suffix(".png").exists()
    table = output.with_suffix(".md").read_text(encoding="utf-8")
    assert f"{rows['step-0']['kl_mean']:.5f}" in table
    assert "## Recipes" not in table


def test_the_frontiers_record_is_of_the_rows_that_stand() -> None:
    import common
    import frontier

    results = BENCHMARKS / "results"
    content = json.loads((results / "frontier.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == [*(row.name for row in frontier.variants()), *frontier.rivals(64)]
    for row in frontier.variants():
        found = [rows[row.name][key] for key in ("switch", "text", "recipe", "changes")]
        assert found == [row.switch, row.text, row.recipe, list(row.assignments)]
    report = common.markdown(frontier.report(content))
    assert report.strip() == (results / "frontier.md").read_text(encoding="utf-8").strip()


@pytest.fixture(scope="module")
def artifact(loaded: LoadedModel, text: Path) -> KVArtifact:
    from kvq_calib.calibrate.run import calibrate
    from kvq_calib.model.fingerprint import model_fingerprint

    windows = load_windows(str(text), loaded.tokenizer, samples=3, seqlen=64)
    config = calibration_config("nuq3-1p", command_line={"samples": 3, "seqlen": 64})
    fingerprint = model_fingerprint(loaded.model)
    result = calibrate(loaded.model, windows, {"nuq3-1p": config}, model_id="tiny", model_config=fingerprint)
    return result.artifacts["nuq3-1p"]


def test_fit_captures_what_calibration_fits(
    loaded: LoadedModel, artifact: KVArtifact, text: Path, tmp_path: Path
) -> None:
    """The captured histograms give the very codebooks of the artifact, and the captured values the histogram."""
    import fit

    windows = load_windows(str(text), loaded.tokenizer, samples=3, seqlen=64)
    captured = fit.capture(loaded.model, artifact, windows.ids, layer=1)
    fit.save_captured(captured, tmp_path / "captured.safetensors")
    captured = fit.load_captured(tmp_path / "captured.safetensors")
    levels = [fit.fit_histogram(histogram, 8) for histogram in captured.histograms]
    stored = [params.of(kind).codebook[0] for params in artifact.layers for kind in ("key", "value")]
    for ours, theirs in zip(levels, stored, strict=True):
        assert np.allclose(ours, theirs.numpy(), atol=1e-3)
    for kind, histogram in zip(("key", "value"), captured.histograms[2:], strict=True):
        again = fit.build_histogram(captured.values[kind], captured.weights[kind], threads=2)
        assert torch.equal(again.counts, histogram.counts)
        assert torch.allclose(again.weights, histogram.weights, rtol=1e-4)


def test_an_artifact_stands_whatever_calibration_decided_layer_by_layer(
    loaded: LoadedModel, text: Path, tmp_path: Path
) -> None:
    import variants

    config = calibration_config("kvq3")
    windows = load_windows(str(text), loaded.tokenizer, samples=2, seqlen=48, split="calibration")
    without = {"key": config.cache.key.model_copy(update={"error_compensation": None})}
    usual = LayerSpec(key=config.cache.key, value=config.cache.value)
    spec = config.cache.model_copy(update={"layers": {0: usual.model_copy(update=without)}})
    made = {"settings": config.record(), "data": windows.source}
    file = tmp_path / "kvq3.kvq.safetensors"
    replace(artifact_for(loaded.model, spec), calibration=made).save(file)
    assert variants.stands(file, config, windows)
    for other in (
        "allocation.bits_per_element=3",
        "cache.key.error_compensation.refinement_passes=0",
        "cache.layers.0.key.max_bits=4",
    ):
        assert not variants.stands(file, calibration_config("kvq3", assignments=(other,)), windows)


def test_fit_compares_and_draws() -> None:
    import fit

    generator = torch.Generator().manual_seed(1)
    values = torch.rand(20000, generator=generator) * 2 - 1
    weights = torch.rand(20000, generator=generator) ** 4
    result = fit.compare("random", values, weights, 8, threads=2)
    assert result["ours"]["distortion"] == pytest.approx(
        4 / 8**2 / 12, rel=0.1
    )  # uniform values: width ** 2 / 12
    assert result["distortion_excess"] > -0.001
    assert min(result["sklearn"]["wall"], result["sklearn"]["cpu"], result["ours"]["histogram"]["wall"]) > 0
    assert min(result["speedup"], result["speedup_threads"], result["speedup_cpu"]) > 0

    captured = fit.Captured({"key": values, "value": values}, {"key": weights, "value": weights}, [])
    more_values, more_weights = fit.drawn(captured, "key", 50000)
    pairs = set(zip(values.tolist(), weights.tolist(), strict=True))
    assert set(zip(more_values.tolist(), more_weights.tolist(), strict=True)) <= pairs
    assert len(more_values) == 50000


def test_fit_runs(
    model_folder: Path, artifact: KVArtifact, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fit

    artifact.save(tmp_path / "a.kvq.safetensors")
    output = tmp_path / "fit.json"
    arguments = [str(model_folder), "--artifact", str(tmp_path / "a.kvq.safetensors"), "--text", str(text)]
    arguments += [
        "--samples",
        "2",
        "--seqlen",
        "64",
        "--levels",
        "4",
        "--drawn",
        "9000",
        "--output",
        str(output),
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks/fit.py", *arguments])
    fit.main(arguments)
    content = json.loads(output.read_text(encoding="utf-8"))
    assert [row["data"] for row in content["comparisons"]] == ["keys", "values", "keys, drawn"]
    assert content["comparisons"][2]["values"] == 9000
    assert content["codebooks"][0]["codebooks"] == 4
    assert str(tmp_path) not in output.read_text(encoding="utf-8")


def test_bare_backward_computes_the_gradients_that_calibration_needs(loaded: LoadedModel, text: Path) -> None:
    """The bare pass is no cheaper than it may be: its gradients are those of the Fisher pass."""
    import calibration_memory

    from kvq_calib.calibrate.gradients import fisher_pass
    from kvq_calib.model.capture import LayerKV, intercept

    ids = load_windows(str(text), loaded.tokenizer, samples=1, seqlen=300).ids
    want: dict[int, torch.Tensor] = {}
    fisher_pass(loaded.model, ids, lambda kv, keys, values: want.update({kv.layer: values}))
    got: dict[int, torch.Tensor] = {}

    def watch(kv: LayerKV) -> None:
        kv.values.register_hook(lambda gradient: got.update({kv.layer: gradient.clone()}))

    with intercept(loaded.model, watch):
        calibration_memory.bare_backward(loaded.model, ids)
    assert got.keys() == want.keys() == {0, 1}
    for layer, gradient in want.items():
        assert torch.allclose(got[layer] / (ids.shape[1] - 1), gradient, atol=1e-6)


def test_overhead_is_a_ratio_of_the_same_passes(loaded: LoadedModel, text: Path) -> None:
    import calibration_memory

    windows = load_windows(str(text), loaded.tokenizer, samples=2, seqlen=32)
    config = calibration_config("nuq3-1p", command_line={"samples": 2, "seqlen": 32})
    result = calibration_memory.overhead(loaded.model, windows, config, rounds=2)
    assert set(result["parts_wall"]) == {"thresholds", "codebooks", "fit"}
    assert len(result["ratios"]) == 2
    assert min(result["ratios"]) > 0
    assert result["ratio"] == pytest.approx(sum(result["ratios"]) / 2)  # the median of two
    assert result["ratio_cpu"] > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_calibration_memory_runs(
    model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import calibration_memory

    output = tmp_path / "memory.json"
    arguments = [str(model_folder), "--text", str(text), "--samples", "2", "--seqlen", "32"]
    arguments += ["--time-samples", "0", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/calibration_memory.py", *arguments])
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    calibration_memory.main(arguments)
    (row,) = json.loads(output.read_text(encoding="utf-8"))["memory"]
    assert row["samples"] == 2
    assert row["model_bytes"] > row["above_model_bytes"] >= 0
    assert "above it, MiB" in output.with_suffix(".md").read_text(encoding="utf-8")
    assert str(tmp_path) not in output.read_text(encoding="utf-8")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_peak_sees_memory_that_is_gone_again() -> None:
    import calibration_memory

    with calibration_memory.Peak() as peak:
        block = bytearray(b"x" * (64 << 20))
        time.sleep(0.1)
        del block
    assert peak.highest - peak.before > 48 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_both_ways_of_calibration_end_in_artifacts_of_like_error(
    model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import calibration

    output = tmp_path / "calibration.json"
    arguments = [str(model_folder), "--text", str(text), "--samples", "3", "--seqlen", "64"]
    arguments += ["--work", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr(calibration, "subprocess", _in_this_process())
    monkeypatch.setattr(sys, "argv", ["benchmarks/calibration.py", *arguments])
    calibration.main(arguments)
    content = json.loads(output.read_text(encoding="utf-8"))
    assert set(content["ways"]) == set(content["distortion"]) == {"ours", "everything"}
    for kind in ("key", "value"):
        mine, theirs = (content["distortion"][name][kind] for name in ("ours", "everything"))
        assert 0 < mine < 1.25 * theirs
        assert theirs < 1.25 * mine
    row = content["ways"]["ours"]
    assert row["passes"] + row["statistics_and_fit"] == pytest.approx(row["all"]["wall"])
    assert str(tmp_path) not in output.read_text(encoding="utf-8")


@needs_whole_models_on_disk
def test_offloaded_models_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import offload

    output = tmp_path / "offload.json"
    arguments = [
        "--hidden-size",
        "32",
        "--intermediate-size",
        "48",
        "--num-hidden-layers",
        "2",
        "--head-dim",
        "8",
    ]
    arguments += ["--num-attention-heads", "4", "--num-key-value-heads", "2", "--vocab-size", "64"]
    arguments += ["--seqlen", "16", "32", "--cpu-memory", "1KB", "--output", str(output)]
    monkeypatch.setattr(offload, "subprocess", _in_this_process())
    monkeypatch.setattr(sys, "argv", ["benchmarks/offload.py", *arguments])
    offload.main(arguments)
    rows = json.loads(output.read_text(encoding="utf-8"))["runs"]
    assert [row["seqlen"] for row in rows] == [16, 32]
    for row in rows:
        assert row["parameters_on_disk"] == row["parameters"]
        assert row["weight_bytes"] == 2 * row["parameters"]
        assert row["peak_bytes"] >= row["loaded_bytes"] > 0
        assert row["seconds"]["all"] >= row["seconds"]["codebooks"]
    assert "peak resident memory, GiB" in output.with_suffix(".md").read_text(encoding="utf-8")


def _in_this_process() -> Any:
    """Workers without the seconds that imports take: what takes the place of `subprocess` in one module.

    Not `subprocess.run` itself, which libraries call too.
    """
    import contextlib
    import io
    import subprocess
    import types

    def run(command: list[str], **_: Any) -> Any:
        module = importlib.import_module(Path(command[1]).stem)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            module.main(command[2:])
        return types.SimpleNamespace(stdout=out.getvalue())

    return types.SimpleNamespace(run=run, PIPE=subprocess.PIPE)


def test_decode_speed_takes_turns_and_reports(
    model_folder: Path, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import decode_speed

    path = tmp_path / "x.kvq.safetensors"
    artifact_for(loaded.model, RECIPES["nuq4-1p"]).save(path)
    monkeypatch.setattr(decode_speed, "SAMPLE_TOKENS", 70)
    monkeypatch.setattr(decode_speed, "_is_installed", lambda package: False)
    output = tmp_path / "speed.json"
    decode_speed.main(
        [
            *(str(model_folder), "--artifact", str(path), "--contexts", "100", "300"),
            *("--steps", "2", "--threads", "1", "--output", str(output)),
        ]
    )
    everything = json.loads(output.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in everything if "cache" in row]
    alone = {row["attention"] for row in everything if "attention" in row}
    assert alone == {
        "x",
        *(f"torch {kind}, {way}" for kind in ("float32", "bfloat16") for way in ("sdpa", "matmul")),
    }
    assert [(row["cache"], row["context"]) for row in rows] == [
        ("DynamicCache", 100),
        ("x", 100),
        ("DynamicCache", 300),
        ("x", 300),
    ]
    assert all(row["cpu_longest"] >= row["cpu_mean"] > 0 for row in rows)
    assert rows[2]["bytes"] == 2 * 2 * 32 * 4 * (300 + decode_speed.WARM_UP + 2)
    assert output.with_suffix(".md").read_text(encoding="utf-8").count("DynamicCache") == 3


def record(dataset: str, sha256: str, **windows: list[float]) -> dict[str, Any]:
    """As ``kvq-eval perplexity --json`` writes it: divergences of windows by artifact."""
    rows = [
        {"name": name.replace("_", "-"), "kl_mean": float(np.mean(own)), "kl_windows": own}
        for name, own in windows.items()
    ]
    count = len(next(iter(windows.values())))
    data = {"dataset": dataset, "windows": 9, "sha256": sha256}
    return {"artifacts": rows, "config": {"data": data, "windows_measured": count}}


def test_ratios_of_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import ratios

    rng = np.random.default_rng(0)
    under = rng.uniform(1, 2, 200)
    over = under * rng.normal(0.8, 0.05, 200)
    # The jackknife: every ratio without one of the windows.
    without = [(over.sum() - a) / (under.sum() - b) for a, b in zip(over, under, strict=True)]
    jackknife = np.sqrt(199 / 200 * np.square(without - np.mean(without)).sum())
    assert ratios.standard_error(list(over), list(under)) == pytest.approx(jackknife, rel=0.01)
    assert ratios.standard_error([1.0], [2.0]) == float("inf")

    records = [
        record("x.raw", "1", nuq4_1p=[0.25, 0.75]),
        record("x.raw", "1", kvq3=[0.2, 0.6], kvq4=[0.1, 0.1]),
    ]
    records += [record("y.raw", "2", kvq2=[0.5], nuq3_1p=[0.5], nuq4_1p=[0.1])]
    files = []
    for number, content in enumerate(records):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(content), encoding="utf-8")
    ratios.main([str(file) for file in files])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[2:] == [
        ["kvq3 / nuq4-1p", "x.raw", "2", "0.40000", "0.50000", "0.800", "0.000", "1"],
        ["kvq4 / nuq4-1p", "x.raw", "2", "0.10000", "0.50000", "0.200", "0.100", "0.25"],
        ["kvq2 / nuq3-1p", "y.raw", "1", "0.50000", "0.50000", "1.000", "inf", "1"],
    ]

    def refused(*names: Path) -> str:
        with pytest.raises(SystemExit) as stop:
            ratios.main([str(name) for name in names])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "nuq4-1p was measured twice on x.raw" in refused(files[0], files[0])
    assert "both of" in refused(files[0])
    files[1].write_text(json.dumps(record("x.raw", "other", kvq3=[0.2, 0.6])), encoding="utf-8")
    assert "both of" in refused(*files[:2])  # another text of the same name


def test_divergence_of_llama_cpp_from_its_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp_kl

    odds = {"f16": [0.5, 0.25, 0.25], "q4_0": [0.25, 0.5, 0.25], "q8_0": [0.5, 0.25, 0.25]}
    held: list[int] = []

    class Peer:
        def __init__(self, path: Path, cache_type: str, tokens: int) -> None:
            self.odds, self.room, self.length = odds[cache_type], tokens, 0

        def use_threads(self, threads: int) -> None:
            pass

        def logits(self, ids: np.ndarray) -> np.ndarray:
            self.length += len(ids)
            assert len(ids) <= 4
            assert self.length <= self.room
            return np.log(np.tile(np.float32(self.odds), (len(ids), 1)))

        def close(self) -> None:
            held.append(self.length)

    monkeypatch.setitem(sys.modules, "llama_cpp_model", types.SimpleNamespace(BATCH=4, LlamaCpp=Peer))
    rows = llama_cpp_kl.measure(
        Path("model.gguf"), torch.zeros(2, 10, dtype=torch.int64), ["q8_0", "q4_0"], 1
    )
    assert held == [10] * 6
    assert [row["type"] for row in rows] == ["q8_0", "q4_0"]
    assert rows[0]["kl_windows"] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert rows[1]["kl_windows"] == pytest.approx([0.25 * math.log(2)] * 2, rel=1e-6)
    assert rows[0]["top1"] == [1.0, 1.0]
    assert rows[1]["top1"] == [0.0, 0.0]


def test_table_of_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import accuracy_table

    file = tmp_path / "r.json"
    content = record("x.raw", "1", kvq3=[0.02, 0.04], nuq4_1p=[0.005])
    for one in content["artifacts"]:
        one |= {"bits_per_element": 3.4, "perplexity": 20.2, "baseline_perplexity": 20.0}
        one |= {"kl_p99": 0.25, "top1_agreement": 0.875}
    file.write_text(json.dumps(content), encoding="utf-8")
    accuracy_table.main([str(file)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[2:] == [
        ["`kvq3`", "x.raw", "2", "3.400", "1.0100", "0.0300 ± 0.0100", "0.250", "0.8750"],
        ["`nuq4-1p`", "x.raw", "1", "3.400", "1.0100", "0.00500", "0.250", "0.8750"],
    ]


@pytest.mark.parametrize(
    "file",
    sorted((BENCHMARKS / "artifacts").rglob("*.kvq.safetensors")),
    ids=lambda file: f"{file.parent.name}-{file.stem}",
)
def test_artifacts_are_what_their_names_say(file: Path) -> None:
    artifact = KVArtifact.load(file)
    assert artifact.to_bytes() == file.read_bytes()
    recipe = file.name.removesuffix(".kvq.safetensors")
    assert artifact.calibration["recipe"] == recipe
    budget = calibration_config(recipe).allocation
    if budget is not None:
        assert budget.bits_per_element - 0.001 < artifact.bits_per_element(4096) <= budget.bits_per_element
    assert "/" not in artifact.calibration["settings"]["dataset"]


@pytest.mark.parametrize(
    ("record", "folder"),
    [
        ("wikitext2", "smollm2-135m-wikitext2"),
        ("nuq-wikitext2", "smollm2-135m-wikitext2"),
        ("long-wikitext2", "smollm2-135m-wikitext2"),
        ("c4", "smollm2-135m-c4"),
        ("kvq-gemma3-270m-wikitext2", "gemma3-270m-wikitext2"),
    ],
)
def test_a_record_is_of_the_artifacts_that_stand_beside_it(record: str, folder: str) -> None:
    content = json.loads((BENCHMARKS / "results" / f"{record}.json").read_text(encoding="utf-8"))
    for name, digest in content["config"]["artifact_sha256"].items():
        file = BENCHMARKS / "artifacts" / folder / f"{name}.kvq.safetensors"
        assert digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_quantizing_costs_an_evaluation(
    model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import evaluation_speed

    artifact_for(tiny_model("llama"), RECIPES["nuq4-1p"]).save(tmp_path / "small.kvq.safetensors")
    monkeypatch.setattr(sys, "argv", ["benchmarks/evaluation_speed.py"])
    arguments = [str(model_folder), str(tmp_path / "small.kvq.safetensors"), "--dataset", str(text)]
    output = tmp_path / "found.json"
    evaluation_speed.main([*arguments, "--windows", "2", "--seqlen", "32", "--output", str(output)])
    passes = json.loads(output.read_text())["passes"]
    assert list(passes) == ["unquantized", "small"]
    assert passes["unquantized"]["ratio"] == {"mean": 1.0, "standard_error": 0.0}
    assert [len(own["seconds"]) for own in passes.values()] == [2, 2]  # the first window is not counted
    assert passes["small"]["ratio"]["mean"] > 0
    assert "| small |" in capsys.readouterr().out


def test_the_summary_of_recall_counts_all_tasks_together() -> None:
    import recall_summary

    cells = [
        {"length": 512, "unquantized": {"answered": before}, "artifacts": {"kvq3": {"answered": after}}}
        for before, after in (([True, True, False], [True, False, True]), ([True], [True]))
    ]
    rows = recall_summary.summary({"cells": cells, "bits_per_element": {"kvq3": {"512": 3.5}}})
    assert rows[0][:4] == ["unquantized", "512", "", "3 of 4"]
    assert rows[1][:5] == ["`kvq3`", "512", "3.50", "3 of 4", "2 of 3"]
    assert rows[1][6] == "+0.000"


def test_what_a_calibration_costs(
    model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import calibration_cost

    monkeypatch.setattr(sys, "argv", ["benchmarks/calibration_cost.py"])
    output = tmp_path / "found.json"
    recipes = ["--config", "nuq3", "--config", "nuq3-1p"]
    size = ["--samples", "2", "--seqlen", "32"]
    calibration_cost.main(
        [str(model_folder), "--dataset", str(text), *recipes, *size, "--output", str(output)]
    )
    rows = json.loads(output.read_text())["rows"]
    assert list(rows) == ["nuq3", "nuq3-1p"]
    assert all({"thresholds", "codebooks", "fit"} <= set(row["parts"]) for row in rows.values())
    assert all(row["seconds"]["cpu"] > 0 for row in rows.values())
    assert "| `nuq3` |" in capsys.readouterr().out
