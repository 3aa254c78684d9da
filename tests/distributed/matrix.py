"""What each objective and gradient rule gives in each way of running it: the table of docs/devices.md, measured.

python -m tests.distributed.matrix                  # every cell, 4 CPU minutes: writes docs/devices.json and the table
python -m tests.distributed.matrix --rows jacobian  # some rows of them, seconds each
python -m tests.distributed.matrix --device cuda    # on a GPU, against the CPU: printed alone

A cell is one optimizer step of the trainer on 8 images (matrix_runs.py): the gradient that reaches the
optimizer, against that of one process in float32.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers.utils import logging

from hf_kdtl.gradient_rules import GRADIENT_RULES
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.utils.versions import CHECKPOINTING
from tests.distributed.matrix_runs import IMAGES, arguments, of_adapter, sharded, step
from tests.support.helpers import launch, leave

START, END = "<!-- matrix -->", "<!-- /matrix -->"
DOCS = Path(__file__).parents[2] / "docs"
EXACT = 1e-4
"""A largest difference below this part of the largest entry of the gradient is rounding."""
TITLES = {
    "float64": "one process",
    "accumulation": "accumulation",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "bf16": "bf16",
    "compile": "torch.compile",
    "checkpointing": "checkpointing",
    "peft": "LoRA",
    "self": '`teacher="self"`',
}
ALONE = {
    "float64": {},
    "accumulation": {"per_device_train_batch_size": IMAGES // 4, "gradient_accumulation_steps": 4},
    "bf16": {"bf16": True},
    "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "checkpointing": {CHECKPOINTING: True},
    "peft": {},
    "self": {},
}
ROWS = [*OBJECTIVES, *GRADIENT_RULES]
NO_TEACHER = "none: it has no teacher"


def titles(device=None):
    """{column: its title}, of the document, or of what one process does on a device."""
    if device is None:
        return TITLES
    return {"one": f"one process, {device}"} | {c: t for c, t in TITLES.items() if c in ALONE and c != "float64"}


def attempt(run):
    """(gradients, notes, "") or (nothing, nothing, the message instead)."""
    try:
        return *run(), ""
    except ValueError as error:
        return {}, [], f"refused: {error}"
    except Exception as error:  # neither right nor refused: to be seen in the table
        return {}, [], f"fails: {type(error).__name__}: {error}"


def cell(expected, usual, found, notes, message):
    """{"kind", "value", "why"} of one cell.

    Args:
        expected: the gradients of one process in float32.
        usual: the notes of that run.
        found, notes, message: what `attempt` gave.
    """
    if message:
        kind, _, why = message.partition(": ")
        return {"kind": kind, "value": None, "why": re.sub(r"^objective '\w+': ", "", why)}
    assert found.keys() <= expected.keys(), found.keys() - expected.keys()
    differences = {n: (found.get(n, torch.zeros_like(g)).double() - g.double()) for n, g in expected.items()}
    scale = max(g.abs().max().item() for g in expected.values())
    assert scale > 1e-6, "nothing to compare"
    largest = max(d.abs().max().item() for d in differences.values()) / scale
    full = sum(g.double().square().sum().item() for g in expected.values()) ** 0.5
    off = sum(d.square().sum().item() for d in differences.values()) ** 0.5 / full
    changed = " ".join(note.partition(": ")[2] for note in notes if note not in usual)
    exact = largest <= EXACT  # not so for nan
    return {"kind": "exact" if exact else "approximate", "value": float(f"{largest if exact else off:.0e}"),
            "why": changed}  # fmt: skip


def two_processes(out, rows):
    """The columns that need two: started by `launch`, written by rank 0."""
    args = arguments(f"{out}.run", per_device_train_batch_size=IMAGES // 4, gradient_accumulation_steps=2)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors, rest = {}, {"world": dist.get_world_size()}
    for row in rows:
        ways = {"ddp": lambda row=row: step(row, args), "fsdp2": lambda row=row: sharded(row, mesh)}
        for column, way in ways.items():
            found, notes, message = attempt(way)
            rest[f"{column}/{row}"] = notes, message
            tensors |= {f"{column}/{row}/{name}": g.contiguous() for name, g in found.items()}
    if dist.get_rank() == 0:
        save_file(tensors, out, metadata={"rest": json.dumps(rest)})


def of_two(folder, rows):
    """{(column, row): (gradients, notes, message)} of two processes."""
    out = Path(folder, "two")
    launch("tests.distributed.matrix", 2, "--two", out, "--rows", *rows)
    with safe_open(out, "pt") as file:
        rest = json.loads(file.metadata()["rest"])
        assert rest.pop("world") == 2
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = {}
    for key, (notes, message) in rest.items():
        mine = {n.removeprefix(f"{key}/"): g for n, g in tensors.items() if n.startswith(f"{key}/")}
        found[tuple(key.split("/"))] = mine, notes, message
    return found


def measure(rows, device=None):
    """{row: {column: cell}}; with a device, of what one process does there."""
    with tempfile.TemporaryDirectory() as folder:
        two = {} if device else of_two(folder, rows)
        return {row: measured(row, folder, two, device) for row in rows}


def measured(row, folder, two, device=None):
    """{column: cell} of a row."""
    expected, usual = step(row, arguments(folder))
    cells = {}
    for column in titles(device):
        reference, way = expected, two.get((column, row))
        if column == "self" and row in OBJECTIVES and not OBJECTIVES[row].needs_teacher:
            way = {}, [], NO_TEACHER
        elif column not in ("ddp", "fsdp2"):
            there = {"use_cpu": False, "tf32": False} if device == "cuda" else {}
            way = attempt(lambda c=column, t=there: step(row, arguments(folder, **ALONE.get(c, {}) | t), c))
        if column in ("peft", "self") and not way[2]:
            reference = of_adapter(row, folder, "one" if column == "peft" else "beside")
        cells[column] = cell(reference, usual, *way)
    return cells


# ---- The document ----


def shown(cell, notes):
    """A cell in words; what there is to say of it goes to the notes, each of them once."""
    value = cell["value"]
    words = {"exact": f"exact, {value:.0e}" if value else "exact, 0", "none": "-"}
    if cell["kind"] == "approximate":
        message = f"{100 * value:g} % off" if value < 0.95 else f"{value:.0f} times off"
    else:
        message = words.get(cell["kind"], cell["kind"])
    if not cell["why"] or cell["kind"] == "none":
        return message
    if cell["why"] not in notes:
        notes.append(cell["why"])
    return f"{message} [{notes.index(cell['why']) + 1}]"


def rendered(table, device=None):
    """The table of docs/devices.md, with its notes."""
    notes, columns = [], titles(device)
    lines = [f"| | {' | '.join(columns.values())} |", f"| --- |{' --- |' * len(columns)}"]
    for row, cells in table.items():
        lines.append(f"| `{row}` | {' | '.join(shown(cells[column], notes) for column in columns)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])


def write(found):
    """Put rows of figures beside the document, and the table into it."""
    before = json.loads((DOCS / "devices.json").read_text()) if (DOCS / "devices.json").is_file() else {}
    table = {row: (before | found)[row] for row in ROWS if row in before | found}
    (DOCS / "devices.json").write_text(json.dumps(table, indent=1) + "\n")
    path = DOCS / "devices.md"
    marked = f"{START}\n{rendered(table)}\n{END}"
    path.write_text(re.sub(f"{START}.*{END}", lambda _: marked, path.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--two", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.two:
        two_processes(options.two, options.rows)
        leave()
    found = measure(options.rows, options.device)
    if options.device:
        print(rendered(found, options.device))
    else:
        write(found)
