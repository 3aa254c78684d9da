"""Write the card of a finished run again: README.md from results.json, and from nothing else.

  hf-kdtl model-card --runs model_cards/vit-4-of-8 model_cards/resnet-small
  hf-kdtl model-card --runs runs/mine --evaluation runs/evaluation

The second merges what hf-kdtl evaluate found into results.json; once is enough.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.evaluation.results import read_results, update_results
from hf_kdtl.hub.model_card import with_evaluation, write_card


@dataclass
class CardOptions:
    """Which runs."""

    runs: list[str] = field(metadata={"help": "Folders with the results.json of hf-kdtl distill."})
    evaluation: str | None = field(
        default=None, metadata={"help": "The output_dir of hf-kdtl evaluate, to be merged into results.json once."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write the cards of the folders that are named, and print where they are."""
    (options,) = cli.parse(CardOptions, argv=argv, doc=__doc__)
    for folder in options.runs:
        if options.evaluation is not None:
            found = read_results(folder)
            merged = with_evaluation(found, read_results(options.evaluation))
            for section in merged:  # student_evaluation, or embedding of a student without a head
                if merged[section] != found.get(section):
                    update_results(folder, section, merged[section])
        print(write_card(folder))


if __name__ == "__main__":
    sys.exit(cli.run(main))
