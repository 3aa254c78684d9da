"""Sentences about a store of teacher outputs: what is in it, what would shrink it, what to type next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from hf_kdtl.commands.common.next_command import program
from hf_kdtl.commands.common.stored import flags
from hf_kdtl.models.teachers.store.manifest import GB, Manifest, read_manifest
from hf_kdtl.models.teachers.store.shards import incomplete
from hf_kdtl.models.teachers.store.signals import TOP
from hf_kdtl.utils.redaction import local_name


def described(store: str | Manifest) -> str:
    """What a store holds, or will hold."""
    manifest = read_manifest(Path(store).expanduser()) if isinstance(store, str) else store
    lines = [
        f"{manifest.images} images x {manifest.views} views, {manifest.bytes / GB:.2f} GB, {manifest.precision}, of "
        f"{manifest.teacher.architecture} {local_name(manifest.teacher.name_or_path)}".rstrip()
        + f", teacher_batch {manifest.teacher_batch}"
    ]
    for name, kind in sorted(manifest.kinds.items()):
        shape = " x ".join(map(str, kind.shape)) or "1"
        lines.append(
            f"  {name:<24} {shape:>14} {kind.dtype:<8} {kind.bytes / 1e3:10.3f} MB a thousand images and view"
        )
    data = manifest.fingerprint.get("data", {})
    own = ", the teacher's own pixels" if data.get("teacher_pixels") == "own" else ""
    lines.append(f"  augmentation {data.get('augmentation') or 'none'}, view_seed {data.get('view_seed', 0)}{own}")
    if isinstance(store, str):
        missing, every = len(incomplete(Path(store).expanduser(), manifest)), len(manifest.shards())
        lines.append(f"  {every - missing} of {every} shards are written" + (", all of them." if not missing else "."))
    return "\n".join(lines)


def too_large(manifest: Manifest, missing: float, most: float) -> str:
    """What would make a store fit."""
    found = []
    if (views := int(manifest.views * most / missing)) >= 1:
        found.append(f"type --views {views}")
    if manifest.precision == "float32":
        found.append("--precision float16 (half the size)")
    classes = manifest.kinds.get("logits")
    total = sum(kind.bytes for kind in manifest.kinds.values())
    if classes is not None and classes.shape[0] > 20 and classes.bytes > total / 2:
        found.append("--top_k 10 (the largest class outputs alone)")
    if sum(kind.bytes for name, kind in manifest.kinds.items() if name.startswith("hidden_states")) > total / 2:
        found.append('fewer layers ("layers": "last" in the objective)')
    if manifest.top_k is not None and TOP in manifest.kinds:
        found.append("a smaller --top_k")
    return " or ".join(found) or "store fewer images with --train_images"


OF_STORES = ("teacher", "teacher_pixels", "precision", "top_k", "views", "teacher_batch", "augmentation", "view_seed")
"""Settings that a run takes from the store."""


def next_steps(output: str, settings: dict[str, Any]) -> str:
    """The command that trains from a store, with the settings it was written with."""
    kept = {name: value for name, value in settings.items() if name not in OF_STORES}
    if not any(name.startswith("student") for name in kept):
        kept["student_config"] = small_student(kept.pop("image_size", None) or 224)
    given = {"teacher": output, **kept, "output_dir": "runs/student"}
    return f"{program()} distill {shlex.join(flags(given))}"


def small_student(size: int) -> dict[str, Any]:
    """The config of a small transformer for images of so many pixels, of at least 8 patches a side.

    >>> small_student(32)["patch_size"], small_student(224)["patch_size"], small_student(30)["patch_size"]
    (4, 16, 3)
    """
    patch = next((p for p in (16, 8, 4, 3, 2) if size % p == 0 and size // p >= 8), 1)
    return {"model_type": "vit", "image_size": size, "patch_size": patch, "hidden_size": 192, "num_hidden_layers": 6,
            "num_attention_heads": 3, "intermediate_size": 768}  # fmt: skip
