"""Exports a model to ONNX, in float32 and in int8, and compares the file with the model."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_kdtl.models.forward.embedding import is_headless, last_hidden_state
from hf_kdtl.models.forward.final import read_final
from hf_kdtl.models.forward.geometry import describe
from hf_kdtl.models.forward.modes import evaluating

TOLERANCE = 1e-4  # of the outputs, or of the largest of them where that is above 1
BATCHES = (1, 5)  # at which a file is compared: an exporter that fixes the batch size is caught
NEEDS = ("onnx", "onnxruntime", "onnxscript")


def check_installed() -> None:
    """Check that the packages for an export are installed.

    Raises:
        ValueError: naming what is missing, and what to type.
    """
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        raise ValueError(f"{', '.join(missing)} not found; an export needs it. Type: pip install 'hf_kdtl[export]'.")


def export_onnx(model: Any, pixel_values: Tensor, path: str | Path) -> None:
    """Write the model in eval mode as one ONNX file: pixel_values (B, C, h, w) -> logits (B, K), for any B. [ours]

    Of a model without a head: -> image_embedding (B, D), what its family's classifiers read, and last_hidden_state.

    Attention is written as plain matrix products ("eager"): torch 2.13 does not export Swin's fused attention for any
    batch size.

    Args:
        model: an image classifier or a vision model without a head of transformers, on the CPU. It is left as it was.
        pixel_values: (B, C, h, w) of any values; h and w are fixed in the file.
        path: the file.

    Cost: a trace of the model, some seconds to a minute.

    Raises:
        ValueError: where torch cannot export the model, or a package for it is not installed.
    """
    check_installed()
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    two = pixel_values[:1].expand(2, -1, -1, -1).contiguous()  # a batch of 1 would be taken for a constant
    try:
        with evaluating(model):
            torch.onnx.export(
                _Tensors(model, named := _named(model, two)).eval(),
                (two,),
                str(path),
                dynamo=True,
                input_names=["pixel_values"],
                output_names=[*named(two)],
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"torch {torch.__version__} cannot export {type(model).__name__} for any batch size; export another "
            f"architecture, or try a newer torch. Its message: {error}"
        ) from error
    finally:
        model.set_attn_implementation(attention)


CALIBRATION_IMAGES = 256
_QUANTIZED = ["MatMul", "Gemm", "Conv"]


def quantize_onnx(source: str | Path, pixel_values: Tensor, path: str | Path) -> None:
    """Write an ONNX file of `export_onnx` again in int8: weights int8 per channel, activations uint8. [ours]

    Static quantization by onnxruntime after `quant_pre_process`: matrix products and convolutions between
    QuantizeLinear and DequantizeLinear, with the range of each activation (minimum to maximum) from the images.
    Norms, softmax and the rest stay in float32. Input and output are the file's.

    Args:
        source: the float32 file.
        pixel_values: (B, C, h, w) of training images, to calibrate with; 256 are enough.
        path: the file to write.

    Cost: a forward of each image that keeps all activations, and some seconds.

    Raises:
        ValueError: without images, or a package for it is not installed.
    """
    check_installed()
    if not len(pixel_values):
        raise ValueError("an int8 file is calibrated on training images, and there are none; type --dataset.")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(pixel_values.split(32))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"pixel_values": batch.numpy()}

    with TemporaryDirectory() as folder:
        ready = Path(folder, "ready.onnx")
        _prepare(str(source), str(ready))
        quantize_static(
            str(ready),
            str(path),
            Images(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_QUANTIZED,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def _prepare(source: str, path: str) -> None:
    """Fold constants and fuse what runs as one; shapes by onnx alone where onnxruntime's symbols cannot say them."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        quant_pre_process(source, path)
    except Exception:  # of any type, from its inference: SwiftFormer's reshapes end in a TypeError
        quant_pre_process(source, path, skip_symbolic_shape=True)


def largest_difference(model: nn.Module, exported: nn.Module, pixel_values: Tensor) -> float:
    """Largest difference of any output, over batches of 1 and of 5 images, as a share of max(1, the largest one).

    Args:
        model: the original, in eval mode.
        exported: `OnnxModel` of its file.
        pixel_values: (B, C, h, w), B >= 5.
    """
    worst, named = 0.0, _named(model, pixel_values)
    for size in BATCHES:
        with torch.no_grad():
            theirs = exported(pixel_values=pixel_values[:size])
            for name, ours in named(pixel_values[:size]).items():
                difference = (ours - getattr(theirs, name)).abs().max() / ours.abs().max().clamp(min=1)
                worst = max(worst, float(difference.nan_to_num(nan=torch.inf)))  # max() would pass over a nan
    return worst


class OnnxModel(nn.Module):
    """An ONNX file that is called as the model it was made from, run by onnxruntime on the CPU.

    With as many threads as torch has, so that their times compare (evaluation/cost.py).
    """

    def __init__(self, path: str | Path):
        super().__init__()
        check_installed()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]

    def forward(self, pixel_values: Tensor) -> ModelOutput:
        found = self.session.run(self.names, {"pixel_values": pixel_values.numpy()})
        return ModelOutput({name: torch.from_numpy(x) for name, x in zip(self.names, found, strict=True)})


Named = Callable[[Tensor], dict[str, Tensor]]


def _named(model: Any, pixel_values: Tensor) -> Named:
    """The outputs of an exported model by name, as a function of pixels of this size."""
    if not is_headless(model):
        return lambda pixels: {"logits": model(pixel_values=pixels).logits}
    geometry = describe(model, pixel_values)

    def features(pixels: Tensor) -> dict[str, Tensor]:
        outputs = model(pixel_values=pixels)
        found = {"image_embedding": read_final(model, geometry, [outputs], pixels, pooled=True).pooled}
        found["last_hidden_state"] = last_hidden_state(outputs)
        return {name: x for name, x in found.items() if x is not None}

    return features


class _Tensors(nn.Module):
    def __init__(self, model: nn.Module, named: Named):
        super().__init__()
        self.model, self.named = model, named

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return (*self.named(pixel_values).values(),)
