"""`build` from folders and annotations: images with captions beside them, COCO, VOC, and the shards of others."""

from __future__ import annotations

from typing import Annotated

import typer

from data_prep import options as shared
from data_prep.build import kind
from data_prep.readers.base import Reader

Members = Annotated[list[str], typer.Option("--member", help="keep only members of this extension; may be repeated")]
Require = Annotated[list[str], typer.Option("--require", help="leave out samples without a member of this extension; may be repeated")]
Keys = Annotated[str, typer.Option("--keys", help="keep, or shard: put the shard's name before each key, where every shard counts from 0")]


@kind("sidecar", "python -m data_prep build sidecar photos/ --out shards/photos --caption '{title}: {txt}'")
def build_sidecar(
    out: str,
    folder: Annotated[str, typer.Argument(help="folder or URL of images, at any depth, with a .txt or .json beside each")],
    caption: Annotated[
        list[str],
        typer.Option(
            help="a field of the .json, or a template over its fields, where {txt} is the .txt; repeated: several captions. "
            "Default: the .txt, else the field caption"
        ),
    ] = [],  # noqa: B006
    lines: Annotated[bool, typer.Option("--lines", help="every line of a .txt is a caption")] = False,
    label_column: Annotated[str | None, typer.Option(help="field of class names or indices, for cls and classnames.txt")] = None,
    label_from_folder: Annotated[bool, typer.Option("--label-from-folder", help="the first folder is the class")] = False,
    classes: shared.Classes = None,
) -> Reader:
    """Shards from images with a caption file beside each."""
    from data_prep.readers.sidecar import sidecar

    shared.check_there(folder)
    shared.check_apart(out, folder)
    return sidecar(folder, tuple(caption), lines, label_column, label_from_folder, shared.class_names(classes))


@kind("coco", "python -m data_prep build coco instances_val.json captions_val.json val2017/ --out shards/coco")
def build_coco(
    annotations: Annotated[list[str], typer.Argument(help="instances and captions files of the same images")],
    images: Annotated[str, typer.Argument(help="folder or URL of the images")],
) -> Reader:
    """Shards from COCO annotations: boxes (x, y, width, height) and captions in the json member, the first caption in txt."""
    from data_prep.readers.coco import coco

    shared.check_there(*annotations, images)
    return coco(annotations, images)


@kind("voc", "python -m data_prep build voc VOCdevkit/VOC2012 --split train --out shards/voc_train")
def build_voc(
    folder: Annotated[str, typer.Argument(help="folder with JPEGImages, Annotations and ImageSets")],
    split: Annotated[str | None, typer.Option(help="a list of ImageSets/Main or Segmentation; default: all annotations")] = None,
    zero_based: Annotated[
        bool, typer.Option("--zero-based", help="corners are edges counted from 0; VOC counts pixels from 1 and includes both")
    ] = False,
    classes: shared.Classes = None,
) -> Reader:
    """Shards from PASCAL VOC annotations: boxes in COCO's form in the json member, masks in mask.png."""
    from data_prep.readers.voc import voc

    shared.check_there(folder)
    return voc(folder, split, zero_based, shared.class_names(classes))


@kind("img2dataset", "python -m data_prep build img2dataset downloads/ --out shards/web --require txt --skip-bad")
def build_img2dataset(
    folder: Annotated[str, typer.Argument(help="output folder of img2dataset, format webdataset")],
    members: Members = [],  # noqa: B006
    require: Require = [],  # noqa: B006
    keys: Keys = "keep",
) -> Reader:
    """Shards from what img2dataset downloaded; its tars are held against the counts in its _stats.json."""
    from data_prep.readers.img2dataset import img2dataset

    shared.check_there(folder)
    return img2dataset(folder, tuple(members), tuple(require), keys)


@kind("shards", "python -m data_prep build shards 'theirs/{00000..00099}.tar' --out shards/ours --skip-bad")
def build_shards(
    spec: Annotated[list[str], typer.Argument(help="shards: paths, globs, brace ranges, folders, URLs")],
    members: Members = [],  # noqa: B006
    require: Require = [],  # noqa: B006
    keys: Keys = "keep",
) -> Reader:
    """Shards of --max-count samples from other WebDataset shards; damaged samples are left out and listed (--skip-bad)."""
    from data_prep.readers.shards import shards

    return shards(shared.shard_names(spec), tuple(members), tuple(require), keys)
