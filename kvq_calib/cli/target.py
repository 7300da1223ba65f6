"""``--target-kl`` of ``kvq-calibrate``: a budget found by measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from kvq_calib.cli.help import section
from kvq_calib.cli.options import FilePath, collected, number_option

if TYPE_CHECKING:
    from kvq_calib.artifact.artifact import KVArtifact
    from kvq_calib.calibrate.budget_search import BudgetSearch
    from kvq_calib.data import TokenWindows
    from kvq_calib.model.load import LoadedModel
    from kvq_calib.schema.recipe import CalibrationConfig

__all__ = ["TargetOptions", "target_options"]


@dataclass(frozen=True)
class TargetOptions:
    """The target of a search for a budget, and the text for measuring it.

    Attributes:
        target_kl: target of the KL divergence in nats per predicted token; ``None``: no search.
        held_out: name or path of the text; ``None``: that of the calibration.
        held_out_windows: largest number of windows of that text.
    """

    target_kl: float | None
    held_out: str | None
    held_out_windows: int

    @property
    def name(self) -> str:
        """The value of ``{recipe}`` in the name of the output."""
        return f"kvq-kl-{self.target_kl:g}"

    def dataset(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Name and text field of the held-out text. ``run`` has the settings of the calibration."""
        from kvq_calib.data import DATA_SETS, DEFAULT_FIELD

        dataset = self.held_out or run["dataset"]
        return {
            "dataset": dataset,
            "text_field": DEFAULT_FIELD if dataset in DATA_SETS else run["text_field"],
        }

    def windows(self, loaded: LoadedModel, run: Mapping[str, Any], calibrated: TokenWindows) -> TokenWindows:
        """Windows of the held-out text that calibration does not use.

        Raises:
            DataError: there are none, or the text cannot be read.
        """
        from kvq_calib.data import load_windows, windows_beside

        text = self.dataset(run)
        found = load_windows(
            **text, tokenizer=loaded.tokenizer, samples=None, seqlen=run["seqlen"], split="evaluation"
        )
        return windows_beside(
            found,
            calibrated,
            self.held_out_windows,
            f"{text['dataset']} has no window that calibration does not use: name another text with --held-out, or use "
            "fewer --samples",
        )

    def search(
        self,
        config: Callable[[float], CalibrationConfig],
        loaded: LoadedModel,
        windows: TokenWindows,
        say: Callable[[str], None],
    ) -> BudgetSearch:
        """Make the search, on held-out windows of a loaded model. ``config`` returns the settings of a budget."""
        from kvq_calib.calibrate.budget_search import BudgetSearch
        from kvq_calib.evaluate.perplexity import measure_perplexity
        from kvq_calib.schema.recipe import EvalConfig

        assert self.target_kl is not None

        def measure(artifact: KVArtifact) -> float:
            (result,) = measure_perplexity(loaded.model, {"": artifact}, windows, EvalConfig())
            return result.kl_mean

        return BudgetSearch(self.target_kl, config, measure, windows.source, say)


target_options = collected(
    TargetOptions,
    "target",
    section(
        "Budget by measurement",
        click.option(
            "--target-kl",
            type=click.FloatRange(min=0, min_open=True),
            metavar="NATS",
            help="Find the smallest budget of a kvq recipe whose KL divergence on held-out text is at most this, in "
            "nats per token, and calibrate it. Replaces --config and --bits.",
        ),
        click.option(
            "--held-out",
            type=FilePath(),
            metavar="NAME|PATH",
            help="Text to measure on.  [default: windows of --dataset that calibration does not use]",
        ),
        number_option("--held-out-windows", 4, "N", "At most this many windows of it."),
    ),
)
