"""List the settings files that come with the package, or copy one into this folder to edit it.

  hf-kdtl configs
  hf-kdtl configs copy digits
  hf-kdtl configs copy ddp && accelerate launch --config_file ddp.yaml -m hf_kdtl.commands.distill --config digits

A copy is never written over an existing file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hf_kdtl.commands.common.arguments import run
from hf_kdtl.commands.common.shipped import launch_files, training_files
from hf_kdtl.utils.options import check_known


def main(argv: Sequence[str] | None = None) -> None:
    """List the files, or copy the one that is named.

    Raises:
        ValueError: for another command line than those above, or an unknown name.
        FileExistsError: when a file of this name is here already.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        return print(listing())
    if {"-h", "--help", "--help-all"} & {*words}:
        return print(__doc__)
    if words[0] != "copy" or len(words) != 2:
        raise ValueError(f"found {' '.join(words)!r}; expected hf-kdtl configs, or hf-kdtl configs copy <name>.")
    print(copy(words[1]))


def listing() -> str:
    """Each file by name, with the first line of its header."""
    lines: list[str] = []
    for title, files in (
        ("For --config <name> of train-teacher and distill:", training_files()),
        ("For accelerate launch --config_file <name>.yaml, after hf-kdtl configs copy <name>:", launch_files()),
    ):
        width = max(map(len, files)) + 2
        lines += [title, *(f"  {name:<{width}}{first_line(path)}" for name, path in files.items()), ""]
    return "\n".join([*lines, "hf-kdtl configs copy <name> writes one into this folder, to edit it."])


def first_line(path: Path) -> str:
    """The first sentence of a file's header."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def copy(name: str) -> str:
    """Write a file into the working directory; returns what to do with it.

    Raises:
        ValueError: for an unknown name.
        FileExistsError: when the file exists here.
    """
    files = training_files() | launch_files()
    name = name.removesuffix(".yaml")
    check_known("settings file", name, list(files))
    target = Path(f"{name}.yaml")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(files[name].read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise FileExistsError(f"{target} exists here; move it away, or use it: --config {target}.") from error
    if name in launch_files():
        use = f"accelerate launch --config_file {target} -m hf_kdtl.commands.distill --config digits"
    else:
        use = f"hf-kdtl {'train-teacher' if name.endswith('teacher') else 'distill'} --config {target}"
    return f"Wrote {target}. To use it: {use}"


if __name__ == "__main__":
    sys.exit(run(main))
