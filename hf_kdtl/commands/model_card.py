"""Write the card of a finished run again: README.md from results.json, and from nothing else.

hf-kdtl model-card model_cards/vit-4-of-8 model_cards/resnet-small
hf-kdtl model-card runs/mine --evaluation runs/evaluation     (merges what hf-kdtl evaluate found, once)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_kdtl.evaluation.results import read_results, update_results
from hf_kdtl.hub.model_card import with_evaluation, write_card


def main(argv: Sequence[str] | None = None) -> None:
    """Write the cards of the folders that are named."""
    parser = argparse.ArgumentParser(description="Write README.md again from results.json.")
    parser.add_argument("folders", nargs="+", help="folders with the results.json of hf-kdtl distill")
    parser.add_argument("--evaluation", help="output_dir of hf-kdtl evaluate, merged into results.json")
    options = parser.parse_args(argv)
    for folder in options.folders:
        if options.evaluation:
            merged = with_evaluation(read_results(folder), read_results(options.evaluation))
            update_results(folder, "judged", merged["judged"])
        print(write_card(folder))


if __name__ == "__main__":
    main()
