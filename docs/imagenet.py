"""ImageNet-1k as it is given out -> folders of one class each, every image counted and every class checked.

    python imagenet.py archives DOWNLOADS -o imagenet-1k     the four files of image-net.org in the folder DOWNLOADS
    python imagenet.py parquet parquet/data -o imagenet-1k   the hub's parquet files, ILSVRC/imagenet-1k

Both write train/WNID/NAME.JPEG and val/WNID/NAME.JPEG with the same names and bytes. Needs pyarrow for parquet alone.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

MD5 = {  # as image-net.org states them
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_bbox_val_v3.tgz": "f4cd18b5ea29fe6bbea62ec9c20d80f0",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
}
TRAIN, VAL, BOXES, DEVKIT = MD5
COUNTS = (1_281_167, 50_000, 1000)  # training images, validation images, classes


def check_md5(folder: Path) -> None:
    """Stop at an archive that is not the stated one."""
    for name, wanted in MD5.items():
        with (folder / name).open("rb") as file:
            digest = hashlib.md5()
            while piece := file.read(1 << 24):
                digest.update(piece)
        if digest.hexdigest() != wanted:
            sys.exit(f"{name} has md5 {digest.hexdigest()}, not {wanted}: download it again")
        print(f"{name}: md5 as stated", flush=True)


def files_of(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """(Name without folders, content) of each file, in the archive's order."""
    for member in tar:
        if member.isfile():
            opened = tar.extractfile(member)
            assert opened is not None
            yield Path(member.name).name, opened.read()


def from_archives(folder: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """(Part, class, name, content) of each image; the training archive holds one archive per class."""
    with tarfile.open(folder / TRAIN) as classes:
        for member in classes:
            with tarfile.open(fileobj=classes.extractfile(member)) as images:
                for name, content in files_of(images):
                    yield "train", Path(member.name).stem, name, content
    with tarfile.open(folder / BOXES) as boxes:  # the class of a validation image stands in its bounding box file
        found = {Path(name).stem: re.search(rb"<name>(n\d+)</name>", text) for name, text in files_of(boxes)}
    with tarfile.open(folder / VAL) as images:
        for name, content in files_of(images):
            wnid = found.get(Path(name).stem)
            if wnid is None:
                sys.exit(f"{name} has no class in {BOXES}")
            yield "val", wnid[1].decode(), name, content


def from_parquet(folder: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """The same from the hub's files, whose names are as n01440764_10026_n01440764.JPEG."""
    import pyarrow.parquet as pq

    for part, to in (("train", "train"), ("validation", "val")):
        for file in sorted(folder.glob(f"{part}-*.parquet")):
            for batch in pq.ParquetFile(file).iter_batches(256, columns=["image"]):
                for image in batch.column("image").to_pylist():
                    name, _, wnid = Path(image["path"]).stem.rpartition("_")
                    yield to, wnid, f"{name}.JPEG", image["bytes"]


def check_classes(folder: Path, classes: dict[str, str]) -> None:
    """The development kit has the official class of each validation image as a number: the two must pair one to one."""
    with tarfile.open(folder / DEVKIT) as kit:
        text = next(text for name, text in files_of(kit) if name == "ILSVRC2012_validation_ground_truth.txt")
    pairs = set(zip((classes[name] for name in sorted(classes)), text.split(), strict=True))
    if not len(pairs) == len({wnid for wnid, _ in pairs}) == len({number for _, number in pairs}):
        sys.exit("the classes of the bounding boxes are not those of the development kit")
    print(f"{len(pairs)} classes are those of the development kit")


def main() -> None:
    """Unpack, count, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=["archives", "parquet"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--no-md5", action="store_true", help="take archives with other checksums, and any number of images"
    )
    given = parser.parse_args()
    archives = given.form == "archives"
    if archives and not given.no_md5:
        check_md5(given.folder)
    counts, val, wnids = {"train": 0, "val": 0}, {}, set()
    for part, wnid, name, content in (from_archives if archives else from_parquet)(given.folder):
        place = given.out / part / wnid / name
        if not place.parent.is_dir():
            place.parent.mkdir(parents=True)
        place.write_bytes(content)
        counts[part] += 1
        wnids.add(wnid)
        if part == "val":
            val[name] = wnid
        if sum(counts.values()) % 50_000 == 0:
            print(f"{sum(counts.values()):,} images", flush=True)
    if archives:
        check_classes(given.folder, val)
    found = (counts["train"], counts["val"], len(wnids))
    print(f"{found[0]:,} training images, {found[1]:,} validation images, {found[2]:,} classes in {given.out}")
    if found != COUNTS and not given.no_md5:
        sys.exit(f"ImageNet-1k has {COUNTS[0]:,}, {COUNTS[1]:,} and {COUNTS[2]:,}")


if __name__ == "__main__":
    main()
