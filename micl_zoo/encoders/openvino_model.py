"""A ViT in OpenVINO, which runs it faster than torch does on Intel's and AMD's CPUs. Optional: micl-zoo[openvino]."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..errors import UsageError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

# dtype of torch.autocast -> OpenVINO's hint, the CPU's capability that it takes, our name
PRECISIONS = {
    torch.float32: ("f32", "FP32", "fp32"),
    torch.bfloat16: ("bf16", "BF16", "bf16"),
    torch.float16: ("f16", "FP16", "fp16"),
}


class OpenVinoViT:
    """Normalised images to tokens. Converted from the timm model when made; compiled for a precision at its first use.

    Attributes:
        model: OpenVINO's graph, of any batch size; its weights are the timm model's own memory.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        try:
            import openvino
        except ImportError:
            raise UsageError("backend openvino needs OpenVINO: pip install 'micl-zoo[openvino]'") from None
        self._core = openvino.Core()
        self._compiled: dict[torch.dtype, Any] = {}
        self.model = openvino.convert_model(_traced(vit))

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + N, D) float32, in the precision of `torch.autocast`, float32 outside of it.

        Raises:
            UsageError: gradients are asked for, a GPU, or a precision that this CPU does not have.
        """
        if torch.is_grad_enabled():
            raise UsageError(
                "backend openvino computes no gradients: call it under torch.no_grad(), or load with backend='torch'"
            )
        if pixel_values.device.type != "cpu":
            raise UsageError(f"backend openvino runs on the CPU, got pixel_values on {pixel_values.device}")
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
        if dtype not in self._compiled:
            self._compiled[dtype] = self._compile(dtype)
        images = pixel_values.detach().float().contiguous().numpy()
        tokens = self._compiled[dtype](images, share_inputs=True)[0]
        return torch.from_numpy(cast(Any, tokens))

    def _compile(self, dtype: torch.dtype) -> Any:
        hint, capability, name = PRECISIONS[dtype]
        found = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if capability not in found:
            raise UsageError(
                f"backend openvino has no {name} arithmetic on this CPU (it has {', '.join(found)}): take fp32"
            )
        settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,  # one batch at a time, on all threads
        }
        return self._core.compile_model(self.model, "CPU", settings)


class _Tokens(nn.Module):
    """The part of a timm ViT that is converted: all but pooling."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + N, D)."""
        return cast(Tensor, self.vit.forward_features(pixel_values))


def _traced(vit: VisionTransformer) -> torch.jit.ScriptModule:
    """What OpenVINO converts, traced here: by itself it would run the model four times over, to check the trace."""
    example = torch.zeros(1, 3, *vit.patch_embed.img_size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have torch.export, which takes OpenVINO four times as long
        return cast(torch.jit.ScriptModule, torch.jit.trace(_Tokens(vit).eval(), example, check_trace=False))
