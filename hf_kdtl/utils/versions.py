"""Whether the installed packages are recent enough: an older one fails later, in words that say nothing."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version
from transformers import __version__
from transformers.utils.versions import require_version

# What recomputes the blocks in the backward pass: the name of the setting, of its `_kwargs` and of the model's `is_`.
CHECKPOINTING = "activation_checkpointing" if Version(__version__) >= Version("5.23") else "gradient_checkpointing"
# Whether DINOv2's code reads a head_dim; without it a head is as wide as width // heads.
DINOV2_HEAD_DIM = Version(__version__) >= Version("5.18")


def check(package: str = "hf_kdtl") -> None:
    """Compare what is installed with what `package` requires, its extras aside.

    Raises:
        ImportError: naming what is too old, and what to type.
    """
    try:
        required = metadata.requires(package) or []
    except metadata.PackageNotFoundError:  # run from its sources, without an installation
        return
    if old := outdated([one for one in required if "extra ==" not in one]):
        names = " ".join(f"'{one}'" for one in old)
        raise ImportError(
            f"{package} does not work with {', '.join(old.values())}. Type: pip install --upgrade {names}"
        )


def outdated(requirements: list[str]) -> dict[str, str]:
    """{a requirement that is not satisfied: what is installed}. A missing package reports itself, and better."""
    found = {}
    for requirement in requirements:
        try:
            require_version(requirement)
        except (metadata.PackageNotFoundError, ValueError):  # missing, or of a version that cannot be compared
            continue
        except ImportError as error:
            found[requirement] = str(error).split("found ")[-1].split(".\n")[0].rstrip(".").replace("==", " ")
    return found
