"""Ablation at 3 bits, with one change at a time: KL divergence, perplexity and bits per element.

    python benchmarks/ablation.py MODEL --calibration FILE --evaluation FILE [--windows 2]

All recipes are calibrated in one run and share the passes over the text. Artifacts go to ``--work``, and results are
written as they are measured. After an interruption, the same command continues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from common import environment_lines, markdown, markdown_table, write_results
from variants import BASE, CONTEXT, Variant, calibrated, chosen, evaluated, make_parser, prepare

from kvq_calib.progress import ProgressReporter
from kvq_calib.schema.recipe import calibration_config


def _both(path: str, value: object) -> tuple[str, str]:
    """The same assignment for keys and values."""
    return f"cache.key.{path}={value}", f"cache.value.{path}={value}"


def _edges_at_four_bits() -> str:
    """Overrides that give the first and the last layer 4 bits."""
    cache = calibration_config(BASE).cache
    layer = {
        kind: {**spec.model_dump(mode="json", exclude_defaults=True), "bits": 4}
        for kind, spec in (("key", cache.key), ("value", cache.value))
    }
    return f"cache.layers={json.dumps({'0': layer, '-1': layer})}".replace('"0"', "0").replace('"-1"', "-1")


def variants() -> list[Variant]:
    """The rows, with the base recipe first. The others differ from it as their text says."""
    rows = [
        Variant("base", "base", "3 bits, k-means, Fisher weights, 1% outliers, 1 sink token (nuq3-1p)"),
        Variant("key-token", "key granularity", "keys per token", ("cache.key.thresholds=token",)),
        Variant("key-post-rope", "key RoPE", "keys after RoPE", ("cache.key.pre_rope=false",)),
        Variant(
            "key-online",
            "key thresholds",
            "keys' thresholds online (each text its own)",
            ("cache.key.thresholds=channel_online",),
        ),
        Variant(
            "value-channel",
            "value granularity",
            "values per channel, static thresholds",
            ("cache.value.thresholds=channel",),
        ),
        Variant(
            "value-normalized",
            "value granularity",
            "values per token after static normalisation per channel",
            ("cache.value.thresholds=token_normalized",),
        ),
        Variant("uniform", "datatype", "uniform levels", _both("levels", "uniform")),
        Variant("normal-float", "datatype", "NormalFloat levels", _both("levels", "normal_float")),
        Variant("unweighted", "weights", "k-means without Fisher weights", ("fit.weights=uniform",)),
        Variant("lloyd", "solver", "k-means by scikit-learn (Lloyd's iteration)", ("fit.solver=lloyd",)),
        Variant("q-norm", "Q-Norm", "Q-Norm", _both("q_norm", "true")),
    ]
    rows += [
        Variant(
            f"outliers-{percent}",
            "outliers",
            f"{percent}% outliers" if percent else "no outliers",
            _both("outliers.fraction", percent / 100),
        )
        for percent in (0, 0.5, 2, 5)
    ]
    rows += [
        Variant(
            f"cap-{cap}",
            "outlier cap",
            f"outliers per token capped at {cap}, for keys and for values",
            _both("outliers.max_per_token", cap),
        )
        for cap in (1, 2, 4)
    ]
    rows += [
        Variant("sink-0", "sink", "no exact sink token", ("cache.sink_tokens=0",)),
        Variant("sink-4", "sink", "4 exact sink tokens", ("cache.sink_tokens=4",)),
        Variant("k4v2", "bits", "keys at 4 bits, values at 2", ("cache.key.bits=4", "cache.value.bits=2")),
        Variant("k2v4", "bits", "keys at 2 bits, values at 4", ("cache.key.bits=2", "cache.value.bits=4")),
        Variant("edges-4", "layers", "first and last layer at 4 bits", (_edges_at_four_bits(),)),
        Variant("uniform-dense", "combination", "uniform levels, no outliers", recipe="uniform3"),
        Variant("normal-float-dense", "combination", "NormalFloat levels, no outliers", recipe="nf3"),
        Variant(
            "plain",
            "combination",
            "uniform levels, no outliers, keys per token after RoPE, no sink",
            ("cache.key.thresholds=token", "cache.key.pre_rope=false", "cache.sink_tokens=0"),
            recipe="uniform3",
        ),
    ]
    return rows


def report(rows: Sequence[Variant], content: Mapping[str, Any]) -> list[str]:
    """The table in Markdown."""
    results = {row["name"]: row for row in content["rows"]}
    base = results.get("base")
    table = []
    for row in rows:
        if row.name not in results:
            continue
        result = results[row.name]
        ratio = f"{result['kl_mean'] / base['kl_mean']:.2f}" if base else ""
        table.append(
            [
                row.text,
                f"{result['bits_per_element']:.3f}",
                f"{result['perplexity']:.3f}",
                f"{result['kl_mean']:.5f}",
                ratio,
                f"{result['kl_p99']:.3f}",
                f"{result['top1_agreement']:.4f}",
            ]
        )
    settings = content["settings"]
    evaluation, calibration = settings["evaluation"], settings["calibration"]
    first = next(iter(results.values()), None)
    baseline = f" The unquantized model's perplexity is {first['baseline_perplexity']:.3f}." if first else ""
    tokens = f" ({first['tokens']:,} predicted tokens)" if first else ""
    return [
        "# Ablation at 3 bits",
        "",
        f"{settings['model']}, float32. Calibrated on {calibration['dataset']}, {calibration['windows']} windows of "
        f"{calibration['seqlen']} tokens; evaluated on {evaluation['dataset']}, {evaluation['windows']} windows of "
        f"{evaluation['seqlen']}{tokens}, every key and value quantized in one forward pass. Each row differs from the first "
        f"as it says. Bits count everything stored at {CONTEXT:,} tokens, outliers as found in this text; KL in nats "
        f"per token.{baseline}",
        "",
        *markdown_table(["", "bits/element", "perplexity", "KL", "KL / base", "KL p99", "top-1"], table),
        "",
        *environment_lines(content["environment"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__.partition("\n")[0], "ablation", windows=2)
    parser.add_argument(
        "--group", type=int, default=7, help="rows that share one pass of the unquantized model"
    )
    options = parser.parse_args(arguments)
    study = prepare(options, chosen(parser, options.only, variants()))
    content = study.content

    def keep(results: Mapping[str, dict[str, Any]]) -> None:
        content["rows"] = study.described(results)
        write_results(options.output, content, report(study.rows, content))

    with ProgressReporter() as progress:
        started = time.monotonic()
        files = calibrated(study, study.configs(options), progress)
        progress.say(f"artifacts after {time.monotonic() - started:.0f} s")
        keep(evaluated(study, files, options.group, progress, keep))
    print(markdown(report(study.rows, content)))


if __name__ == "__main__":
    main()
