"""Every family of causal language models that transformers can make small: does it work, or why is it refused?

    python benchmarks/models.py [FAMILY ...] [--seconds 120] [--findings FILE [--minutes 5]]
    python benchmarks/models.py --page OLDEST NEWEST [--output docs/reference/models.md]

A model of each family is made with random weights and a few layers (small_models.py), in a separate process with a
limit on time and memory. It is calibrated with the default recipe. Then it generates with a `KVQCache` that keeps all
tokens exact, and its predictions are compared with those without a cache. A family that is calibrated and then fails or
differs is a fault. So is one for which `kvq-calibrate --check` says something else. With faults, the exit status is 1.

With ``--findings`` each finding is written to a file, and families in the file are skipped. With ``--minutes`` the
sweep ends early, with exit status 3, and the same command continues it. ``--page`` writes the page from the findings
with two releases of transformers, which are the ends of the supported range.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import resource
import signal
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import transformers
from common import environment
from small_models import small_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvq_calib import KVQCache
from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows
from kvq_calib.errors import KVQError, ModelError, NothingToQuantizeError, one_line
from kvq_calib.files import write_atomically
from kvq_calib.model.check import check_configuration
from kvq_calib.model.compat import cache_of, with_cache
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import check_generation, next_pass
from kvq_calib.model.probe import Serving
from kvq_calib.schema.recipe import DEFAULT_RECIPE, calibration_config

DOCS = Path(__file__).parent.parent / "docs" / "reference" / "models.md"
#: Limits: seconds of computation, and bytes beyond those of the process at the start.
SECONDS = 120.0
_MEMORY = 8 << 30
#: The limit on elapsed time is so many times larger, because others may use the machine.
_PATIENCE = 10
#: Exact tokens are stored in float16, so results have its rounding errors. A wrong key or mask gives much larger ones.
_TOLERANCE = 0.02
_PROMPT, _NEW = 40, 6

_INTRODUCTION = (
    "A model is inspected when it is calibrated. It works, or it is refused at the start with the reason; "
    "`kvq-calibrate --check MODEL` tells this from the configuration alone. This page is printed by "
    "`benchmarks/models.py`. For every family of causal language models in transformers, it makes a small model "
    "with random weights, calibrates it with the default recipe, and compares passes through a packed cache with "
    "passes without one. This tests the code of a family, not the accuracy with real weights."
)
_KINDS = (
    "Most models pass what they cache to transformers' attention interface; then attention reads packed pages. "
    "Other models compute attention themselves, change keys or values on the way, or cache latents (multi-head "
    "latent attention). For these the cache is as small, but dequantizes a layer at every update; this is slower, "
    "and a warning says so once. States of layers (linear attention, convolutions, Mamba) are kept unquantized in "
    "the same cache. Layers that attend to other layers' keys and values store "
    'none. "No RoPE" means that keys are quantized as cached: there is no rotary embedding, or none that can be '
    'undone. "Continues by single tokens" means that a cached text can be continued by only one token at a time, '
    "with any cache: with more tokens, states start again, or the model fails. An indexer chooses the tokens that a"
    " layer attends to; its keys are not quantized. Encoders (BERT, RoBERTa, ...) are causal language models if "
    'their configuration has `"is_decoder": true`, as here.'
)
_PICTURES = (
    "Multimodal models are calibrated with text. If positions have sections (pictures in Qwen2.5-VL and Qwen3-VL), "
    "keys must be quantized as cached, with a `nuq*` recipe and `--set cache.key.pre_rope=false`. Other caches of "
    "these models support only text, and refuse a picture."
)
_LONGROPE = (
    "Models with LongRoPE (Phi-3.5, Phi-4-mini) need a `nuq*` recipe with `--set cache.key.pre_rope=false`, too. "
    "These models switch their frequencies at a certain length. A cache supports texts that stay on one side of "
    "this length, and refuses to pass it, because the model would rotate all its keys anew."
)

_PROCESSES = multiprocessing.get_context("forkserver")


def _versions() -> dict[str, str]:
    known = environment()["versions"]
    return {name: known[name] for name in ("kvq-calib", "torch", "transformers")}


@dataclass(frozen=True)
class Finding:
    """The result for a family.

    Attributes:
        family: its ``model_type``.
        outcome: "works", "materialized" (works, and gets its keys and values dequantized), "refused" (at
            calibration), "none" (it keeps no keys and values in a cache), "not small" (it could not be made small
            here), or a fault: "crash", "fails", "differs", "check" (`--check` says something else), "slow".
        detail: what it caches, or the reason.
        versions: of kvq-calib, torch and transformers.
    """

    family: str
    outcome: str
    detail: str
    versions: dict[str, str] = field(default_factory=_versions, compare=False)

    @property
    def is_fault(self) -> bool:
        """Whether the outcome is a defect."""
        return self.outcome not in ("works", "materialized", "refused", "none", "not small")


# -------------------------------------------------------------------------------------------- one family


def examine(family: str) -> Finding:
    """Calibrate and use a family in this process, and compare with the result of `--check`."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    try:
        model = small_model(family)
    except Exception as error:
        return Finding(family, "not small", f"{type(error).__name__}: {one_line(error, 120)}")
    found = _calibrated_and_used(family, model)
    if found.is_fault or type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # a part of a model
        return found
    said = _said(model.config)
    return found if said == found.outcome else Finding(family, "check", f"{found.outcome}: {said}")


def _said(config: Any) -> str:
    """The outcome according to `--check`, or its error."""
    try:
        return "materialized" if check_configuration(config).serving.materialized else "works"
    except NothingToQuantizeError:
        return "none"
    except ModelError as error:
        return "refused" if "small model" not in str(error) else one_line(error)
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"


def _calibrated_and_used(family: str, model: Any) -> Finding:
    ids = torch.randint(3, 128, (2, 64), generator=torch.Generator().manual_seed(1))
    try:
        artifact = calibrate(
            model,
            TokenWindows(ids, {"sha256": ""}),
            {DEFAULT_RECIPE: calibration_config(DEFAULT_RECIPE)},
            model_id=family,
            model_config=model_fingerprint(model),
        ).artifacts[DEFAULT_RECIPE]
    except KVQError as error:
        outcome = "none" if isinstance(error, NothingToQuantizeError) else "refused"
        return Finding(family, outcome, one_line(error, 400).removeprefix(f"{type(model).__name__} "))
    except Exception as error:
        return Finding(family, "crash", f"{type(error).__name__}: {one_line(error)}")
    try:
        problem = _use(model, artifact, ids)
    except Exception as error:
        return Finding(family, "fails", f"{type(error).__name__}: {one_line(error)}")
    if problem:
        return Finding(family, "differs", problem)
    serving = check_generation(model, artifact.geometry)
    return Finding(family, "materialized" if serving.materialized else "works", _cached(artifact, serving))


@torch.no_grad()
def _use(model: Any, artifact: Any, ids: torch.Tensor) -> str:
    """Compare passes and generation through an exact cache with passes without one. Returns the difference, or ""."""
    prompt = ids[:1, :_PROMPT]
    cache = KVQCache(artifact, model, recent_tokens=10**6)
    sizes = [38, 1, 1] if cache.single_tokens else [17, 22, 1]
    got = _passes(model, cache, prompt, sizes)
    wanted = model(input_ids=prompt, use_cache=False).logits
    # Among equal keys an indexer may choose others in several passes than in one.
    for expected in (lambda: wanted, lambda: _passes(model, None, prompt, sizes)):
        error = float((got - expected()).abs().max() / wanted.abs().max())
        if error <= _TOLERANCE:
            break
    else:
        return f"passes through the cache are off by {error:.3g} of the largest logit"
    cache.reset()
    text, own = (
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), **with_cache(each), do_sample=False, max_new_tokens=_NEW,
            min_new_tokens=_NEW, eos_token_id=None, use_cache=True,
        )
        for each in (cache, None)
    )  # fmt: skip
    if text.shape[1] != _PROMPT + _NEW or cache.get_seq_length() != text.shape[1] - 1:
        return f"it generated {text.shape[1] - _PROMPT} tokens with {cache.get_seq_length()} in the cache"
    scores = model(input_ids=text, use_cache=False).logits[0, _PROMPT - 1 : -1]
    # With nearly equal scores, rounding may decide for either token; some families force the last one.
    behind = scores.amax(-1) - scores.gather(1, text[0, _PROMPT:, None])[:, 0]
    if not torch.equal(text, own) and not bool((behind <= _TOLERANCE * scores.abs().max()).all()):
        return "it generates other tokens than with its own cache"
    packed = KVQCache(artifact, model)
    for part in (ids[:, :60], *ids[:, 60:].split(1 if cache.single_tokens else 4, dim=1)):
        if not bool(model(**next_pass(model, part, packed, packed.get_seq_length())).logits.isfinite().all()):
            return "through the packed cache predictions are not finite"
    return ""


def _passes(model: Any, cache: Any, ids: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Logits ``[1, T, V]`` of a text in several passes through a cache; ``None`` means the model's default cache."""
    logits, start = [], 0
    for part in ids.split(list(sizes), dim=1):
        output = model(**next_pass(model, part, cache, start), use_cache=True)
        cache, start = cache_of(output), start + part.shape[1]
        logits.append(output.logits)
    return torch.cat(logits, 1)


def _cached(artifact: Any, serving: Serving) -> str:
    """What the layers of a model cache, in words."""
    geometry, kinds = artifact.geometry, []
    for layer in artifact.geometry.layers:
        heads = (
            str(layer.head_dim)
            if layer.value_head_dim is None
            else f"{layer.head_dim}/{layer.value_head_dim}"
        )
        window = "" if layer.sliding_window is None else f", window {layer.sliding_window}"
        kinds.append(f"heads of {heads}{window}{'' if layer.rope is not None else ', no RoPE'}")
    if geometry.state_bytes:
        kinds.append("states beside")
    if geometry.state_bytes_per_token:
        kinds.append("an indexer beside")
    if any(geometry.is_shared(index) for index in range(len(geometry.layers))):
        kinds.append("layers that share them")
    if serving.single_tokens:
        kinds.append("continues by single tokens")
    return "; ".join(dict.fromkeys(kinds))


# ------------------------------------------------------------------------------------------ all families


def families() -> list[str]:
    """All families in the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _report(family: str, seconds: float, connection: Any) -> None:
    """The work of a family's process."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    torch.set_num_threads(1)
    statm = Path("/proc/self/statm")
    if statm.exists():
        held = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (max(1, int(seconds)), resource.RLIM_INFINITY))
    connection.send(examine(family))


def examined(family: str, seconds: float = SECONDS) -> Finding:
    """The finding of a separate process, which is killed after that time."""
    ours, theirs = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_report, args=(family, seconds, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(_PATIENCE * seconds):
            return Finding(family, "slow", f"more than {seconds:.0f} s")
        finding: Finding = ours.recv()
        return finding
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return Finding(family, "slow", f"more than {seconds:.0f} s")
        return Finding(family, "crash", f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _serve() -> None:
    """Start the process that all others are forked from, with everything imported."""
    _PROCESSES.set_forkserver_preload(["models"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def read(path: Path | None) -> dict[str, Finding]:
    """The findings in a file, by family."""
    if path is None or not path.exists():
        return {}
    found = [Finding(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {each.family: each for each in found}


def sweep(
    names: Sequence[str], seconds: float = SECONDS, path: Path | None = None, minutes: float = float("inf")
) -> list[Finding]:
    """The findings of some families, or of fewer if the time is over.

    Args:
        names: names of the families.
        seconds: seconds of computation for each family.
        path: a file of findings, which is read first and then extended.
        minutes: time after which no other family is started.
    """
    _serve()
    found, start = read(path), time.monotonic()
    for name in names:
        if name in found:
            continue
        began = time.monotonic()
        if began - start > 60 * minutes:
            break
        found[name] = examined(name, seconds)
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                print(json.dumps(asdict(found[name])), file=file)
        print(f"{name}: {found[name].outcome} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    return [found[name] for name in names if name in found]


def lines_of(found: Sequence[Finding]) -> list[str]:
    """The findings of a sweep in Markdown."""
    rows = [[f"`{each.family}`", each.outcome, _cell(each.detail)] for each in found]
    return [
        *textwrap.wrap(_counted(found), 120),
        "",
        *_table(["family", "", "what it caches, or the reason"], rows),
    ]


def _counted(found: Sequence[Finding]) -> str:
    counts = Counter(finding.outcome for finding in found)
    return (
        f"Of {len(found)} families in transformers {found[0].versions['transformers']}, {counts['works']} attend to "
        f"packed pages, {counts['materialized']} get their keys and values dequantized, {counts['none']} keep no keys "
        f"and values in a cache, so there is nothing to quantize, {counts['refused']} are refused, and "
        f"{counts['not small']} could not be made small by these settings, so they were not tried. Calibrated and then "
        f"failing or different, or judged otherwise by `--check`: {sum(finding.is_fault for finding in found)}."
    )


def page(oldest: Sequence[Finding], newest: Sequence[Finding], today: str) -> list[str]:
    """The page in Markdown.

    Args:
        oldest, newest: the findings with the ends of the supported range of transformers.
        today: the date.
    """
    old, new = ({finding.family: finding for finding in found} for found in (oldest, newest))
    every = sorted({**old, **new})
    ends = [found[0].versions["transformers"] for found in (oldest, newest)]
    others = ", ".join(f"{name} {newest[0].versions[name]}" for name in ("kvq-calib", "torch"))
    both = f"transformers {ends[1]} and {ends[0]}, the ends of the supported range"
    made = f"Findings of {today} with {others}, and {both}."
    lines = ["# Models", ""]
    for text in (_INTRODUCTION, _KINDS, made, _counted(newest), _counted(oldest), _PICTURES, _LONGROPE):
        lines += [*textwrap.wrap(text, 120), ""]
    for outcome, title in {**_TITLES, "fault": "Faults"}.items():
        kept = [name for name in every if _section(new.get(name) or old[name]) == outcome]
        rows = [[f"`{name}`", _of(new.get(name)), _of(old.get(name), new.get(name))] for name in kept]
        if rows:
            lines += [
                f"## {title}",
                "",
                *_table(["family", *(f"transformers {end}" for end in ends[::-1])], rows),
                "",
            ]
    return lines[:-1]


_TITLES = {
    "works": "Attention over packed pages",
    "materialized": "Materialized: the cache dequantizes keys and values",
    "none": "Nothing to quantize",
    "refused": "Refused at calibration",
    "not small": "Not tried: could not be made small",
}
#: What a cell begins with if the family is in the section of another outcome.
_ELSEWHERE = {
    "works": "packed pages",
    "materialized": "dequantized",
    "none": "nothing to quantize",
    "refused": "refused",
    "not small": "not tried",
}


def _section(finding: Finding) -> str:
    return "fault" if finding.is_fault else finding.outcome


def _of(finding: Finding | None, other: Finding | None = None) -> str:
    """A finding in a table, beside another release's."""
    if finding is None:
        return "does not have it"
    if finding == other:
        return "the same"
    text = _cell(finding.detail)
    if finding.is_fault or (other is not None and finding.outcome != other.outcome):
        return f"{_ELSEWHERE.get(finding.outcome, finding.outcome)}: {text}"
    return text


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *rows)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all by default")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a family, default %(default).0f")
    parser.add_argument(
        "--findings", type=Path, metavar="FILE", help="continue from this file, and add to it"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="end the sweep early; continue it later"
    )
    parser.add_argument(
        "--page",
        nargs=2,
        type=Path,
        metavar=("OLDEST", "NEWEST"),
        help="write the page from two files of findings",
    )
    parser.add_argument(
        "--output", type=Path, default=DOCS, help="the page, default docs/reference/models.md"
    )
    return parser.parse_args(words)


def main() -> None:
    options = arguments()
    if options.page:
        oldest, newest = (sorted(read(path).values(), key=lambda each: each.family) for path in options.page)
        text = "\n".join(page(oldest, newest, datetime.date.today().isoformat())) + "\n"
        write_atomically(options.output, text.encode())
        sys.exit(any(finding.is_fault for finding in (*oldest, *newest)))
    names = options.families or families()
    found = sweep(names, options.seconds, options.findings, options.minutes)
    if len(found) < len(names):
        print(f"{len(found)} of {len(names)} families; the same command continues", file=sys.stderr)
        sys.exit(3)
    print("\n".join(lines_of(found)))
    sys.exit(any(finding.is_fault for finding in found))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
