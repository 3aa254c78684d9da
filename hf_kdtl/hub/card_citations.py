"""The citations of a card: BibTeX of the methods and measures that a run used."""

from __future__ import annotations

from hf_kdtl.evaluation.citations import LLRD, SKLEARN
from hf_kdtl.evaluation.records import Results
from hf_kdtl.gradient_rules import GRADIENT_RULES
from hf_kdtl.hub.card_tables import shown_scores
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.optim.options import RateOptions


def citations(results: Results) -> list[str]:
    """BibTeX of what was used: objectives with a weight, the rates, the rule, and the measures that the card shows."""
    from hf_kdtl.evaluation.metrics import METRICS

    settings = results.run.settings
    used = [OBJECTIVES[entry["name"]].citation for entry in results.objectives
            if entry["name"] in OBJECTIVES and entry.get("weight", 1.0)]  # fmt: skip
    if (rates := settings.get("layer_rates")) and (options := RateOptions.of(rates)).mode != "uniform":
        used.append(GRADIENT_RULES["layer_local"].citation if options.measured else LLRD)
    if (rule := settings.get("gradient_rule")) and rule["name"] in GRADIENT_RULES:
        used.append(GRADIENT_RULES[rule["name"]].citation)
    measures = [METRICS[name].citation_text for name in shown_scores(results)["all"] if name in METRICS]
    return [text for text in dict.fromkeys((*used, *measures)) if text not in ("", SKLEARN)]
