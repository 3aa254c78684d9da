"""Tables of paths and labels: csv, tsv and jsonl files, and the metadata file of a folder of images."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets import Dataset

from hf_kdtl.data.cells import whole_numbers
from hf_kdtl.utils.options import suggestion
from hf_kdtl.utils.text import some

METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
_PATHS = ("file_name", "filename", "path", "file", "image", "image_path", "filepath", "file_path")
LABELS = {"label", "labels", "class", "class_name", "target", "category"}


def open_table(file: Path, image_column: str | None, label_column: str | None, notes: list[str]) -> Dataset:
    """The images that a csv, tsv or jsonl file names, with its columns.

    Paths are absolute, or relative to the folder of the table.

    Raises:
        ValueError: when the file cannot be read, has no column of paths, or none of the files exists.
    """
    table = _read(file, image_column, label_column)
    column = _path_column(table, image_column, file)
    paths = [None if p is None else _existing(file.absolute().parent, str(p)) for p in table[column].to_pylist()]
    missing = [str(path) for path in paths if path is None or not os.path.exists(path)]
    if not paths:
        raise ValueError(f"{file.name} has no rows, expected one for each image.")
    if len(missing) == len(paths):
        raise ValueError(
            f"None of the {len(paths)} files that column {column!r} of {file.name} names exists (the first is "
            f"{some(missing, 1)}), expected paths relative to {str(file.absolute().parent)!r}, or absolute ones."
        )
    if missing:
        notes.append(f"{len(missing)} of {len(paths)} files that {file.name} names do not exist: {some(missing, 3)}.")
    return _with_images(table.drop_columns([column]), paths, image_column or "image")


def _existing(folder: Path, name: str) -> str:
    """The path of a file; with slashes for backslashes, as Windows writes them, where no file is called so."""
    path = folder / name
    return str(path if "\\" not in name or path.exists() else folder / name.replace("\\", "/"))


def metadata_split(
    split: str, file: Path, images: list[Path], has_classes: bool, label_column: str | None, notes: list[str]
) -> Dataset | None:
    """The images that a folder's metadata file names, with its columns; None where the class folders decide.

    They do where there are some, unless the file has a column named label (or class, ...), or `label_column`.

    Raises:
        ValueError: when the file cannot be read, or names files outside of the folder.
    """
    table = _read(file, None, label_column)
    columns = [name for name in table.column_names if name != "file_name"]
    if has_classes and not (label_column in columns or LABELS & {name.lower() for name in columns}):
        notes.append(f"The classes of {split} are its folders; columns of {file.name} were not used: {some(columns)}.")
        return None
    column = _path_column(table, None, file)
    named = [None if p is None else os.path.normpath(p.replace("\\", "/")) for p in table[column].to_pylist()]
    # A downloaded folder must not name files elsewhere on this machine.
    if outside := [p for p in named if p is not None and (os.path.isabs(p) or p.split(os.sep)[0] == "..")]:
        raise ValueError(f"{file} names {outside[0]!r}, expected paths inside of its folder, relative to it.")
    here = {str(path) for path in images}
    paths = [None if p is None else str(file.parent / p) for p in named]
    _note_differences(split, file, here, paths, notes)
    kept = [i for i, path in enumerate(paths) if path in here]
    if not kept:
        raise ValueError(
            f"{file} names none of the {len(here)} images in its folder (it names {some(named, 3)}), expected a "
            "column file_name of paths relative to it."
        )
    return _with_images(table.drop_columns([column]), paths, "image").select(kept)


def _note_differences(split: str, file: Path, here: set[str], paths: list[str | None], notes: list[str]) -> None:
    unnamed = sorted(here - {path for path in paths if path})
    absent = [str(path) for path in paths if path not in here]
    if unnamed:
        shown = some([os.path.basename(path) for path in unnamed], 3)
        notes.append(
            f"{len(unnamed)} of {len(here)} images of {split} are not named in {file.name} and were left out: {shown}."
        )
    if absent:
        shown = some([os.path.basename(path) for path in absent], 3)
        notes.append(f"{len(absent)} rows of {file.name} name no image of {split} and were left out: {shown}.")


def _read(file: Path, image_column: str | None, label_column: str | None) -> pa.Table:
    """The columns of a table. Of a csv or jsonl file what may be a class, and paths, are the text that stands there,
    or integers where all are written so; other columns are the numbers or dates that they look like."""
    names_of_text = {*LABELS, *_PATHS, str(image_column).lower(), str(label_column).lower()}

    def is_text(name: str, kind: pa.DataType) -> bool:
        measured = pa.types.is_floating(kind) or pa.types.is_temporal(kind)
        return not pa.types.is_null(kind) and (not measured or name.strip().lower() in names_of_text)

    try:
        if file.suffix == ".parquet":
            table = pa.parquet.read_table(file)
        elif file.suffix == ".jsonl":
            table = pa.json.read_json(file)
            dates = [
                (f.name, pa.string()) for f in table.schema if pa.types.is_temporal(f.type) and is_text(f.name, f.type)
            ]
            table = pa.json.read_json(file, parse_options=pa.json.ParseOptions(explicit_schema=pa.schema(dates)))
        else:
            table = _read_csv(file, is_text)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(
            f"{str(file)!r} could not be read as a table ({error}), expected UTF-8 with a header line, the same "
            "number of columns in every line."
        ) from error
    if odd := [name for name, c in zip(table.column_names, table.columns, strict=True) if pa.types.is_binary(c.type)]:
        raise ValueError(f"Column {odd[0]!r} of {str(file)!r} is not UTF-8. Save the file as UTF-8.")
    names = [name.strip() for name in table.column_names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{str(file)!r} has {len(twice)} columns called {twice[0]!r}; give each a name of its own.")
    return pa.table({name: _trimmed(column) for name, column in zip(names, table.columns, strict=True)})


def _read_csv(file: Path, is_text: Callable[[str, pa.DataType], bool]) -> pa.Table:
    with open(file, encoding="utf-8-sig", errors="replace") as opened:
        header = opened.readline()
    how = pa.csv.ParseOptions(delimiter=max(",;\t", key=header.count))
    table = pa.csv.read_csv(file, parse_options=how)
    if any(pa.types.is_binary(field.type) for field in table.schema):
        return table  # which is refused
    # Only an empty cell means "no value": a class may be called NA, None or null.
    kinds = pa.csv.ConvertOptions(column_types=dict.fromkeys(table.column_names, pa.string()))
    texts = pa.csv.read_csv(file, parse_options=how, convert_options=kinds)
    columns = [
        _numbered(_trimmed(text)) if is_text(field.name, field.type) else column
        for field, column, text in zip(table.schema, table.columns, texts.columns, strict=True)
    ]
    return pa.Table.from_arrays(columns, names=table.column_names)


def _numbered(column: pa.ChunkedArray) -> pa.ChunkedArray:
    numbers = whole_numbers(column.to_pylist())
    return column if numbers is None else pa.chunked_array([numbers], pa.int64())


def _trimmed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text without the blanks that stand around commas, unless two values would become one; nothing where it is
    empty."""
    if not pa.types.is_string(column.type):
        return column
    trimmed = pc.utf8_trim_whitespace(column)
    trimmed, column = (pc.if_else(pc.equal(trimmed, ""), None, one) for one in (trimmed, column))
    return trimmed if len(trimmed.unique()) == len(column.unique()) else column


def _path_column(table: pa.Table, named: str | None, file: Path) -> str:
    names = table.column_names
    lower = {name.lower(): name for name in reversed(names)}
    found = [lower[name] for name in _PATHS if name in lower] if named is None else [named] if named in names else []
    if not found:
        hint = suggestion(named, names) if named else ""
        raise ValueError(
            f"{file.name} has the columns {some(names)}, expected one of paths of images called "
            f"{named or 'file_name or path'}; or name it with image_column=...{hint}"
        )
    return found[0]


def _with_images(table: pa.Table, paths: list[str | None], name: str) -> Dataset:
    cells = [None if path is None else {"bytes": None, "path": path} for path in paths]
    images = Dataset.from_dict({name: cells}, features=datasets.Features({name: datasets.Image(decode=False)}))
    rest = Dataset(table.drop_columns([name]) if name in table.column_names else table)
    return datasets.concatenate_datasets([images, rest], axis=1) if rest.column_names else images
