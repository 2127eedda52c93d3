"""A timm model in OpenVINO, fast on Intel's and AMD's CPUs, without gradients. Optional: micl-zoo[openvino]."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..telemetry import no_telemetry
from ..zoo.pools import Output
from .device import BACKENDS, PRECISIONS, Backend, Precision
from .torch_model import RawModel, TorchModel, finish, raw_for

# dtype of torch.autocast -> our name of the precision
NAMES = {getattr(torch, row.dtype): name for name, row in PRECISIONS.items() if row.dtype and row.openvino}


class OpenVinoModel:
    """A timm model in OpenVINO as an `encoder.Runtime`, compiled for a precision when that is first used.

    It follows the torch model: where weights were changed or replaced, it is converted again.
    """

    name: Backend = "openvino"
    precision: Precision | None = None
    device = torch.device("cpu")

    def __init__(self, source: TorchModel) -> None:
        no_telemetry()
        try:
            import openvino
        except ImportError:
            raise UsageError(f"backend openvino needs OpenVINO: {BACKENDS['openvino'].install}") from None
        self._source = source
        self._core, self._convert = openvino.Core(), openvino.convert_model
        self._compiled: dict[torch.dtype, Any] = {}
        self._state: object = None  # of the torch model when it was converted
        self._follow()

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenVinoModel, (self._source,)  # what OpenVINO made of it stays in its process

    @property
    def model(self) -> nn.Module:
        """The torch model."""
        return self._source.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._source.model = model

    @property
    def shapes(self) -> dict[Output, tuple[int, ...]]:
        """Shape of each of its outputs, per image."""
        return self._source.shapes

    def forget(self) -> None:
        """Convert anew at the next use, whatever changed: torch does not count what is written into `.data`."""
        self._state = None

    def _follow(self) -> None:
        tensors = (*self.model.parameters(), *self.model.buffers())
        state = [(id(one), one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors]
        if state != self._state:
            self._compiled.clear()
            self._converted = self._convert(_traced(self._source))  # for any batch size
            self._state = state

    def outputs(self, pixel_values: Tensor, wanted: Collection[Output]) -> dict[Output, Tensor]:
        """Compute outputs in the precision of `torch.autocast`, in float32 outside of it."""
        if torch.is_grad_enabled():
            way_on = "call it under torch.no_grad(), or load with backend='torch'"
            raise UsageError(f"backend openvino computes no gradients: {way_on}")
        if pixel_values.device.type != "cpu":
            raise UsageError(f"backend openvino runs on the CPU, got pixel_values on {pixel_values.device}")
        self._follow()
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
        if dtype not in self._compiled:
            self._compiled[dtype] = self._compile(NAMES[dtype])
        images = pixel_values.detach().float().contiguous().numpy()
        made = self._compiled[dtype](images, share_inputs=True)
        anatomy = self._source.anatomy
        arrays = {one: torch.from_numpy(cast(Any, made[at])) for at, one in enumerate(anatomy.raw)}
        return finish(anatomy, {one: arrays[one] for one in raw_for(anatomy, wanted)}, wanted)

    def _compile(self, precision: str) -> Any:
        found = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision.upper() not in found:
            has = f"no {precision} arithmetic on this CPU (it has {', '.join(found)})"
            raise UsageError(f"backend openvino has {has}: take fp32")
        settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision].openvino,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,  # one batch at a time, on all threads
        }
        return self._core.compile_model(self._converted, "CPU", settings)


def _traced(source: TorchModel) -> torch.jit.ScriptModule:
    """Trace what OpenVINO converts; by itself it would run the model four times over, to check the trace."""
    example = torch.zeros(1, 3, *source.size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have torch.export, which takes OpenVINO four times as long
        whole = RawModel(source.model, source.anatomy.raw).eval()
        return cast(torch.jit.ScriptModule, torch.jit.trace(whole, example, check_trace=False))
