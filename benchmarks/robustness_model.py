"""A tiny model with the files that robustness.py needs, and the commands, run in separate processes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import multiprocessing
import os
import pkgutil
import signal
import string
import sys
import time
import tomllib
import unittest.mock
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kvq_calib
from kvq_calib import KVArtifact, KVQCache

LAYERS, HEADS, HEAD_SIZE = 2, 2, 16
#: Recipes to calibrate together: one with a width for every channel, one with outliers.
RECIPES = ("kvq3", "nuq3-1p")
#: Changes so that the parameters are small even for a tiny model, and the fit takes no longer than the passes.
_ALLOCATION = {"context": 1_000_000, "corrections": 0}
#: Numbers of tokens of the caches that are saved for every artifact.
CACHE_TOKENS = (37, 300)
_ROOT = Path(__file__).parent.parent
#: Processes are forked from one that has imported everything, so that runs are killed at work and not during imports.
_PROCESSES = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Place:
    """A folder with the model, its text, and the files of undisturbed runs.

    Attributes:
        folder: the folder.
        artifacts, caches, checkpoints: valid files.
        expected: the artifact that calibration gives, by recipe.
    """

    folder: Path
    artifacts: tuple[bytes, ...]
    caches: tuple[bytes, ...]
    checkpoints: tuple[bytes, ...]
    expected: dict[str, bytes]

    @property
    def model(self) -> Path:
        """Folder of the model."""
        return self.folder / "model"

    def artifact(self, recipe: str) -> Path:
        """The valid artifact of a recipe."""
        return self.folder / f"{recipe}.kvq.safetensors"


def prepare(folder: Path) -> Place:
    """Write the model and its text to an empty folder, and make the valid files."""
    transformers.utils.logging.disable_progress_bar()
    _write_model(folder / "model")
    _write_text(folder / "text.txt")
    _write_recipe(folder / f"{RECIPES[0]}.yaml")
    checkpoints = _calibrated(folder)
    place = Place(folder, (), (), checkpoints, {})
    expected = {recipe: place.artifact(recipe).read_bytes() for recipe in RECIPES}
    caches = tuple(_saved_cache(place, recipe, tokens) for recipe in RECIPES for tokens in CACHE_TOKENS)
    return Place(folder, tuple(expected.values()), caches, checkpoints, expected)


def _write_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {
        token: number for number, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *string.printable])
    }
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def _write_text(file: Path) -> None:
    file.write_text(
        "".join(chr(97 + (i * i + i // 7) % 26) if i % 6 else " " for i in range(4000)), encoding="utf-8"
    )


def _write_recipe(file: Path) -> None:
    settings = yaml.safe_load((_ROOT / "configs" / file.name).read_text(encoding="utf-8"))
    settings.update(learn=None, allocation={**settings["allocation"], **_ALLOCATION})
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")


# --------------------------------------------------------------------------------------------- commands


def calibration(place: Path, output: Path, *more: str) -> list[str]:
    """Arguments of ``kvq-calibrate`` for all of RECIPES.

    Args:
        place: folder of model and text.
        output: output file, with ``{recipe}`` in its name.
        more: further arguments.
    """
    recipes = ["--config", str(place / f"{RECIPES[0]}.yaml"), "--config", RECIPES[1]]
    text = ["--dataset", str(place / "text.txt"), "--samples", "6", "--seqlen", "48"]
    return [str(place / "model"), "-o", str(output), *recipes, *text, "--device", "cpu", *more]


def entry_point(command: str) -> Callable[[], None]:
    """The function behind a command of the package."""
    scripts = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, function = scripts[command].partition(":")
    found: Callable[[], None] = getattr(importlib.import_module(module), function)
    return found


def call(command: str, words: Sequence[str]) -> tuple[int, str, str]:
    """Run a command in this process. Return its exit status, and its output on stdout and stderr."""
    out, err, before, handler = io.StringIO(), io.StringIO(), sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [command, *words]
    status: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            entry_point(command)()
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)
    return (status if isinstance(status, int) else int(status is not None)), out.getvalue(), err.getvalue()


def forced(command: str, *subcommand: str) -> list[str]:
    """The option that lets a command replace an existing result, if it has one."""
    return ["--force"] if "--force" in call(command, [*subcommand, "--help"])[1] else []


def checkpoint_often() -> None:
    """Let calibrations of this process write a checkpoint at every step, not every half a minute."""
    package = importlib.import_module("kvq_calib.calibrate")
    for found in pkgutil.iter_modules(package.__path__, "kvq_calib.calibrate."):
        module = importlib.import_module(found.name)
        if hasattr(module, "CHECKPOINT_SECONDS"):
            module.CHECKPOINT_SECONDS = 0.0  # type: ignore[attr-defined]


def run_to_the_end(command: str, words: Sequence[str]) -> None:
    """The process of :func:`started`: runs the command, with checkpoints at every step."""
    torch.set_num_threads(1)
    checkpoint_often()
    status, _, err = call(command, words)
    sys.stderr.write(err if status else "")
    os._exit(status)


@functools.cache
def _serve() -> None:
    """Start the process from which others are forked."""
    package = pkgutil.walk_packages(kvq_calib.__path__, "kvq_calib.")
    _PROCESSES.set_forkserver_preload(
        ["robustness_cases", "robustness_kills", *(found.name for found in package)]
    )
    path = os.pathsep.join(path for path in sys.path if path)  # it would not inherit ours
    variables = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": path,
    }
    with unittest.mock.patch.dict(os.environ, variables):
        forkserver.ensure_running()


def started(target: Callable[..., None], *values: Any) -> Any:
    """A process that runs ``target``, a function at the top of a module."""
    _serve()
    process = _PROCESSES.Process(target=target, args=values, daemon=True)
    process.start()
    return process


def _calibrated(folder: Path) -> tuple[bytes, ...]:
    """Run a calibration to its end. Return its checkpoints in the middle and at the end."""
    output = folder / "{recipe}.kvq.safetensors"
    file = Path(str(output).replace("{recipe}", RECIPES[0]) + ".checkpoint")
    seen: dict[bytes, None] = {}
    process = started(run_to_the_end, "kvq-calibrate", calibration(folder, output))
    while process.is_alive():
        with contextlib.suppress(FileNotFoundError):
            seen[file.read_bytes()] = None
        time.sleep(0.001)
    process.join()
    if process.exitcode or not seen:
        raise RuntimeError(
            f"the calibration of the tiny model ended with {process.exitcode} and {len(seen)} checkpoints"
        )
    checkpoints = list(seen)
    return checkpoints[len(checkpoints) // 2], checkpoints[-1]


# ------------------------------------------------------------------------------------------------ caches


def load_model(place: Place) -> Any:
    """The model, ready for a cache."""
    transformers.utils.logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32).eval().requires_grad_(False)


def filled_cache(model: Any, artifact: KVArtifact, tokens: int) -> KVQCache:
    """A cache that holds random tokens."""
    cache = KVQCache(artifact, model)
    ids = torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    keyword = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        model(ids, **{keyword: cache})
    return cache


def _saved_cache(place: Place, recipe: str, tokens: int) -> bytes:
    file = place.folder / "cache.safetensors"
    filled_cache(load_model(place), KVArtifact.load(place.artifact(recipe)), tokens).save(file)
    return file.read_bytes()
