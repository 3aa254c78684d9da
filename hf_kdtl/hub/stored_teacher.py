"""A store of teacher outputs on the Hub: a dataset repository with a card, without paths of this machine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData, HfApi

from hf_kdtl.hub import license as licenses
from hf_kdtl.hub.card_values import millions
from hf_kdtl.hub.markdown import Markdown, fenced, inline, render, table
from hf_kdtl.hub.provenance import is_on_hub
from hf_kdtl.hub.staging import CARD, refuse_secrets, sanitized
from hf_kdtl.hub.upload import check_access, create_commit, hub_errors
from hf_kdtl.models.teachers.store.manifest import DIGESTS, FILE, GB, ROWS, Manifest, read_manifest
from hf_kdtl.models.teachers.store.shards import incomplete
from hf_kdtl.utils.redaction import anonymous, local_paths

PUBLIC = ("objectives", "layer_rates", "augmentation", "view_seed", "image_size", "train_images", "labels_per_class",
          "validation_fraction", "test_fraction", "split_seed", "image_column", "label_column", "on_bad_image",
          "high_bit_depth", "multi_label")  # fmt: skip
"""Settings that go up; of the data's name the one that the Hub or this package knows."""
BUILT_IN = "digits"


def publish_store(
    folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Publish a store in one commit of a dataset repository. The folder stays as it is.

    Args:
        folder: of a complete store.
        repo_id, token, private, revision, create_pr: as `hf_kdtl.hub.upload.check_access`.
        license: by default the teacher's, as the store kept it.

    Raises:
        ValueError: for a store that is not complete; a license that is not known or that the teacher's does not allow;
            a name that a model has, which would be opened in its place; and as `check_access`.
        HubError: the Hub refused, or could not be reached; calling it again sends only what is not there yet.
    """
    folder = Path(folder).expanduser()
    manifest = published(read_manifest(folder))
    if missing := incomplete(folder, manifest):
        raise ValueError(
            f"the store {folder} is not complete: {len(missing)} of {len(manifest.shards())} shards are missing. "
            f"Continue it: hf-kdtl cache --output {quote(str(folder))}."
        )
    found = licenses.resolve_license(
        manifest.teacher.license, license, licenses.TEACHERS, "a store of its outputs, made to train from,"
    )
    name = check_access(repo_id, token, private, revision=revision, create_pr=create_pr, kind="dataset")
    with hub_errors(name):
        if HfApi(token=token).repo_exists(name):
            raise ValueError(
                f"{name} is also a model, which --teacher {name} would open. Name the store otherwise: --repo_id "
                f"{name}-outputs."
            )
    with TemporaryDirectory(prefix="store-") as staged:
        _stage(folder, Path(staged), manifest, store_card(manifest, name, found), token)
        shards = {shard.path: folder / shard.path for shard in manifest.shards()}
        how = "Publish the teacher's outputs"
        return create_commit(staged, name, token, revision, how, create_pr, kind="dataset", more=shards)


def published(manifest: Manifest) -> Manifest:
    """What a store says of itself where others read it: names of the Hub and no paths of this machine."""
    teacher, settings = manifest.teacher, manifest.settings
    if not is_on_hub(teacher.name_or_path):
        teacher = replace(teacher, name_or_path="", revision=None)
    kept = {name: settings[name] for name in PUBLIC if name in settings}
    if (source := str(settings.get("dataset"))) == BUILT_IN or ("/" in source and is_on_hub(source)):
        kept["dataset"] = source
    return replace(manifest, teacher=teacher, settings=anonymous(kept, local_paths(kept)))


def _stage(folder: Path, target: Path, manifest: Manifest, card: DatasetCard, token: str | None) -> None:
    (target / "teacher").mkdir()
    (target / FILE).write_text(manifest.to_json(), encoding="utf-8")
    (target / CARD).write_text(str(card), encoding="utf-8")
    for path in sorted((folder / "teacher").glob("*.json")):
        text = json.dumps(sanitized(path), indent=2, ensure_ascii=False)
        (target / "teacher" / path.name).write_text(f"{text}\n", encoding="utf-8")
    for path in target.rglob("*.*"):
        refuse_secrets(path.name, path.read_bytes(), token)
    for path in [folder / ROWS, folder / DIGESTS, *(folder / "teacher").glob("*.safetensors")]:
        shutil.copyfile(path, target / path.relative_to(folder))


def store_card(manifest: Manifest, name: str, license: str) -> DatasetCard:
    """The card of a published store, from what it says of itself."""
    teacher, data = manifest.teacher, manifest.fingerprint.get("data", {})
    source = manifest.settings.get("dataset", "")
    data_card: Any = DatasetCardData(
        license=license,
        pretty_name=f"Outputs of {teacher.name_or_path or teacher.architecture}",
        tags=["hf_kdtl", "knowledge-distillation"],
        task_categories=["image-classification"],
        size_categories=_size(manifest.images * manifest.views),
        viewer=False,
        source_datasets=[source] if "/" in source else None,
    )
    own, processor = data.get("teacher_pixels") == "own", data.get("image_processor")
    values = {
        "title": f"Outputs of {teacher.name_or_path or teacher.architecture} for {manifest.images:,} images",
        "name": Markdown(json.dumps(name)),
        "license": Markdown(f"{inline(license)}{_whose(license, teacher.license)}"),
        "usage": fenced(usage(manifest, name), "bash"),
        "images": f"{manifest.images:,}",
        "views": f"{manifest.views:,}",
        "size": f"{manifest.bytes / GB:.2f} GB",
        "precision": manifest.precision,
        "top_k": manifest.top_k,
        "teacher_batch": manifest.teacher_batch,
        "kinds": _kinds(manifest),
        "objectives": ", ".join(_names(manifest.settings.get("objectives"))),
        "teacher": _teacher(manifest),
        "classes": _classes(teacher.class_names or [], teacher.num_labels),
        "data": source or "not named",
        "augmentation": json.dumps(data["augmentation"]) if data.get("augmentation") else "not augmented",
        "view_seed": data.get("view_seed", 0),
        "view_version": data.get("view_version", "of no augmentation"),
        "own": own,
        "processor": fenced(json.dumps(processor, indent=2), "json") if processor else "not recorded.",
        "teacher_processor": _processor(manifest),
    }
    return DatasetCard(f"---\n{data_card.to_yaml()}\n---\n\n{render('store.md', **values)}")


def usage(manifest: Manifest, name: str) -> str:
    """The command that trains from it; what is the user's own is in angle brackets."""
    dataset = manifest.settings.get("dataset", "<the images>")
    objectives = " ".join(_names(manifest.settings.get("objectives"))) or "task logit_kd"
    return (
        f"hf-kdtl distill --teacher {name} --dataset {dataset} --student <a folder or Hub name> --objectives "
        f"{objectives} --output_dir runs/student"
    )


def _whose(license: str, teachers: str | None) -> str:
    if license == teachers:
        return ", as of its teacher."
    known = f"that of the teacher is {teachers}" if teachers else "that of the teacher is not known"
    return f", chosen by the publisher ({known})."


def _kinds(manifest: Manifest) -> Markdown:
    rows: list[list[Any]] = [["output", "shape of one image", "type", "MB for 1,000 images and views"]]
    for name, kind in sorted(manifest.kinds.items()):
        rows.append([name, " x ".join(map(str, kind.shape)) or "1", kind.dtype, f"{kind.bytes / 1e3:.3f}"])
    return table(rows)


def _teacher(manifest: Manifest) -> dict[str, Any]:
    teacher = manifest.teacher
    name = teacher.name_or_path
    link = Markdown(f"[{inline(name)}](https://huggingface.co/{name})") if name else "a model that is not on the Hub"
    size = teacher.image_size
    return {
        "what": name or f"a {teacher.architecture}",
        "name": link,
        "architecture": teacher.architecture,
        "size": millions(teacher.parameters),
        "image": " x ".join(map(str, size)) if size else None,
    }


def _classes(names: list[str], number: int, most: int = 12) -> dict[str, Any]:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return {"count": number or "no", "shown": Markdown(", ".join(inline(n, 40) for n in names[:most]) + rest)}


def _processor(manifest: Manifest) -> Markdown | None:
    found = manifest.fingerprint.get("teacher_processor")
    return fenced(json.dumps(found, indent=2), "json") if found else None


def _names(objectives: Any) -> list[str]:
    """Of a setting as a flag or a file gives it: names, entries, or one JSON text."""
    found = json.loads(objectives) if isinstance(objectives, str) and objectives.startswith("[") else objectives
    found = [found] if isinstance(found, str) else found or []
    return list(dict.fromkeys(entry if isinstance(entry, str) else entry.get("name", "") for entry in found))


def _size(rows: int) -> str:
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
    return next((name for power, name in enumerate(names, 3) if rows < 10**power), "n>1B")
