"""Compare runs: a table with t intervals over seeds, tests corrected for their number, and a figure.

  hf-kdtl compare --runs runs/plain runs/mine
  hf-kdtl compare --runs runs/mine/alone runs/mine/distilled runs/other/distilled --metrics accuracy nll

It reads results.json of hf-kdtl distill and hf-kdtl train-teacher, and writes comparison.md and comparison.png.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.evaluation.comparison import check_comparable, read_arms
from hf_kdtl.reports.comparison_report import markdown
from hf_kdtl.reports.figures.comparison import COMPARISON, comparison_figure
from hf_kdtl.reports.run_report import SPLITS


@dataclass
class CompareOptions:
    """Which runs, and by what."""

    runs: list[str] = field(
        metadata={
            "help": "Run folders of distill or train-teacher, or <folder>/<model> such as runs/mine/distilled. "
            "Each is compared with the first."
        }
    )
    metrics: list[str] = field(
        default_factory=lambda: ["accuracy"], metadata={"help": "Metrics that every run's results.json has."}
    )
    split: str = field(default="test", metadata={"help": "Images to compare on.", "choices": list(SPLITS)})
    output_dir: str = field(
        default="runs/comparison", metadata={"help": "Where comparison.md and comparison.png go; replaced if there."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, refuse what cannot be compared, print the comparison and write it with its picture."""
    cli.quiet()
    (options,) = cli.parse(CompareOptions, argv=argv, doc=__doc__)
    arms = [arm for run in options.runs for arm in read_arms(run)]
    check_comparable(arms, options.split)
    metrics, folder = list(dict.fromkeys(options.metrics)), Path(options.output_dir)
    check_replaced(folder)
    text = markdown(arms, options.split, metrics)
    folder.mkdir(parents=True, exist_ok=True)
    comparison_figure(arms, options.split, metrics, folder / COMPARISON)
    (folder / "comparison.md").write_text(f"{text}\n![differences by seed]({COMPARISON})\n", encoding="utf-8")
    print(f"{text}\nThis is {folder / 'comparison.md'}, with the picture {folder / COMPARISON}.")


def check_replaced(folder: Path) -> None:
    """Raises ValueError where comparison.md or its picture would replace one that this command has not written."""
    text = folder / "comparison.md"
    if any(path.exists() for path in (text, folder / COMPARISON)):
        first = text.read_text(encoding="utf-8", errors="replace").partition("\n")[0] if text.is_file() else ""
        if not (first.startswith("# ") and " models on the " in first):
            raise ValueError(
                f"{folder} holds {text.name} or {COMPARISON} of something else than hf-kdtl compare; name another "
                "folder with --output_dir."
            )


if __name__ == "__main__":
    sys.exit(cli.run(main))
