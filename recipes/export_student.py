"""Write a student as ONNX, and check that the file answers as the student does. Copy this file and edit it.

    pip install 'hf_kdtl[export]'
    python export_student.py

`hf-kdtl export` also times both.
"""

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_kdtl.export import TOLERANCE, OnnxModel, export_onnx, largest_difference
from hf_kdtl.models.teachers.processor_files import open_processor


def main(student="runs/student", output="student.onnx"):
    """Write the file, print and return the largest difference of a logit, relative to its size where above 1."""
    model = AutoModelForImageClassification.from_pretrained(student).eval()
    processor = open_processor(student)
    pixels = processor([Image.new("RGB", (64, 64))] * 8, return_tensors="pt")["pixel_values"]
    pixels = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))

    export_onnx(model, pixels, output)  # for any batch size
    difference = largest_difference(model, OnnxModel(output), pixels)
    if difference > TOLERANCE:
        Path(output).unlink()
        raise ValueError(f"the file is {difference:.1e} away from the student; expected {TOLERANCE:.0e} at most.")
    print(f"{output}: largest difference {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
