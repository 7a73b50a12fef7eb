"""Parquet files for tests, as the Hugging Face hub's library writes them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hub_metadata(class_names, image="image", label="label"):
    """What the library writes into a schema."""
    features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": class_names}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def write_parquet(path, images, labels=None, class_names=None, rows_a_group=100, kind=None, **others):
    """A file of `images`: (bytes, path) or None each; `labels` of type `kind` (int64); other columns.

    Returns:
        `path`.
    """
    columns = {"image": pa.array([image and {"bytes": image[0], "path": image[1]} for image in images], IMAGE)}
    if labels is not None:
        columns["label"] = pa.array(labels, kind or pa.int64())
    table = pa.table({**columns, **others})
    if class_names:
        table = table.replace_schema_metadata(hub_metadata(class_names))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_a_group)
    return path
