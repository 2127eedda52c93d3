"""A folder, such as a download, in which every module that anybody may import has a namesake that tells on itself."""

from __future__ import annotations

import sys
from pathlib import Path

OTHERS = ("click", "cv2", "fsspec", "numpy", "micl_zoo", "onnxruntime", "openvino", "PIL", "pillow_heif", "pyarrow")
OTHERS += (
    "rich",
    "safetensors",
    "sitecustomize",
    "timm",
    "torch",
    "torchvision",
    "training",
    "triton",
    "usercustomize",
)


def set_traps(folder: Path) -> Path:
    """Put the namesakes there: the file that has their names once they are run."""
    folder.mkdir(exist_ok=True)
    sprung = folder / "sprung.txt"
    trap = f"with open({str(sprung)!r}, 'a') as sprung:\n    sprung.write(__name__ + chr(10))\n"
    for name in {*sys.stdlib_module_names, *OTHERS}:
        (folder / f"{name}.py").write_text(trap)
    return sprung
