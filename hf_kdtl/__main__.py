"""The program `hf-kdtl`, also `python -m hf_kdtl`: finds the command and imports that one alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from hf_kdtl.utils.options import suggestion

Main = Callable[[Sequence[str] | None], int | None]


def _init() -> Main:
    """look at a folder of images and write settings for it"""
    from hf_kdtl.commands.init import main

    return main


def _train_teacher() -> Main:
    """train or fine-tune an image classifier, to be a teacher"""
    from hf_kdtl.commands.train_teacher import main

    return main


def _cut() -> Main:
    """cut a student out of a teacher, to sizes or to a budget"""
    from hf_kdtl.commands.cut import main

    return main


def _distill() -> Main:
    """train a student from a teacher, and alone for comparison"""
    from hf_kdtl.commands.distill import main

    return main


def _probe() -> Main:
    """find out in minutes what distillation would gain here"""
    from hf_kdtl.commands.probe import main

    return main


def _tune() -> Main:
    """search objectives, weights, temperature and rate within a time"""
    from hf_kdtl.commands.tune import main

    return main


def _preflight() -> Main:
    """show what `distill` would pair, what it costs and what will not run"""
    from hf_kdtl.commands.preflight import main

    return main


def _cache() -> Main:
    """run the teacher once and store its outputs for training"""
    from hf_kdtl.commands.cache import main

    return main


def _evaluate() -> Main:
    """measure students by more than accuracy, with their teacher"""
    from hf_kdtl.commands.evaluate import main

    return main


def _compare() -> Main:
    """compare runs over seeds, with intervals and corrected tests"""
    from hf_kdtl.commands.compare import main

    return main


def _export() -> Main:
    """write a student as ONNX, checked against torch"""
    from hf_kdtl.commands.export import main

    return main


def _push() -> Main:
    """publish a run's student on the Hub, with its card"""
    from hf_kdtl.commands.push import main

    return main


def _model_card() -> Main:
    """write the card of a run again from its results.json"""
    from hf_kdtl.commands.model_card import main

    return main


def _fit_representation() -> Main:
    """compress a layer of a teacher for the objective `bregman`"""
    from hf_kdtl.commands.fit_representation import main

    return main


def _configs() -> Main:
    """list the settings files that come with the package, copy one"""
    from hf_kdtl.commands.configs import main

    return main


COMMANDS: dict[str, Callable[[], Main]] = {
    load.__name__.strip("_").replace("_", "-"): load
    for load in (_init, _train_teacher, _cut, _distill, _probe, _tune, _preflight, _evaluate, _compare, _export, _push,
                 _model_card, _fit_representation, _configs, _cache)
}  # fmt: skip


def overview() -> str:
    """What there is to type."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{load.__doc__}" for name, load in COMMANDS.items()]
    return "\n".join(
        ["Knowledge distillation for vision transformers. Type hf-kdtl <command> --help for its options.", "", *lines,
         "", "A first run: hf-kdtl train-teacher --config digits_teacher, then hf-kdtl distill --config digits"]
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` begins with; returns the exit code."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        from hf_kdtl import __version__

        print(f"hf_kdtl {__version__}")
        return 0
    if (load := COMMANDS.get(name.replace("_", "-"))) is None:
        print(f"error: unknown command: {name!r}.{suggestion(name, COMMANDS)}\n\n{overview()}", file=sys.stderr)
        return 2
    command = load()
    from hf_kdtl.commands.common.arguments import run

    return run(lambda: command(rest))


if __name__ == "__main__":
    sys.exit(main())
