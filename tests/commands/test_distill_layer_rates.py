"""hf-kdtl distill with learning rates per layer: measured, kept in results.json, and shown."""

import json
from pathlib import Path

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.evaluation import read_results
from hf_kdtl.reports.run_report import write_report
from tests.commands.conftest import QUICK

RATES = {"mode": "discrepancy", "source": "attention", "every": 1}


def arguments(*extra, rates=RATES):
    flags = ["--teacher", "teacher", "--dataset", "images", "--student_layers", "2", "--output_dir", "out", *QUICK]
    return [*flags, "--layer_rates", json.dumps(rates), *extra]


def test_rates_are_measured_kept_and_shown(command, images, teacher, capsys):
    distill = command("distill").main
    distill(arguments("--baseline", "true"))
    assert "the student alone has no teacher to measure layer_rates by" in capsys.readouterr().out
    results = read_results("out")
    assert results["run"]["settings"]["layer_rates"] == RATES
    ((name, kept),) = results["layer_rates"].items()
    assert name == "distilled-seed42" and kept["options"]["r_max"] == 4.0
    assert [entry["step"] for entry in kept["history"]] == [0, 1]
    logged = results["curves"]["distilled-seed42"]
    assert not any(key.startswith("lr_") for entry in logged for key in entry)
    picture, report = Path("out/layer_rates.png"), Path("out/report.md")
    text = report.read_text()
    assert "](layer_rates.png)" in text and "distilled-seed42 (mode discrepancy, attention)" in text
    picture.unlink()
    report.unlink()
    write_report("out")
    assert report.read_text() == text and picture.stat().st_size > 1000, "made from results.json alone"

    flags = arguments("--baseline", "true", "--resume_from_checkpoint", "true", rates=RATES | {"every": 2})
    assert cli.run(lambda: distill(flags)) == 2
    assert "was begun with layer_rates" in capsys.readouterr().err
    distill(arguments("--overwrite_output_dir", "true", "--max_steps", "1", rates={"mode": "llrd"}))
    assert not picture.exists() and read_results("out")["layer_rates"]["distilled-seed42"]["history"] == []


def test_settings_from_yaml_and_what_preflight_says(command, images, teacher, capsys):
    lines = ["teacher: teacher", "dataset: images", "student_layers: 2", "output_dir: out", "use_cpu: true"]
    rates = "layer_rates: {mode: discrepancy, source: jacobian, momentum: 0.5}"
    Path("run.yaml").write_text("\n".join([*lines, rates]))
    preflight = command("preflight").main
    preflight(["--config", "run.yaml"])
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["layer", "parameters", "rate", "x", "compared", "with"] in shown
    assert any(line[:2] == ["block", "1"] and line[-3:] == ["teacher", "block", "2"] for line in shown if line)
    Path("run.yaml").write_text("\n".join([*lines, "layer_rates: {layers: [[0, 0], [5, 1]]}"]))
    preflight(["--config", "run.yaml"])
    assert "block 5 of the student, which has the blocks 0 to 1" in capsys.readouterr().out
    assert not Path("out").exists()
    Path("run.yaml").write_text("\n".join([*lines, "layer_rates: {sorce: jacobian}"]))
    assert cli.run(lambda: preflight(["--config", "run.yaml"])) == 2
    assert "run.yaml, line 6: unknown key of layer_rates: 'sorce'. Did you mean 'source'" in capsys.readouterr().err
