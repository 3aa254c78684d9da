"""The settings files that come with the package: hf_kdtl/configs and, for accelerate, its folder launch."""

from __future__ import annotations

from pathlib import Path

import hf_kdtl
from hf_kdtl.utils.options import closest

FOLDER = Path(hf_kdtl.__file__).parent / "configs"


def training_files() -> dict[str, Path]:
    """{name: file} of the settings that `--config name` takes."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def launch_files() -> dict[str, Path]:
    """{name: file} of the settings of `accelerate launch`."""
    return {path.stem: path for path in sorted((FOLDER / "launch").glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file that `--config` asks for. A name with a slash or an ending is a path; a bare name is a shipped file.

    Raises:
        FileNotFoundError: naming the closest one.
    """
    file, known = Path(name).expanduser(), training_files()
    is_path = "/" in name or file.suffix in (".yaml", ".yml")
    if not is_path and name in known:
        return known[name]
    if file.is_file():
        return file
    if name in launch_files():
        raise FileNotFoundError(
            f"--config {name}: this file is for accelerate launch. Type hf-kdtl configs copy {name}, then accelerate "
            f"launch --config_file {name}.yaml -m hf_kdtl.commands.distill ..."
        )
    near = {str(other): other.name for other in sorted(file.parent.glob("*.y*ml"))} if is_path else {}
    near |= {other: other for other in known}
    wanted = file.name if is_path else name
    close = closest(wanted, near.values()) or (closest(file.stem, known) if is_path else [])
    hint = "".join(f" Did you mean {shown}?" for shown, end in near.items() if [end] == close)
    raise FileNotFoundError(
        f"the file of --config, {name!r}, does not exist.{hint} hf-kdtl configs lists the shipped ones."
    )
