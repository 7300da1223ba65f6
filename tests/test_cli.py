"""The commands as users run them: results on stdout, one line and the right status on errors."""

import ast
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models_zoo import tiny_model, tiny_tokenizer

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.cli import main as cli
from kvq_calib.cli.options import write_json
from kvq_calib.errors import ConfigError

pytestmark = pytest.mark.model

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) if i % 6 else " " for i in range(4000))
ARGUMENTS = ["--samples", "3", "--seqlen", "32", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, another model and text."""
    folder = tmp_path_factory.mktemp("cli")
    for name, overrides in (("model", {}), ("other", {"num_key_value_heads": 1})):
        tiny_model("llama", **overrides).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    (folder / "short.txt").write_text("too short")
    (folder / "long.txt").write_text(TEXT * 30)
    assert call("calibrate", str(folder / "model"), "-o", str(folder / "a.kvq.safetensors"), "--dataset",
                str(folder / "text.txt"), *ARGUMENTS)[0] == 0  # fmt: skip
    return folder


def call(command, *arguments):
    """Run an entry point in this process; return exit status, stdout and stderr."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    previous = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [f"kvq-{command}", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                getattr(cli, command)()
            except SystemExit as stop:
                status = stop.code
    finally:
        sys.argv = previous[0]
        signal.signal(signal.SIGTERM, previous[1])
    return status, out.getvalue(), err.getvalue()


def calibrate(place, *arguments, model="model", dataset="text.txt", output="new.kvq.safetensors"):
    return call("calibrate", str(place / model), "-o", str(place / output), "--dataset", str(place / dataset),
                *ARGUMENTS, *arguments)  # fmt: skip


def files(place):
    return sorted(path.name for path in place.iterdir())


def assert_one_line(err, *words):
    line = err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert line.lower().startswith("error: "), err
    for word in words:
        assert word in line


def assert_profile(err):
    """Times that add up to the whole, and peaks that only rise."""
    found = dict(re.findall(r"^  (\S.*?) +([\d.]+) (?:s|GiB)\b", err, re.MULTILINE))
    assert {"loading the model", "codebooks, the model", "codebooks, statistics", "fit", "statistics"} <= set(
        found
    )
    shares = [int(share) for share in re.findall(r"(\d+)%", err)]
    assert sum(shares) == pytest.approx(100, abs=len(shares) / 2)
    peaks = [
        float(found[f"peak resident {what}"]) for what in ("up to thresholds", "up to codebooks", "memory")
    ]
    assert 0 < peaks[0] <= peaks[1] <= peaks[2]
    assert float(found["weights in memory"]) < peaks[0]


def test_calibrate_then_evaluate_then_inspect(place, tmp_path):
    status, out, err = calibrate(place, "--profile", output="b.kvq.safetensors")
    assert status == 0
    assert "bits per element" in out
    assert_profile(err)
    assert KVArtifact.load(place / "b.kvq.safetensors").calibration["recipe"] == "nuq3-1p"
    assert str(place).encode() not in (place / "b.kvq.safetensors").read_bytes()  # artifacts are passed on

    report = tmp_path / "report.json"
    status, out, _ = call(
        "evaluate", "perplexity", str(place / "model"), "--artifact", str(place / "a.kvq.safetensors"),
        "--artifact", str(place / "b.kvq.safetensors"), "--dataset", str(place / "text.txt"), "--seqlen", "32",
        "--windows", "2", "--json", str(report),
    )  # fmt: skip
    assert status == 0
    assert "unquantized" in out
    assert str(place) not in report.read_text()
    content = json.loads(report.read_text())
    first, second = content["artifacts"]
    assert [first["name"], second["name"]] == ["a", "b"]
    assert set(first) == {
        "name", "bits_per_element", "perplexity", "baseline_perplexity", "kl_mean", "kl_p99", "kl_positions",
        "kl_windows",
        "top1_agreement", "tokens", "seconds", "mode",
    }  # fmt: skip
    assert len(first["kl_windows"]) == content["config"]["windows_measured"] == 2
    assert {**first, "name": "", "seconds": 0} == {**second, "name": "", "seconds": 0}
    assert content["config"]["data"]["windows"] == 2
    assert content["config"]["mode"] == "prefill"
    assert len(content["config"]["artifact_sha256"]["a"]) == 64

    facts = tmp_path / "facts.json"
    status, out, _ = call(
        "artifact",
        "inspect",
        str(place / "a.kvq.safetensors"),
        "--layers",
        "--context",
        "4096",
        "--json",
        str(facts),
    )
    assert status == 0
    assert "bits/element" in out
    loaded = KVArtifact.load(place / "a.kvq.safetensors")
    assert json.loads(facts.read_text())["bits_per_element"]["4096"] == loaded.bits_per_element(4096)


def test_the_field_of_the_text_is_an_option_of_both_commands(place, tmp_path):
    (place / "own.jsonl").write_text(
        "".join(json.dumps({"body": TEXT[i : i + 500]}) + "\n" for i in range(0, 4000, 500))
    )
    status, _, err = calibrate(place, dataset="own.jsonl", output="own.kvq.safetensors")
    assert status == 1
    assert_one_line(err, "body", "--text-field")
    assert calibrate(place, "--text-field", "body", dataset="own.jsonl", output="own.kvq.safetensors")[0] == 0
    artifact, result = place / "own.kvq.safetensors", tmp_path / "result.json"
    assert KVArtifact.load(artifact).calibration["settings"]["text_field"] == "body"
    assert call("evaluate", "perplexity", str(place / "model"), "--artifact", str(artifact), "--dataset",
                str(place / "own.jsonl"), "--text-field", "body", "--seqlen", "32", "--windows", "1",
                "--json", str(result))[0] == 0  # fmt: skip
    assert json.loads(result.read_text())["config"]["data"]["text_field"] == "body"


def test_the_same_seed_gives_the_same_bytes(place):
    assert calibrate(place, output="c.kvq.safetensors")[0] == 0
    assert (place / "a.kvq.safetensors").read_bytes() == (place / "c.kvq.safetensors").read_bytes()


def test_several_recipes_in_one_run(place):
    status, out, _ = calibrate(
        place,
        "--config",
        "nuq4",
        "--config",
        "nuq2-1p",
        "--set",
        "cache.sink_tokens=2",
        output="{recipe}.kvq.safetensors",
    )
    assert status == 0
    for recipe, bits in (("nuq4", 4), ("nuq2-1p", 2)):
        loaded = KVArtifact.load(place / f"{recipe}.kvq.safetensors")
        assert (loaded.spec.key.bits, loaded.spec.sink_tokens) == (bits, 2)
        assert f"{recipe}.kvq.safetensors" in out


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"arguments": ["--set", "cache.key.bits=17"]}, 1, ["cache.key.bits"]),
        ({"arguments": ["--set", "cache.key.colour=1"]}, 1, ["no such key"]),
        ({"arguments": ["--config", "nuq9"]}, 1, ["no recipe or file 'nuq9'"]),
        ({"arguments": ["--config", "nuq4", "--config", "nuq3"]}, 2, ["{recipe}"]),
        ({"arguments": ["--config", "nuq4", "--config", "nuq4"], "output": "{recipe}"}, 2, ["twice"]),
        ({"arguments": ["--samples", "0"]}, 2, ["--samples"]),
        ({"arguments": ["--no-such-option"]}, 2, ["--no-such-option"]),
        ({"arguments": ["--max-memory", "20GiB"]}, 2, ["--max-memory 20GiB", "cpu=64GiB"]),
        ({"arguments": ["--max-memory", "cpu=much"]}, 2, ["--max-memory cpu=much"]),
        ({"arguments": ["--max-memory", "cpu=1GiB"]}, 1, ["--device-map auto"]),
        ({"arguments": ["--device", "cuda:77"]}, 1, ["cuda"]),
        ({"arguments": ["--set", "cache.key.bits=9"]}, 1, ["cache.key.bits", "8"]),
        ({"arguments": ["--set", "bits=3"]}, 1, ["bits: no such key"]),
        ({"arguments": ["--set", "cache.layers.7.key.bits=4"]}, 1, ["layer override 7", "2 layers"]),
        ({"arguments": ["--seqlen", "4096"]}, 1, ["4096", "--seqlen"]),
        ({"model": "nowhere"}, 1, ["nowhere"]),
        ({"model": "nowhere.gguf"}, 1, ["nowhere.gguf"]),
        ({"model": "text.txt"}, 1, ["text.txt"]),
        ({"dataset": "nowhere.txt"}, 1, ["nowhere.txt"]),
        ({"dataset": "short.txt"}, 1, ["short.txt"]),
        ({"dataset": "model"}, 1, []),
        ({"output": "missing/a.kvq.safetensors"}, 1, ["missing", "No such file"]),
        ({"output": "model"}, 1, ["it is a folder"]),
    ],
    ids=str,
)
def test_bad_input_gets_one_line(place, options, status, words):
    before = files(place)
    arguments = options.pop("arguments", [])
    got, out, err = calibrate(place, *arguments, **options)
    assert got == status, err
    assert_one_line(err, *words)
    assert not out
    assert files(place) == before


def test_hub_datasets_without_network_name_the_local_ones(place):
    status, _, err = call(
        "calibrate", str(place / "model"), "-o", str(place / "x"), "--dataset", "c4", *ARGUMENTS
    )
    assert status == 1
    assert_one_line(err, "python-docs")


def test_an_artifact_for_another_model_is_refused(place):
    status, _, err = call(
        "evaluate", "perplexity", str(place / "other"), "--artifact", str(place / "a.kvq.safetensors"),
        "--dataset", str(place / "text.txt"), "--seqlen", "32",
    )  # fmt: skip
    assert status == 1
    assert_one_line(err, "num_key_value_heads", "calibrate this model first")


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_a_broken_artifact_is_refused(place, tmp_path, content):
    file = tmp_path / "broken.kvq.safetensors"
    data = (place / "a.kvq.safetensors").read_bytes()
    file.write_bytes(data[: len(data) // 2] if content is None else content)
    for command in (
        ("artifact", "inspect", str(file)),
        ("evaluate", "perplexity", str(place / "model"), "--artifact", str(file)),
    ):
        status, _, err = call(*command)
        assert status == 1
        assert_one_line(err, "broken.kvq.safetensors")
    status, _, err = call("artifact", "inspect", str(tmp_path / "none"))
    assert status == 1
    assert_one_line(err, "No such file")


def test_a_full_device_is_written_to_and_stays_a_device(place):
    """The real error of a full disk, from the device that is always full."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    status, out, err = calibrate(place, output="/dev/full")
    assert status == 1
    assert_one_line(err, "cannot write /dev/full", "No space left on device")
    assert not out
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    status, out, err = call("artifact", "inspect", str(place / "a.kvq.safetensors"), "--json", "/dev/null")
    assert status == 0, err
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_results_go_where_a_link_points(place, tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    assert call("artifact", "inspect", str(place / "a.kvq.safetensors"), "--json", str(link))[0] == 0
    assert link.is_symlink()
    assert json.loads(real.read_text())["bits_per_element"]


def test_home_is_known_where_the_shell_leaves_it(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(place / "model")
    (tmp_path / "text.txt").symlink_to(place / "text.txt")
    (tmp_path / "mine.yaml").write_text("cache:\n  key: {bits: 2}\n  value: {bits: 2, thresholds: token}\n")
    status, _, err = call(
        "calibrate", "~/model", "-o", "~/{recipe}.st", "--config", "~/mine.yaml", "--dataset", "~/text.txt", *ARGUMENTS
    )  # fmt: skip
    assert status == 0, err
    status, _, err = call("artifact", "inspect", "~/mine.st", "--json", "~/facts.json")
    assert status == 0, err
    status, _, err = call(
        "evaluate", "perplexity", "~/model", "--artifact", "~/mine.st", "--dataset", "~/text.txt", "--seqlen", "32",
        "--windows", "1", "--json", "~/results.json",
    )  # fmt: skip
    assert status == 0, err
    status, _, err = call(
        "evaluate", "report", "~/model", "--artifact", "~/mine.st", "--results", "~/results.json", "--dataset",
        "~/text.txt", "--seqlen", "32", "-o", "~/page.html",
    )  # fmt: skip
    assert status == 0, err
    status, _, err = call(
        "artifact", "export", "~/mine.st", "--format", "sglang", "-o", "~/scales", "--force"
    )
    assert status == 0, err
    assert {"mine.st", "facts.json", "results.json", "page.html", "scales"} <= set(files(tmp_path))


def test_what_is_wrong_is_said_before_a_model_is_loaded(place, monkeypatch):
    def never(*_, **__):
        raise AssertionError("loaded a model")

    monkeypatch.setattr("kvq_calib.model.load.load_model", never)
    status, _, err = calibrate(place, dataset="nowhere.txt")
    assert status == 1
    assert_one_line(err, "no such data set or file", "python-docs")
    evaluation = (
        "evaluate",
        "perplexity",
        str(place / "model"),
        "--artifact",
        str(place / "a.kvq.safetensors"),
    )
    status, _, err = call(*evaluation, "--dataset", str(place / "nowhere.txt"))
    assert status == 1
    assert_one_line(err, "no such data set or file")
    (place / "one.txt").write_text("x")
    for status, _, err in (
        calibrate(place, dataset="one.txt"),
        call(*evaluation, "--dataset", str(place / "one.txt"), "--seqlen", "32"),
    ):
        assert status == 1
        assert_one_line(err, "one.txt has at most 4 tokens", "use a smaller --seqlen or more text")
    status, _, err = call(*evaluation, "--json", str(place / "missing" / "report.json"))
    assert status == 1
    assert_one_line(err, "cannot write", "No such file")


def test_calibration_says_what_becomes_of_files_that_are_there(place, tmp_path, caplog):
    def said():
        lines = [record.getMessage().replace(str(tmp_path), "") for record in caplog.records]
        caplog.clear()
        return lines

    output = str(tmp_path / "a.kvq.safetensors")
    assert calibrate(place, output=output)[0] == 0
    assert said() == []
    assert calibrate(place, "--resume", output=output)[0] == 0
    assert said() == [
        "/a.kvq.safetensors is there already, and will be replaced",
        "there is no checkpoint /a.kvq.safetensors.checkpoint to resume from: this run starts from the beginning",
    ]
    (tmp_path / "b.kvq.safetensors.checkpoint").write_bytes(b"of another run")
    assert calibrate(place, output=str(tmp_path / "b.kvq.safetensors"))[0] == 0
    assert said() == [
        "/b.kvq.safetensors.checkpoint of an earlier run exists: --resume would continue from it, but this run replaces it"
    ]
    assert files(tmp_path) == ["a.kvq.safetensors", "b.kvq.safetensors"]


def test_a_run_that_fails_says_that_its_checkpoint_is_kept(place, tmp_path, monkeypatch):
    monkeypatch.setattr("kvq_calib.calibrate.checkpoint.CHECKPOINT_SECONDS", 0.0)

    def fail(*_, **__):
        raise MemoryError("out of memory")

    output = tmp_path / "a.kvq.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr("kvq_calib.calibrate.run.assemble", fail)
        status, _, err = calibrate(place, output=str(output))
    assert status == 1
    assert_one_line(err, "out of memory", "the same command with --resume goes on from its checkpoint")
    checkpoint = tmp_path / f"{output.name}.checkpoint"
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[:-1])
    status, _, err = calibrate(place, "--resume", output=str(output))
    assert status == 1
    assert_one_line(err, "not a checkpoint of this run")
    assert "goes on" not in err  # it would be refused again
    checkpoint.write_bytes(data)
    assert calibrate(place, "--resume", output=str(output))[0] == 0
    assert files(tmp_path) == [output.name]


def test_a_second_run_with_the_same_output_is_refused(place, tmp_path):
    from kvq_calib.files import exclusive

    output = tmp_path / "a.kvq.safetensors"
    with exclusive(output):
        status, _, err = calibrate(place, output=str(output))
        assert status == 1
        assert_one_line(err, "another run is writing", output.name)
    assert calibrate(place, output=str(output))[0] == 0


def test_a_slip_in_the_name_of_the_output_is_a_usage_error(place, tmp_path):
    status, _, err = calibrate(place, output=str(tmp_path / "{recpie}.kvq.safetensors"))
    assert status == 2
    assert "{recpie} in the output means nothing; write {recipe}" in err
    assert not files(tmp_path)


@pytest.mark.parametrize(("text", "seqlen", "words"), [("short.txt", "32", ["short.txt", "at most 12 tokens"]),
                                                       ("long.txt", "4096", ["4096", "positions"])])  # fmt: skip
def test_evaluation_refuses_windows_that_do_not_fit(place, text, seqlen, words):
    status, out, err = call(
        "evaluate", "perplexity", str(place / "model"), "--artifact", str(place / "a.kvq.safetensors"), "--dataset",
        str(place / text), "--seqlen", seqlen,
    )  # fmt: skip
    assert status == 1
    assert_one_line(err, *words, "--seqlen")
    assert not out


def test_inspect_describes_what_most_layers_have(place):
    override = "cache.layers.0.key={bits: 8, outliers: {fraction: 0}}"
    assert calibrate(place, "--set", override, output="o.kvq.safetensors")[0] == 0
    status, out, _ = call("artifact", "inspect", str(place / "o.kvq.safetensors"))
    assert status == 0
    assert "3 bits per element, kmeans levels, thresholds for each token, 1.0% exact outliers" in out
    assert "1 of 2 layers differ" in out


def test_a_full_disk_leaves_nothing_behind(place, monkeypatch):
    before = files(place)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvq_calib.files.os.fsync", full)
    status, _, err = calibrate(place, output="full.kvq.safetensors")
    assert status == 1
    assert_one_line(err, "No space left on device")
    assert files(place) == before


def test_unforeseen_errors_are_one_line_unless_debugging(place, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("kvq_calib.calibrate.run.calibrate", broken)
    status, _, err = calibrate(place)
    assert status == 1
    assert_one_line(err, "RuntimeError: first line second line", "--debug")
    status, _, err = calibrate(place, "--debug")
    assert status == 1
    assert "Traceback" in err


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_leaves_no_half_artifact_and_resume_finishes(place, tmp_path, stop):
    output = tmp_path / "a.kvq.safetensors"
    command = [
        sys.executable, "-c",
        # Whoever starts the tests in the background leaves this signal ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import os, sys, time, kvq_calib.calibrate.checkpoint as p; p.CHECKPOINT_SECONDS = 0.0\n"
        "save = p.Checkpoint.save\n"
        "pause = float(os.environ.get('PAUSE', '0'))\n"
        "p.Checkpoint.save = lambda *args, **options: (save(*args, **options), time.sleep(pause))\n"
        "from kvq_calib.cli.main import calibrate; calibrate()",
        str(place / "model"), "-o", str(output), "--dataset", str(place / "text.txt"), *ARGUMENTS, "--samples", "100",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PAUSE": "0.1"},
    )  # slow enough to be stopped on a busy machine
    checkpoint = tmp_path / "a.kvq.safetensors.checkpoint"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(stop)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert_one_line(err, "interrupted", "--resume")
    assert not out
    assert files(tmp_path) == [checkpoint.name]
    finished = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert files(tmp_path) == [output.name]
    uninterrupted = tmp_path / "b.kvq.safetensors"
    assert calibrate(place, "--samples", "100", output=str(uninterrupted))[0] == 0
    assert uninterrupted.read_bytes() == output.read_bytes()


def test_an_interrupted_evaluation_leaves_what_was_measured(place, tmp_path, monkeypatch):
    from kvq_calib.evaluate.contenders import PrefillContender

    whole = tmp_path / "whole.json"
    partial = tmp_path / "partial.json"
    command = (
        "evaluate", "perplexity", str(place / "model"), "--artifact", str(place / "a.kvq.safetensors"), "--dataset",
        str(place / "text.txt"), "--seqlen", "32", "--windows", "3", "--json",
    )  # fmt: skip
    assert call(*command, str(whole))[0] == 0
    logits, passes = PrefillContender.logits, []

    def interrupted(contender, ids):
        passes.append(ids)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return logits(contender, ids)

    monkeypatch.setattr(PrefillContender, "logits", interrupted)
    status, out, err = call(*command, str(partial))
    assert status == 1
    assert not out
    assert_one_line(err, "interrupted", f"{partial} has the results of 2 windows of 3")
    (done,), (all_of_it,) = (json.loads(file.read_text())["artifacts"] for file in (partial, whole))
    assert done["kl_windows"] == all_of_it["kl_windows"][:2]
    assert json.loads(partial.read_text())["config"]["windows_measured"] == 2


def test_help_is_immediate():
    for command in ("calibrate", "evaluate", "artifact"):
        status, out, _ = call(command, "--help")
        assert status == 0
        assert "Usage" in out
        assert "--debug" in out


def test_help_imports_no_torch():
    """Of a subcommand too; what it costs is seconds."""
    code = (
        "import sys; from kvq_calib.cli.main import evaluate; sys.argv = ['kvq-eval', 'perplexity', '--help']\n"
        "try: evaluate()\n"
        "finally: assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Usage: kvq-eval perplexity" in ran.stdout


@pytest.mark.parametrize("place_of_it", [1, 2, None])
def test_debug_is_known_before_and_after_the_subcommand(place, place_of_it):
    command = ["evaluate", "perplexity", str(place / "model"), "--artifact", str(place / "text.txt")]
    if place_of_it is not None:
        command.insert(place_of_it, "--debug")
    status, _, err = call(*command)
    assert status == 1
    assert ("Traceback" in err) == (place_of_it is not None)
    assert err.splitlines()[-1].startswith("error: ")


def test_no_function_of_the_commands_takes_more_than_seven_parameters():
    for file in Path(cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                count = len(node.args.args) + len(node.args.kwonlyargs)
                assert count <= 7, f"{file.name}: {node.name} takes {count}"


# ------------------------------------------------------------------------------ what the figures rest on


@pytest.fixture(scope="module")
def large_keys(place):
    """A model whose keys are larger than float16 holds, and an artifact for it that stores exact tokens in float16."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight *= 1e6
    model.save_pretrained(place / "large")
    tiny_tokenizer().save_pretrained(place / "large")
    file = place / "large.kvq.safetensors"
    status, _, err = calibrate(place, model="large", output=file.name)
    assert status == 0, err
    made = KVArtifact.load(file)
    assert made.spec.storage_dtype == "bfloat16"
    spec = made.spec.model_copy(update={"storage_dtype": "float16"})
    dataclasses.replace(made, spec=spec).save(file)
    return place


def test_results_that_are_not_finite_end_with_one_line_and_no_json(large_keys, tmp_path):
    report = tmp_path / "report.json"
    arguments = [
        str(large_keys / "large"), "--artifact", str(large_keys / "large.kvq.safetensors"), "--dataset",
        str(large_keys / "text.txt"), "--seqlen", "32", "--windows", "1", "--json", str(report),
    ]  # fmt: skip
    for command in ("perplexity", "compare"):
        rival = ["--rival", "fp8-head"] if command == "compare" else []
        status, out, err = call("evaluate", command, *arguments, *rival)
        assert status == 1
        assert_one_line(
            err, "large gives predictions that are not finite", "--set cache.storage_dtype=bfloat16"
        )
        assert not out
        assert not report.exists()


def test_json_never_holds_what_is_no_number(tmp_path):
    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="not a finite number"):
            write_json(str(tmp_path / "x.json"), {"artifacts": [{"kl_mean": value}]})
    assert not files(tmp_path)


def test_recent_exact_tokens_are_measured_in_decode_mode_and_all_say_so(place, tmp_path):
    assert calibrate(place, "--set", "cache.recent_tokens=64", output="recent.kvq.safetensors")[0] == 0
    report = tmp_path / "report.json"
    status, out, err = call(
        "evaluate", "perplexity", str(place / "model"), "--artifact", str(place / "a.kvq.safetensors"), "--artifact",
        str(place / "recent.kvq.safetensors"), "--dataset", str(place / "text.txt"), "--seqlen", "32", "--windows", "1",
        "--json", str(report),
    )  # fmt: skip
    assert status == 0, err
    content = json.loads(report.read_text())
    assert [one["mode"] for one in content["artifacts"]] == ["prefill", "decode"]
    assert content["config"]["mode"] == "prefill"  # what was asked for
    plain, recent = content["artifacts"]
    assert plain["kl_mean"] > 1e-3
    assert recent["kl_mean"] < 1e-5  # the whole window is recent
    assert re.search(r"a +│ prefill +│", out)
    assert re.search(r"recent +│ decode +│", out)
    assert "recent: measured in decode mode, 32 tokens per step: its newest 64 tokens are exact" in err
    assert "a: measured" not in err


def test_no_remote_code_runs_unless_asked(place, tmp_path):
    model = tmp_path / "remote"
    shutil.copytree(place / "model", model)
    config = json.loads((model / "config.json").read_text())
    config.update(model_type="surprise", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text("open('ran', 'w')\nraise SystemExit('ran')\n")
    status, _, err = call(
        "calibrate", str(model), "-o", str(tmp_path / "x"), "--dataset", str(place / "text.txt"), *ARGUMENTS
    )
    assert status == 1
    assert_one_line(err)
    assert not (tmp_path / "ran").exists()


def test_memory_of_artifacts_shapes_and_the_paper(place, tmp_path):
    report = tmp_path / "memory.json"
    status, out, _ = call(
        "evaluate", "memory", "--artifact", str(place / "a.kvq.safetensors"), "--shape", "llama-3-8b", "--config", "nuq3-1p",
        "--context", "4096", "--paper", "--json", str(report),
    )  # fmt: skip
    assert status == 0
    content = json.loads(report.read_text())
    loaded = KVArtifact.load(place / "a.kvq.safetensors")
    assert content["reports"]["a"][0]["bits_per_element"] == pytest.approx(loaded.bits_per_element(4096))
    assert 3.3 < content["reports"]["llama-3-8b nuq3-1p"][0]["bits_per_element"] < 3.4
    beside = [(row["gb"], row["paper_gb"]) for row in content["paper"] if row["paper_gb"]]
    assert len(beside) >= 4
    assert all(ours == pytest.approx(theirs, rel=0.01) for ours, theirs in beside)
    assert "LLaMA-7B" in out
    assert call("evaluate", "memory")[0] == 2
    status, _, err = call("evaluate", "memory", "--shape", "gpt-9")
    assert status == 1
    assert_one_line(err, "gpt-9", "llama-7b")


@pytest.mark.parametrize("name", ["recall", "passkey"])
def test_recall_from_the_command_line(place, tmp_path, name):
    report = tmp_path / "recall.json"
    chosen = ["--task", "key-value", "--needles", "2"] if name == "recall" else []
    status, out, err = call(
        "evaluate", name, str(place / "model"), "--artifact", str(place / "a.kvq.safetensors"), "--length", "400",
        "--texts", "2", *chosen, "--json", str(report),
    )  # fmt: skip
    assert status == 0, err
    content = json.loads(report.read_text())
    (cell,) = content["cells"]
    assert (cell["length"], cell["questions"]) == (400, 4 if chosen else 2)
    assert cell["artifacts"]["a"]["share"] * cell["questions"] == sum(cell["artifacts"]["a"]["answered"])
    assert content["config"]["tasks"] == ["key-value" if chosen else "passkey"]
    assert content["bits_per_element"]["a"].keys() == {"400"}
    assert "unquantized" in out


def test_generate_from_the_command_line(place, tmp_path):
    report = tmp_path / "generate.json"
    status, out, err = call(
        "evaluate", "generate", str(place / "model"), "--artifact", str(place / "a.kvq.safetensors"), "--texts", "2",
        "--length", "100", "--tokens", "5", "--task", "code", "--task", "copying", "--json", str(report),
    )  # fmt: skip
    assert status == 0, err
    content = json.loads(report.read_text())
    assert [(cell["task"], cell["texts"]) for cell in content["cells"]] == [
        ("code", 2),
        ("copying", 2),
        ("all", 4),
    ]
    assert content["config"]["tokens"] == 5
    assert "edit distance" in out


def test_decode_mode_from_the_command_line(place, tmp_path):
    report = tmp_path / "decode.json"
    status, _, err = call(
        "evaluate", "perplexity", str(place / "model"), "--artifact", str(place / "a.kvq.safetensors"), "--dataset",
        str(place / "text.txt"), "--seqlen", "64", "--windows", "1", "--mode", "decode", "--chunk", "32", "--json", str(report),
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(report.read_text())["config"]["mode"] == "decode"


def test_windows_longer_than_the_model_are_refused_with_the_reason(place):
    status, _, err = calibrate(place, "--seqlen", "100000", dataset="long.txt")
    assert status == 1
    assert_one_line(err, "windows of 100000 tokens", "positions", "--seqlen")


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_resume_finishes(place, tmp_path, monkeypatch):
    monkeypatch.setattr("kvq_calib.calibrate.checkpoint.CHECKPOINT_SECONDS", 0.0)
    sync, calls = os.fsync, iter(range(3))

    def full(handle):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    output = tmp_path / "a.kvq.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        status, out, err = calibrate(place, output=str(output))
    assert status == 1
    assert_one_line(err, "No space left on device", "free some space")
    assert not out
    assert files(tmp_path) == [f"{output.name}.checkpoint"]
    assert calibrate(place, "--resume", output=str(output))[0] == 0
    fresh = tmp_path / "b.kvq.safetensors"
    assert calibrate(place, output=str(fresh))[0] == 0
    assert fresh.read_bytes() == output.read_bytes()
