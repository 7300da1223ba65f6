"""Several ranks without a launcher: every split gives the same result, and one rank reports a failure.

Ranks are forked from a process that has imported everything, so that a run takes a second.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from models_zoo import tiny_model, tiny_tokenizer
from test_distributed import TEXT, assert_same_artifact

from kvq_calib.artifact.artifact import KVArtifact

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks"),
]


@pytest.fixture(scope="module")
def ranks_of():
    """The context that starts ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "kvq_calib.calibrate.run",
            "kvq_calib.model.load",
            "kvq_calib.data",
            "kvq_calib.cli.main",
            "test_ranks",
        ]
    )
    return context


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    model = tiny_model("llama")
    model.save_pretrained(folder / "model")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3] = float("nan")
    model.save_pretrained(folder / "broken")
    for name in ("model", "broken"):
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    return folder


def command(rank, ranks, port, folder, arguments, die):
    """One rank: `kvq-calibrate ARGUMENTS`, its words in files."""
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    from kvq_calib.calibrate import checkpoint
    from kvq_calib.cli import main as cli

    checkpoint.CHECKPOINT_SECONDS = 0.0
    if die:
        save = checkpoint.Checkpoint.save

        def dying(keeper, state, **options):
            save(keeper, state, **options)
            if state.done.get("codebooks") == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.Checkpoint.save = dying
    sys.argv = ["kvq-calibrate", *arguments]
    with (
        open(folder / f"{rank}.out", "w") as out,
        open(folder / f"{rank}.err", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        cli.calibrate()


def run(context, place, folder, *arguments, ranks=2, of_rank=None, model=None, die=(), samples=7):
    """Status of each rank, and the lines of all of them on stdout and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        words = [str(place / (model or {}).get(rank, "model")), "-o", str(folder / "a.kvq.safetensors")]
        words += ["--dataset", str(place / "text.txt"), "--samples", str(samples), "--seqlen", "32"]
        words += ["--dtype", "float32", "--device", "cpu", *arguments, *(of_rank or {}).get(rank, ())]
        job = (rank, ranks, port, folder, words, rank in die)
        processes.append(context.Process(target=command, args=job))
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "a rank hangs"
    said = [
        [line for rank in range(ranks) for line in (folder / f"{rank}.{end}").read_text().splitlines()]
        for end in ("out", "err")
    ]
    for file in (*folder.glob("*.out"), *folder.glob("*.err")):
        file.unlink()
    return [process.exitcode for process in processes], *said


#: Where the tables of tiny models weigh no more than those of real ones at the recipes' 4,096 tokens.
LONG = ("--set", "allocation.context=65536")


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def errors(lines):
    return [line for line in lines if line.lower().startswith("error")]


@pytest.mark.parametrize(
    ("recipe", "assignments"),
    [("nuq3-1p", ()), ("kvq3", ("--set", "learn=null", *LONG))],
    ids=["nuq3-1p", "kvq3"],
)
def test_any_split_gives_what_one_rank_gives(ranks_of, place, tmp_path, recipe, assignments):
    found = []
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        status, out, err = run(ranks_of, place, folder, "--config", recipe, *assignments, ranks=ranks)
        assert status == [0] * ranks, err
        assert len(out) == 1
        assert files(folder) == ["a.kvq.safetensors"]
        found.append(KVArtifact.load(folder / "a.kvq.safetensors"))
    for other in found[1:]:
        assert_same_artifact(found[0], other)


def test_learned_recipes_give_one_artifact_and_the_same_bytes_again(ranks_of, place, tmp_path):
    found = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        learning = ("--set", "learn={steps: 3, seqlen: 16}", *LONG)
        status, out, err = run(ranks_of, place, folder, "--config", "kvq3", *learning)
        assert status == [0, 0], err
        assert len(out) == 1
        assert sum("learning" in line for line in err) == 1  # one rank speaks
        assert files(folder) == ["a.kvq.safetensors"]
        found.append((folder / "a.kvq.safetensors").read_bytes())
    assert found[0] == found[1]
    assert KVArtifact.from_bytes(found[0]).calibration["learning"]["kl_before"] > 0


@pytest.mark.parametrize("other", [("--seed", "1"), ("--dtype", "bfloat16")], ids=" ".join)
def test_ranks_that_disagree_are_refused_in_one_line(ranks_of, place, tmp_path, other):
    arguments = ("--dataset", str(place / "text.txt"))
    status, out, err = run(ranks_of, place, tmp_path, *arguments, of_rank={1: other})
    assert status == [1, 1]
    assert not out
    (line,) = errors(err)
    assert "rank 1 has other settings, data or model than rank 0" in line
    assert not files(tmp_path)


def test_the_rank_that_fails_says_why_and_the_others_end_without_a_word(ranks_of, place, tmp_path):
    status, out, err = run(ranks_of, place, tmp_path, model={1: "broken"})
    assert status == [1, 1]
    assert not out
    (line,) = errors(err)
    assert "layer 1 gives values that are not finite; try --dtype" in line
    assert "a.kvq.safetensors" not in files(tmp_path)


def test_a_rank_that_is_killed_is_reported_by_another_and_resume_goes_on(ranks_of, place, tmp_path):
    status, out, err = run(ranks_of, place, tmp_path, die={1})
    assert status == [1, -signal.SIGKILL]
    assert not out
    (line,) = errors(err)
    assert "another rank ended" in line
    assert "--resume" in line
    assert files(tmp_path) == [f"a.kvq.safetensors.checkpoint.rank{rank}" for rank in (0, 1)]
    status, _, err = run(ranks_of, place, tmp_path, "--resume")
    assert status == [0, 0], err
    assert files(tmp_path) == ["a.kvq.safetensors"]
    resumed = (tmp_path / "a.kvq.safetensors").read_bytes()
    assert run(ranks_of, place, tmp_path)[0] == [0, 0]
    assert (tmp_path / "a.kvq.safetensors").read_bytes() == resumed
