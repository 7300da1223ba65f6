"""Calibration of a model whose weights are offloaded: peak resident memory and time.

    python benchmarks/offload.py [--samples 2] [--seqlen 8192]

A Llama with random weights is written to a temporary folder. Then a separate process loads it with accelerate, which
keeps `--cpu-memory` of the weights in memory and reads the rest from disk when a layer is used. It is calibrated on
random tokens, because memory and time do not depend on the numbers.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from calibration_memory import Peak, resident_bytes
from common import RESULTS, environment, environment_lines, markdown, markdown_table, timed, write_results
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.load import load_model
from kvq_calib.progress import ProgressReporter
from kvq_calib.schema.recipe import calibration_config

_GIB = 2**30
#: The shape of Llama-3.2-1B, but with an untied head: 1.50 billion weights.
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
}


def write_model(folder: Path, shape: dict[str, int], positions: int) -> None:
    """Write random weights in bfloat16, and a tokenizer, which is not used."""
    config = LlamaConfig(**shape, max_position_embeddings=positions, tie_word_embeddings=False)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Load and calibrate in this process. Return time and memory."""
    imported = resident_bytes()
    spread = {} if options.in_memory else {"device_map": "auto", "max_memory": {"cpu": options.cpu_memory}}
    loaded, loading = timed(lambda: load_model(str(folder), dtype="bfloat16", **spread))
    model = loaded.model
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (options.samples, options.seqlen), generator=generator)
    windows = TokenWindows(ids, {"dataset": "random tokens", "seed": 0})
    settings = {"samples": options.samples, "seqlen": options.seqlen, "recompute": options.recompute}
    config = calibration_config(
        options.recipe, command_line=settings, assignments=[f"fit.weights={options.weights}"]
    )
    with Peak() as peak, ProgressReporter() as progress:
        result, seconds = timed(
            lambda: calibrate(
                model,
                windows,
                {options.recipe: config},
                model_id="random",
                model_config=model_fingerprint(model),
                progress=progress,
            )
        )
    artifact = result.artifacts[options.recipe]
    # Linux gives kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "parameters_on_disk": sum(p.numel() for p in parameters if p.device.type == "meta"),
        "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "loading_seconds": loading.wall,
        "seconds": {**result.seconds, "all": seconds.wall, "processor": seconds.cpu},
        "imports_bytes": imported,
        "loaded_bytes": peak.before,
        "peak_in_calibration_bytes": peak.highest,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "artifact_bytes": len(artifact.to_bytes()),
        "bits_per_element": artifact.bits_per_element(4096),
    }


def report(content: dict[str, Any]) -> list[str]:
    """The record in Markdown."""
    settings = content["settings"]
    shape = settings["shape"]
    lines = [
        "# Calibration with offloaded weights",
        "",
        f"A Llama with random weights in bfloat16: {shape['num_hidden_layers']} layers, hidden size {shape['hidden_size']:,}, "
        f"{shape['num_attention_heads']} query heads and {shape['num_key_value_heads']} key-value heads of {shape['head_dim']}, feed-forward size "
        f"{shape['intermediate_size']:,}, vocabulary {shape['vocab_size']:,}, head not tied. Recipe {settings['recipe']}, weights of the codebook fit: "
        f"{settings['weights']}. Resident memory is of the whole process, Python and torch included.",
        "",
        *markdown_table(
            [
                "windows",
                "weights",
                "on disk",
                "weights, GiB",
                "after loading, GiB",
                "peak resident memory, GiB",
                "wall time, s",
                "processor time, s",
            ],
            [
                [
                    f"{row['samples']} x {row['seqlen']:,}",
                    f"{row['parameters']:,}",
                    f"{row['parameters_on_disk'] / row['parameters']:.0%}",
                    f"{row['weight_bytes'] / _GIB:.2f}",
                    f"{row['loaded_bytes'] / _GIB:.2f}",
                    f"{row['peak_bytes'] / _GIB:.2f}",
                    f"{row['seconds']['all']:.0f}",
                    f"{row['seconds']['processor']:.0f}",
                ]
                for row in content["runs"]
            ],
        ),
        "",
    ]
    for row in content["runs"]:
        parts = ", ".join(
            f"{part} {spent:.0f} s"
            for part, spent in row["seconds"].items()
            if part not in ("all", "processor")
        )
        lines.append(
            f"{row['samples']} x {row['seqlen']:,}{', all weights in memory' if row['in_memory'] else ''}: {parts}."
        )
    return [*lines, "", *environment_lines(content["environment"])]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, size in SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument(
        "--seqlen", type=int, nargs="+", default=[8192], help="one run for each, in a process of its own"
    )
    parser.add_argument("--recipe", default="nuq3-1p", metavar="NAME|FILE")
    parser.add_argument("--weights", choices=["fisher", "uniform"], default="fisher")
    parser.add_argument("--cpu-memory", default="1GiB", help="of weights; the rest is read from disk")
    parser.add_argument(
        "--in-memory", action="store_true", help="no offload: all weights in memory, to compare"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="with --in-memory; offloaded models always do"
    )
    parser.add_argument("--work", type=Path, help="folder that keeps the model for another run")
    parser.add_argument("--output", type=Path, default=RESULTS / "offload.json")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    parser.add_argument("--worker", choices=["write", "calibrate"], help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    shape = {name: getattr(options, name) for name in SHAPE}

    if options.worker is not None:
        folder, options.seqlen = options.work, options.seqlen[-1]
        if options.worker == "write":
            write_model(folder, shape, options.seqlen)
        else:
            print(json.dumps(measure(folder, options)))
        return
    content: dict[str, Any] = {
        "settings": {"shape": shape, "recipe": options.recipe, "weights": options.weights},
        "environment": environment(options.note),
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if options.work is None else options.work
        command = [sys.executable, str(Path(__file__).resolve()), *words, "--work", str(folder)]
        if not (folder / "config.json").exists():
            longest = str(max(options.seqlen))
            subprocess.run([*command, "--worker", "write", "--seqlen", longest], check=True)
        for seqlen in options.seqlen:
            done = subprocess.run(
                [*command, "--worker", "calibrate", "--seqlen", str(seqlen)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            content["runs"].append(
                {
                    "samples": options.samples,
                    "seqlen": seqlen,
                    "in_memory": options.in_memory,
                    "cpu_memory": None if options.in_memory else options.cpu_memory,
                    **measured,
                }
            )
            write_results(options.output, content, report(content))
    print(markdown(report(content)))


if __name__ == "__main__":
    main()
