"""A store that is written while a run trains: the teacher answers for a view until it is there, then it is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_kdtl.data.store import StoreWriter
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.teachers.source import Batch
from hf_kdtl.models.teachers.store import signals
from hf_kdtl.models.teachers.store.partial import PartialReader
from hf_kdtl.models.teachers.stored import StoredTeacher, rows_and_views


class FillingTeacher(StoredTeacher):
    """A live teacher whose outputs are kept: an image that recurs in a view is read.

    In the first V passes over the data it runs for each image and stores what all objectives need; afterwards it does
    not run. What a term is given is read from the store in both cases: a run is bitwise the one from a store that was
    written before, and an interrupted run may be continued whatever was stored. When all V views were met, the store
    is that of `hf-kdtl cache`, byte for byte.

    Args:
        writer: of the store, whose teacher, views, precision and needs are taken. It is begun by process 0:
            `writer.begin(filling=True)`.
        process: the number of this one.
    """

    needs_pixels = True

    def __init__(self, writer: StoreWriter, process: int = 0):
        self.rows = PartialReader(writer.folder, process)
        self._read_from(self.rows, str(writer.folder))
        self.writer, self._live, self._looked = writer, writer.teacher, True

    def check_data(self, data: Any) -> None:
        """As `StoredTeacher`; with pixels of its own, the data must render them."""
        super().check_data(data)
        self.writer.teacher.check_data(data)

    def summary(self) -> str:
        share = 100 * self.rows.filled.mean()
        return (
            f"the teacher runs for the first {self.manifest.views} passes over each image, which are stored "
            f"({share:.0f} % are there), and is read from the store afterwards."
        )

    def capture(self, pixel_values: Tensor, needs: Needs, batch: Batch | None = None) -> Capture:
        """As `StoredTeacher`; what is not stored yet is written first."""
        if batch is not None and "image_index" in batch:
            self._fill(pixel_values, batch)
        return super().capture(pixel_values, needs, batch)

    def _fill(self, pixel_values: Tensor, batch: Batch) -> None:
        rows, views = rows_and_views(batch)
        lacking = self.rows.lacking(rows, views)
        if not len(lacking):
            return
        writer, manifest, live = self.writer, self.manifest, self.writer.teacher
        rows, views = rows[lacking], views[lacking]
        shown = pixel_values[torch.from_numpy(lacking).to(pixel_values.device)]
        known = writer.batch(rows, views)
        if writer.own:
            known["teacher_pixel_values"] = batch["teacher_pixel_values"][torch.from_numpy(lacking).to(shown.device)]
        # As the command writes it, whatever precision the run trains in.
        with torch.no_grad(), torch.autocast(pixel_values.device.type, enabled=False):
            captured = live.to(pixel_values.device).capture(shown, writer.needs, known)
        if captured.logits is not None and live.order is not None:
            captured.logits = captured.logits[:, np.argsort(live.order)]  # in its own order of classes
        self.rows.write(signals.pack(captured, writer.needs, manifest.precision, manifest.top_k), rows, views)

    def keep(self) -> None:
        """Before each checkpoint, so that a run continued from it lacks nothing of the passes before."""
        self.flush()

    def flush(self) -> None:
        """Put on the disk what was stored last."""
        self.rows.flush()
