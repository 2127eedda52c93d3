"""Names that are left out of a listing; it imports nothing, so that the command line can tell them."""

from __future__ import annotations

# Left out unless asked for: thumbnails and trash of NAS, desktops, cameras and macOS archives. Names that begin with a
# dot, such as .thumbnails, .Trash-1000 and ._photo.jpg, are left out in any case.
EXCLUDED = (
    *("@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "$RECYCLE.BIN", "RECYCLER", "lost+found"),
    *("System Volume Information", "Thumbs.db", "ehthumbs*.db", "desktop.ini", "*.thm", "*.lrdata"),
    *("__MACOSX", "Network Trash Folder", "Temporary Items", "iPod Photo Cache"),
)
# Endings of files that are no images, so that they need not be opened to see it.
_OTHERS = """
    .txt .lst .csv .tsv .json .jsonl .ndjson .xml .yaml .yml .toml .ini .md .rst .html .htm .css .js .py .pyc
    .sh .c .h .cpp .ipynb .log .mp4 .mov .avi .mkv .webm .mp3 .wav .flac .m4a .ogg .aae .xmp .db .pdf .doc .docx
    .xls .xlsx .ppt .pptx .ttf .svg .exe .dll .so .sqlite .npy .npz .pt .pth .pkl .safetensors .onnx .h5 .hdf5
    .mat .arrow .tfrecord .tar .zip .parquet .gz .tgz .bz2 .xz .zst .7z .rar .lmdb .mdb .lock .cls .cls2 .label
    .labels .cap .caption .key .url .pyd .index .sha256 .md5
"""
OTHERS = frozenset(_OTHERS.split())
