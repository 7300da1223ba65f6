"""Two ranks give the result of one. A rank that dies ends the run, and resuming finishes it."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from models_zoo import tiny_model, tiny_tokenizer

from kvq_calib.artifact.artifact import KVArtifact

pytestmark = pytest.mark.model

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) if i % 6 else " " for i in range(6000))
#: Calibrates with checkpoints after every window; a rank named by DIE_AT_RANK kills itself after DIE_AFTER windows.
CODE = """
import os, signal
import kvq_calib.calibrate.checkpoint as checkpoint
checkpoint.CHECKPOINT_SECONDS = 0.0
if os.environ.get("DIE_AT_RANK", "none") == os.environ.get("RANK"):
    save, windows = checkpoint.Checkpoint.save, iter(range(int(os.environ["DIE_AFTER"])))
    def dying(keeper, state, **options):
        save(keeper, state, **options)
        if next(windows, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.Checkpoint.save = dying
from kvq_calib.cli.main import calibrate
calibrate()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "run.py").write_text(CODE)
    return folder


def run(place, output, *arguments, ranks=1, samples=7, **environment):
    command = [
        str(place / "run.py"),
        str(place / "model"),
        "-o",
        str(output),
        "--dataset",
        str(place / "text.txt"),
    ]
    command += ["--samples", str(samples), "--seqlen", "32", "--dtype", "float32", *arguments]
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    process = subprocess.Popen(
        [*launcher, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=settings,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("the run hangs")
    return process.returncode, out, err


def assert_same_artifact(a, b):
    assert a.spec == b.spec
    for layer, other in zip(a.layers, b.layers, strict=True):
        for kind in ("key", "value"):
            for name, tensor in layer.of(kind).tensors().items():
                torch.testing.assert_close(tensor, other.of(kind).tensors()[name], rtol=0, atol=1e-6)
    x = torch.randn(1, 2, 20, a.geometry.layers[0].head_dim, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(a.quantizers(), b.quantizers(), strict=True):
        for kind in ("key", "value"):
            assert torch.equal(mine[kind].quantize(x).codes, theirs[kind].quantize(x).codes)
    for kind in ("key", "value"):
        assert a.outliers_per_token[kind] == pytest.approx(b.outliers_per_token[kind])


def test_two_ranks_give_what_one_gives(place, tmp_path):
    alone, together = tmp_path / "alone.kvq.safetensors", tmp_path / "together.kvq.safetensors"
    assert run(place, alone)[0] == 0
    status, out, err = run(place, together, ranks=2)
    assert status == 0, err
    assert out.count("bits per element") == 1
    assert err.count("7 of") <= 2
    assert_same_artifact(KVArtifact.load(alone), KVArtifact.load(together))
    assert sorted(path.name for path in tmp_path.iterdir()) == [alone.name, together.name]


@pytest.mark.parametrize("die_after", [4])
def test_a_rank_that_dies_ends_the_run_and_resume_picks_it_up(place, tmp_path, die_after):
    output, alone = tmp_path / "a.kvq.safetensors", tmp_path / "alone.kvq.safetensors"
    started = time.monotonic()
    status, out, err = run(place, output, ranks=2, DIE_AT_RANK="1", DIE_AFTER=str(die_after))
    assert status != 0
    assert time.monotonic() - started < 120
    assert not output.exists()
    assert "bits per element" not in out
    assert list(tmp_path.glob("*.checkpoint.rank*"))
    status, _, err = run(place, output, "--resume", ranks=2)
    assert status == 0, err
    assert run(place, alone)[0] == 0
    assert_same_artifact(KVArtifact.load(alone), KVArtifact.load(output))
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.name, alone.name]


def test_fewer_windows_than_ranks_are_refused(place, tmp_path):
    status, _, err = run(place, tmp_path / "a.kvq.safetensors", ranks=2, samples=1)
    assert status != 0
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]  # one rank speaks
    assert "1 windows cannot be split over 2 ranks" in line
    assert not list(tmp_path.iterdir())
