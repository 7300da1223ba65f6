"""KL divergence against bits: our recipes, KVQuant's, two rivals, and the gain of each step of our method.

    python benchmarks/frontier.py MODEL --calibration FILE --evaluation FILE [--windows 3]

All recipes are calibrated in one run and share the passes over the text. Artifacts go to ``--work``, and results are
written as they are measured. After an interruption, the same command continues. The rivals are implemented here from
their papers, in their simplest form. Their bits count codes and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import environment_lines, markdown, markdown_table, write_results
from torch import Tensor
from variants import CONTEXT, Variant, calibrated, chosen, evaluated, make_parser, prepare

from kvq_calib.data import TokenWindows
from kvq_calib.evaluate.perplexity import measure
from kvq_calib.evaluate.text_pass import Mode
from kvq_calib.fit.density import lloyd
from kvq_calib.model.capture import LayerKV, intercept
from kvq_calib.model.load import LoadedModel
from kvq_calib.progress import ProgressReporter

Transform = Callable[[LayerKV], tuple[Tensor, Tensor]]
"""Quantizes and dequantizes a layer's keys (before RoPE) and values."""

OURS, KVQUANT, STEPS, RIVALS = "ours", "KVQuant", "steps", "rivals"
#: The recipe after the last step.
THREE_BITS = "kvq-3"


def variants() -> list[Variant]:
    """All artifacts: the shipped recipes, and the steps from KVQuant's dense 3-bit recipe to ours."""
    uniform = ("cache.key.max_bits=3", "cache.value.max_bits=3", "allocation.scope=uniform")
    rows = [
        Variant(name, OURS, f"{name}: at most {bits} bits", recipe=name)
        for name, bits in (("kvq2", 2.4), ("kvq3", 3.4), ("kvq4", 4.4))
    ]
    rows += [
        Variant(name, KVQUANT, f"{name}: KVQuant with 1% outliers, one sink token", recipe=name)
        for name in ("nuq2-1p", "nuq3-1p", "nuq4-1p")
    ]
    #: The features that the steps from 4 on enable, one after the other, and the assignments that disable them.
    switches = {
        "and rotation of pairs": ("cache.key.pair_rotation=false",),
        "and error compensation for keys": ("cache.key.error_compensation=null",),
        "and weights shrunk by a quarter towards the mean of the channel": ("allocation.shrinkage=0",),
        "and trellis codes": ("cache.key.states=1", "cache.value.states=1"),
        "and the budget corrected by measured costs": ("allocation.corrections=0",),
        "and random vocabulary, and four times the weight for the first layer": (
            "allocation.vocabulary_samples=0",
            "allocation.first_layer_weight=1",
        ),
        "and text that the model writes": ("allocation.self_generated=0",),
        "and paths that weigh their tokens": (
            "cache.key.token_weighting=false",
            "cache.value.token_weighting=false",
        ),
        "and a refinement pass over the coordinates of keys": (
            "cache.key.error_compensation.refinement_passes=0",
        ),
        "and channels of keys without any bits": ("allocation.min_key_bits=1",),
        "and repeats in what the model writes": ("allocation.repeats=false",),
    }

    unshaped = ("cache.value.noise_shaping=false",)

    def step(number: int, text: str, *more: str) -> Variant:
        """kvq-3 without the features of later steps, and without noise shaping, which the record does not have."""
        later = list(switches.values())[max(number - 3, 0) :]
        still_off = [
            setting for off in reversed(later) for setting in off
        ]  # before it, the settings inside a section
        name, end = (f"step-{number}", "") if still_off else (THREE_BITS, f" ({THREE_BITS})")
        return Variant(name, STEPS, text + end, (*more, *still_off, *unshaped), THREE_BITS)

    rows += [
        Variant("step-0", STEPS, "nuq3: 3 bits, one table of levels a layer, values per token", recipe="nuq3"),
        step(1, "static levels per channel for keys and values, gradient-weighted", *uniform),
        step(2, "and widths per channel, the same budget for every layer's keys and values", "allocation.scope=layer"),
        step(3, "and one budget for the model"),
        *(step(number, text) for number, text in enumerate(switches, start=4)),
        Variant("kvq2-fit", STEPS, "kvq2 without learning", ("learn=null",), "kvq2"),
    ]  # fmt: skip
    return rows


# ------------------------------------------------------------------------------- rivals


def uniform_groups(x: Tensor, bits: int, dim: int, size: int = 32) -> Tensor:
    """Asymmetric uniform quantization in groups of ``size`` along ``dim``."""
    moved = x.transpose(dim, -1)
    length = moved.shape[-1]
    padded = torch.nn.functional.pad(moved.flatten(0, -2)[None], (0, -length % size), mode="replicate")[0]
    groups = padded.unflatten(-1, (-1, size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / ((1 << bits) - 1)).clamp(min=1e-8)
    seen = (((groups - low) / step).round() * step + low).flatten(-2)[:, :length]
    return seen.view(moved.shape).transpose(dim, -1)


def kivi(bits: int) -> Transform:
    """KIVI (arXiv 2402.02750): keys per channel in groups of 32 tokens, values per token in groups of 32 channels."""

    def transform(kv: LayerKV) -> tuple[Tensor, Tensor]:
        keys = uniform_groups(kv.rotated_keys.float(), bits, dim=2)
        return kv.rotation.unrotate(keys), uniform_groups(kv.values.float(), bits, dim=3)

    return transform


def rotated_normal(bits: int) -> Transform:
    """The first stage of TurboQuant (arXiv 2504.19874): random rotation, norm per token and head, Lloyd-Max levels."""
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)[None]
    levels = lloyd(grid, torch.exp(-grid.square() / 2), 1 << bits)[0].float()
    rotations: dict[int, Tensor] = {}

    def seen(x: Tensor) -> Tensor:
        size = x.shape[-1]
        if size not in rotations:
            generator = torch.Generator().manual_seed(0)
            rotations[size] = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        y = x.float() @ rotations[size]
        norm = y.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-8)
        codes = torch.bucketize(y / norm, (levels[1:] + levels[:-1]) / 2)
        return (levels[codes] * norm) @ rotations[size].T

    return lambda kv: (kv.rotation.unrotate(seen(kv.rotated_keys)), seen(kv.values))


def rivals(head_dim: int) -> dict[str, tuple[str, float, Transform]]:
    """Text, bits per element and transform of each rival, by name."""
    rows = {}
    for bits in (2, 3, 4):
        rows[f"kivi-{bits}"] = (
            f"KIVI-style groups of 32, {bits} bits, no exact window",
            bits + 1.0,
            kivi(bits),
        )
    for bits in (2, 3, 4):
        text = f"rotation and Lloyd-Max levels, {bits} bits"
        rows[f"rotation-{bits}"] = (text, bits + 16 / head_dim, rotated_normal(bits))
    return rows


class RivalContender:
    """A rival as a contender of a text pass. The first token of every window stays exact, as for all others here."""

    mode: Mode = "prefill"
    hooks = None
    remedy = "name the others with --only"

    def __init__(self, model: Any, bits: float, transform: Transform) -> None:
        self.model, self.bits, self.transform = model, bits, transform

    def _first_exact(self, kv: LayerKV) -> tuple[Tensor, Tensor]:
        keys, values = self.transform(kv)
        return (
            torch.cat([kv.keys[:, :, :1], keys[:, :, 1:]], 2),
            torch.cat([kv.values[:, :, :1], values[:, :, 1:]], 2),
        )

    def logits(self, ids: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of ``ids`` (int64 ``[B, T]``) in one forward pass."""
        with intercept(self.model, self._first_exact):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def bits_per_element(self, context: int) -> float:
        """Bits of codes and scales, the same at every context."""
        return self.bits


def measure_rivals(
    loaded: LoadedModel, windows: TokenWindows, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Measure the rivals."""
    config = loaded.model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    table = {name: row for name, row in rivals(head_dim).items() if name in names}
    if not table:
        return {}
    contenders = {
        name: RivalContender(loaded.model, bits, transform) for name, (_, bits, transform) in table.items()
    }
    return {
        result.name: {**result.to_json(), "switch": RIVALS, "text": table[result.name][0]}
        for result in measure(loaded.model, contenders, windows, CONTEXT)
    }


# ------------------------------------------------------------------------------- report


def plot(results: Mapping[str, Mapping[str, Any]], file: Path, caption: str) -> None:
    """Draw KL divergence (logarithmic) against bits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    lines = {
        "kvq (this project)": ["kvq2", THREE_BITS, "kvq3", "kvq4"],
        "KVQuant, 1% outliers": ["nuq2-1p", "nuq3-1p", "nuq4-1p"],
        "KIVI-style groups of 32": ["kivi-2", "kivi-3", "kivi-4"],
        "rotation + Lloyd-Max": ["rotation-2", "rotation-3", "rotation-4"],
    }
    for (label, names), style in zip(lines.items(), ("o-", "s-", "^--", "v--"), strict=True):
        there = [results[name] for name in names if name in results]
        if there:
            axes.plot(
                [r["bits_per_element"] for r in there], [r["kl_mean"] for r in there], style, label=label
            )
    axes.set_yscale("log")
    axes.set_xlabel(f"bits per element, everything stored at {CONTEXT:,} tokens")
    axes.set_ylabel("KL divergence, nats per token")
    axes.set_title(caption, fontsize=9)
    axes.grid(True, which="both", alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(file, dpi=130, metadata={"Software": None})


def report(content: Mapping[str, Any]) -> list[str]:
    """The tables in Markdown."""
    settings = content["settings"]
    calibration, evaluation = settings["calibration"], settings["evaluation"]
    lines = [
        "# KL divergence against bits",
        "",
        f"{settings['model']}, float32. Calibrated on {calibration['dataset']}, {calibration['windows']} windows of "
        f"{calibration['seqlen']} tokens; evaluated on {evaluation['dataset']}, {evaluation['windows']} windows of "
        f"{evaluation['seqlen']}, every key and value quantized in one forward pass but for the first token. Bits of "
        f"artifacts count everything stored at {CONTEXT:,} tokens; KL in nats per token.",
        "",
    ]
    titles = {
        OURS: "Recipes",
        KVQUANT: "KVQuant",
        STEPS: "What each step buys",
        RIVALS: "Rivals, re-implemented",
    }
    for switch, title in titles.items():
        table = [
            [
                row["text"] if row["switch"] == switch else f"{THREE_BITS}, where the steps lead",
                f"{row['bits_per_element']:.3f}",
                f"{row['kl_mean']:.5f}",
                f"{row['kl_p99']:.3f}",
                f"{row['perplexity']:.3f}",
                f"{row['top1_agreement']:.4f}",
            ]
            for row in content["rows"]
            if row["switch"] == switch or (switch == OURS and row["name"] == THREE_BITS)
        ]
        if table:
            head = ["", "bits/element", "KL", "KL p99", "perplexity", "top-1"]
            lines += [f"## {title}", "", *markdown_table(head, table), ""]
    return [*lines, *environment_lines(content["environment"])]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__.partition("\n")[0], "frontier", windows=3)
    options = parser.parse_args(arguments)
    study = prepare(options, chosen(parser, options.only, variants(), rivals(64)))
    content, text = study.content, study.evaluation.source["sha256"]
    others = {
        name: row
        for name, row in study.known.items()
        if row["switch"] == RIVALS and row["inputs"] == ["", text]
    }

    def keep(results: Mapping[str, dict[str, Any]]) -> None:
        content["rows"] = study.described(results) + list(others.values())
        write_results(options.output, content, report(content))
        caption = f"{study.loaded.name}, {len(study.evaluation.ids)} windows of {options.seqlen}"
        plot({row["name"]: row for row in content["rows"]}, options.output.with_suffix(".png"), caption)

    with ProgressReporter() as progress:
        files = calibrated(study, study.configs(options), progress)
        results = evaluated(study, files, max(len(study.rows), 1), progress, keep)
    names = [name for name in rivals(64) if name not in others and (not options.only or name in options.only)]
    for name, row in measure_rivals(study.loaded, study.evaluation, names).items():
        others[name] = {**row, "inputs": ["", text]}
    keep(results)
    print(markdown(report(content)))


if __name__ == "__main__":
    main()
