"""Converts a raw folder of CelebAMask-HQ (Lee et al., arXiv 1907.11922) to records of array_record shards.

So it does a folder with the images and label maps of any other data set; `raw_folder.py` has the layouts of both. A
record holds the image, the label map as a PNG, and the id. The image is the unchanged content of its JPEG or PNG file,
unless `config.stored_size` requires a smaller one.
"""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from sisma_jax.config import DataConfig
from sisma_jax.data import photos, shards
from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.data.raw_folder import Face, RawFolder, list_raw_folder, summarize
from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, write_atomically

NAME = "celebamask_hq"
MAPPING_FILE = "CelebA-HQ-to-CelebA-mapping.txt"
IDS_FILE = "ids.tsv"

# CelebA partitions its images by index (list_eval_partition.txt): train, then val, then test.
CELEBA_FIRST_VAL = 162771
CELEBA_FIRST_TEST = 182638

# About 60 MB of full-size faces. An interruption loses at most one shard per writing process.
FACES_PER_SHARD = 512


def split_by_id(faces: Sequence[Face], num_test: int) -> dict[str, Sequence[Face]]:
    """Returns the splits that papers on mask-to-image synthesis use: the last ids are the test split.

    Args:
      faces: all faces, in order of id.
      num_test: number of test faces, at least 1; 2000 for the full data set (ids 28000-29999).

    Returns:
      {"train": faces, "test": faces}.

    Raises:
      InputError: no face would be left for training.
    """
    if num_test >= len(faces):
        raise InputError(
            f"data.num_test {num_test} leaves no face for training: data.root holds {len(faces)}; choose a smaller "
            "number."
        )
    return {"train": faces[:-num_test], "test": faces[-num_test:]}


def split_by_celeba(faces: Sequence[Face], mapping_file: Path) -> dict[str, Sequence[Face]]:
    """Returns the splits that papers on face parsing use: the partition of CelebA.

    Args:
      faces: all faces, in order of id.
      mapping_file: file that maps each id to an index of CelebA, as `read_mapping` reads it.

    Returns:
      {"train": faces, "val": faces, "test": faces}, without "val" if it has no faces.

    Raises:
      InputError: the mapping file is missing, malformed or incomplete, or the train or test split would be empty.
    """
    original = read_mapping(mapping_file)
    if unknown := [face.id for face in faces if face.id not in original]:
        raise InputError(
            f"{mapping_file} has no row for these ids: {summarize(unknown)}. Use the file of the download."
        )
    splits: dict[str, list[Face]] = {"train": [], "val": [], "test": []}
    for face in faces:
        index = original[face.id]
        name = "train" if index < CELEBA_FIRST_VAL else "val" if index < CELEBA_FIRST_TEST else "test"
        splits[name].append(face)
    for name in ("train", "test"):
        if not splits[name]:
            raise InputError(
                f"data.split celeba: according to {mapping_file}, none of the {len(faces)} faces is in the {name} "
                "split; use data.split by_id for a subset of the data set."
            )
    return {name: members for name, members in splits.items() if members}


def read_mapping(file: Path) -> dict[int, int]:
    """Returns {id: index in CelebA} from a file with rows `idx orig_idx orig_file`, with or without a header row.

    Raises:
      InputError: the file does not exist or cannot be read, or a row does not have this form.
    """
    if not file.is_file():
        raise InputError(
            f"data.split celeba needs {file}, which is part of the download; data.split by_id does not need it."
        )
    mapping = {}
    for number, line in enumerate(photos.read_bytes(file).decode(errors="replace").splitlines(), 1):
        fields = line.split()
        if not fields or (number == 1 and fields[0] == "idx"):
            continue
        if len(fields) != 3 or not (fields[0].isdecimal() and fields[1].isdecimal()):
            raise InputError(f"{file}, line {number}: expected `idx orig_idx orig_file`, got {line!r}.")
        mapping[int(fields[0])] = int(fields[1])
    return mapping


def read_faces(
    faces: Sequence[Face], classes: ClassSet, stored_size: int
) -> Iterator[dict[str, bytes | int] | InputError]:
    """Yields the record of each face, as `Face.read` returns it, or its InputError if the face cannot be read.

    Args:
      faces: faces of one shard.
      classes: class set of the labels or parts.
      stored_size: maximum side of images and masks in pixels; 0 keeps the original size.
    """
    for face in faces:
        try:
            yield face.read(classes, stored_size)
        except InputError as error:
            yield error


def find_copy(config: DataConfig, cache_dir: AnyPath) -> AnyPath | None:
    """Returns the folder of copied shards on a host without the raw folder, which cannot compute the fingerprint.

    Returns:
      The folder of the complete shards; None if the raw folder exists, or if there is no copy.

    Raises:
      InputError: `cache_dir` holds shards of several raw folders.
      OSError: `cache_dir` cannot be listed.
    """
    if Path(config.root).expanduser().exists():
        return None
    pattern = re.compile(_variant(config, "[0-9a-f]{10}"))
    with bucket_errors(cache_dir):
        folder = cache_dir / NAME
        variants = [path for path in folder.iterdir() if pattern.fullmatch(path.name)] if folder.exists() else []
    found = [path / shards.VERSION for path in variants if shards.exist(path / shards.VERSION)]
    if len(found) > 1:
        raise InputError(
            f"{folder} holds shards of several raw folders ({', '.join(sorted(path.parent.name for path in found))}), "
            f"and data.root {config.root} is not present to select one; delete all but one."
        )
    return found[0] if found else None


def _variant(config: DataConfig, fingerprint: str) -> str:
    selection = "celeba" if config.split == "celeba" else f"by_id-{config.num_test}"
    size = f"-{config.stored_size}px" if config.stored_size else ""
    meaning = config.classes.fingerprint
    return f"{selection}-{fingerprint}{size}" + ("" if meaning == CELEBAMASK_HQ.fingerprint else f"-{meaning}")


def recipe(config: DataConfig) -> shards.ShardRecipe:
    """Returns the recipe of the shards of the raw files in `config.root`. Lists the raw folder but opens no image.

    The name of the variant contains the split, a fingerprint of the raw files, the stored size, and a fingerprint of
    the classes if they are not the default. After the raw folder changes, its shards are therefore built again. If the
    files are not named by the ids, `ids.tsv` beside the shards says which file has which id.

    Raises:
      InputError: the raw folder is missing or malformed, holds other classes, or cannot be split; see
        `list_raw_folder`, `split_by_id` and `split_by_celeba`.
    """
    root = Path(config.root).expanduser()
    raw = list_raw_folder(root, config.classes, skip_damaged=config.skip_damaged)
    if config.split == "celeba":
        if not raw.is_numbered:
            raise InputError(
                f"data.split celeba: not all files of {root} are named by ids of CelebAMask-HQ; use data.split by_id."
            )
        splits = split_by_celeba(raw.faces, root / MAPPING_FILE)
        fingerprint = raw.fingerprint(root, root / MAPPING_FILE)
    else:
        splits = split_by_id(raw.faces, config.num_test)
        fingerprint = raw.fingerprint(root)
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        "id": np.int64,
    }
    return shards.ShardRecipe(
        name=NAME,
        variant=_variant(config, fingerprint),
        features=tfds.features.FeaturesDict(features),
        jobs={
            name: [
                functools.partial(
                    read_faces, faces[start : start + FACES_PER_SHARD], config.classes, config.stored_size
                )
                for start in range(0, len(faces), FACES_PER_SHARD)
            ]
            for name, faces in splits.items()
        },
        num_records=sum(map(len, splits.values())),
        information=_information(raw, config.classes),
        finish=None if raw.is_numbered else functools.partial(_write_ids, raw, root),
    )


def _information(raw: RawFolder, classes: ClassSet) -> dict[str, str]:
    information = {"description": f"Faces with masks of {len(classes)} classes ({classes.title})."}
    if raw.is_official:
        return information | {
            "homepage": "https://github.com/switchablenorms/CelebAMask-HQ",
            "license": "Non-commercial research only; no redistribution.",
        }
    terms = "That of the raw files; of CelebAMask-HQ: non-commercial research only, no redistribution."
    return information | {"license": terms}


def _write_ids(raw: RawFolder, root: Path, folder: Path) -> None:
    """Writes `ids.tsv`: the id of each face and its image file, as the file is not named by the id."""
    rows = [f"{face.id}\t{Path(face.image).relative_to(root)}\n" for face in raw.faces if face.image]
    write_atomically(folder / IDS_FILE, os.fsencode("".join(rows)))
