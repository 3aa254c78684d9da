"""How a card says that its student was trained: objectives, layer rates, gradient rule, settings, citations."""

from __future__ import annotations

from typing import Any

import yaml

from hf_kdtl.evaluation.records import Results
from hf_kdtl.hub.card_citations import citations
from hf_kdtl.hub.card_tables import models_of
from hf_kdtl.hub.markdown import Markdown, fenced, table
from hf_kdtl.reports.run_report import conflict_note, first_with_history, rates_note, weight_text
from hf_kdtl.utils.redaction import anonymous

# Settings of a run, and not of what it trains: a reader has other folders.
_OWN = ("overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm", "dataloader_num_workers", "push_to_hub",
        "hub_model_id", "hub_strategy", "hub_private_repo", "save_total_limit", "accelerator_config", "logging_dir",
        "run_name", "do_eval")  # fmt: skip


def training_section(results: Results) -> dict[str, Any]:
    """The template's values from `objectives` to `citations`."""
    found = citations(results)
    return {
        "objectives": _objectives(results),
        "pairing": {users: fenced(pairs) for users, pairs in models_of(results).pairing.items()},
        "layer_rates": _layer_rates(results),
        "gradient_rule": _gradient_rule(results),
        "citations": fenced("\n\n".join(found), "bibtex") if found else None,
        **_again(results),
    }


def _objectives(results: Results) -> Markdown:
    if not results.objectives:
        return Markdown("Not recorded.")
    rows: list[list[Any]] = [["name", "weight", "options"]]
    for entry in results.objectives:
        options = {key: value for key, value in entry.items() if key not in ("name", "weight")}
        shown = ", ".join(f"{key} {value}" for key, value in options.items()) or "defaults"
        rows.append([entry["name"], weight_text(entry, results), shown])
    return table(rows)


def _layer_rates(results: Results) -> str:
    if (shown := first_with_history(results.layer_rates)) is not None:
        return rates_note(*shown)
    asked = results.run.settings.get("layer_rates")
    return f"{asked}; nothing was measured." if asked else "one rate for all layers."


def _gradient_rule(results: Results) -> str:
    if (shown := first_with_history(results.gradient_rule)) is not None:
        return conflict_note(*shown)
    asked = results.run.settings.get("gradient_rule")
    return f"{asked}." if asked else "none: the gradients of all objectives are added."


def _again(results: Results) -> dict[str, Any]:
    run = results.run
    config = {name: value for name, value in anonymous(run.settings).items() if name not in _OWN}
    config |= {"objectives": results.objectives} if results.objectives else {}
    by = f"`hf-kdtl {run.recipe.replace('_', '-')} --config this.yaml`" if run.recipe else "DistillationTrainer"
    made = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return {
        "again": Markdown(f"The settings of the run, for {by}, with your own folders for data and models:"),
        "config": fenced(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), "yaml"),
        "made_with": f"Trained with {made or 'versions that were not recorded'}, on {run.processes} "
        f"process{'es' if run.processes > 1 else ''}, {run.device or 'a device that was not recorded'}.",
    }
