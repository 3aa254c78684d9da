"""What is lost and gained by an exported file, in float32 and in int8."""

from __future__ import annotations

from hf_kdtl.evaluation.records import Export
from hf_kdtl.reports.evaluation_summary import FORMS, speed_table
from hf_kdtl.utils.text import markdown_table


def export_section(export: Export) -> list[str]:
    """The section of a report."""
    return ["## Exported files", "", export_table(export), "", export_sentence(export), "", *_speed(export)]


def export_table(export: Export) -> str:
    """A row for each file: accuracy on all of test, size."""
    rows = [
        [FORMS[form], _percent(accuracy), f"{export.file_bytes[form] / 1e6:.1f}"]
        for form, accuracy in export.accuracy.items()
    ]
    return markdown_table([["", "test accuracy", "MB"], *rows])


def export_sentence(export: Export) -> str:
    """What int8 costs, in a sentence."""
    exact, rounded = export.accuracy["onnx"], export.accuracy["int8"]
    lost = 100 * (exact - rounded)
    verb = f"loses {lost:.2f} points" if lost >= 0 else f"gains {-lost:.2f} points"
    return (
        f"In int8 it {verb} of accuracy on {export.images:,} test images ({_percent(exact)} in float32, "
        f"{_percent(rounded)} in int8; at most {export.max_drop:g} points were allowed), calibrated on "
        f"{export.calibration_images} training images."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _speed(export: Export) -> list[str]:
    if export.speed is None:
        return []
    return [speed_table(export.speed), "", f"Median of a forward on {export.device}.", ""]
