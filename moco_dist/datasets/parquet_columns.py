"""Which columns of a parquet file are images and labels: by their types, and by what the hub's schema says of them."""

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from moco_dist.config.address import Url
from moco_dist.errors import UserError, nearest
from moco_dist.files import parsed_json

LABEL = "label"  # the column that is one where no schema says which has classes


class Columns(NamedTuple):
    """What is read of each row.

    Attributes:
        image: name of the column.
        is_struct: whether it is a struct of `bytes` and more, as the hub's are; else plain bytes.
        has_path: whether the struct has a `path`.
        label: name of the column; "": there is none.
        class_names: by number; empty where the schema has none.
        kinds: types of the two columns, as texts.
        others: columns that might be labels, where there is none.
    """

    image: str
    is_struct: bool
    has_path: bool
    label: str
    class_names: list[str]
    kinds: tuple[str, str]
    others: list[str]

    @property
    def image_bytes(self) -> str:
        """The column of the bytes."""
        return f"{self.image}.bytes" if self.is_struct else self.image

    @property
    def beside_images(self) -> list[str]:
        """The other columns that are read."""
        return [self.label] * bool(self.label) + [f"{self.image}.path"] * self.has_path

    def describe(self) -> str:
        """A line that says what was found."""
        if not self.label:
            more = f" ({', '.join(self.others[:5])}: --label-column takes one)" if self.others else ""
            return f"images from the column {self.image}; no column of labels was found{more}"
        classes = f", {len(self.class_names):,} classes" if self.class_names else ""
        return f"images from the column {self.image}, labels from {self.label}{classes}"

    def require_same(self, path: Path | Url, schema: Any, first: Path | Url) -> None:
        """Refuse a file in which these columns are missing or others.

        Raises:
            UserError: they are.
        """
        for name, kind in zip((self.image, self.label), self.kinds, strict=True):
            its = "missing" if name not in schema.names else str(schema.field(name).type)
            if name and its != kind:
                raise UserError(f"{path} has another schema than {first}: the column {name} is {its}, not {kind}")
        if self.label and _class_names(schema, self.label) != self.class_names:
            raise UserError(f"{path} has other names of classes than {first} in the column {self.label}")

    def labels_of(self, batch: Any, path: Path | Url, before: int) -> list[Any]:
        """The label of each row: a number, a name, or None.

        Args:
            batch: rows.
            path: of their file.
            before: rows that come before them in it.

        Raises:
            UserError: a number has no name, or is negative.
        """
        if not self.label:
            return [None] * len(batch)
        values = batch.column(self.label).to_pylist()
        for row, value in enumerate(values):
            if isinstance(value, str):
                values[row] = value.strip() or None
            elif value is not None:
                if value < -1 or (self.class_names and value >= len(self.class_names)):
                    allowed = f"0 to {len(self.class_names) - 1} have names" if self.class_names else "0 is the least"
                    raise UserError(f"row {before + row} of {path} has the label {value}; {allowed}, and -1 is none")
                values[row] = None if value == -1 else int(value)
        return values

    def names_of(self, batch: Any) -> list[str]:
        """The last part of each row's path; "" where it has none."""
        if not self.has_path:
            return [""] * len(batch)
        (paths,) = batch.column(self.image).flatten()
        return [(path or "").replace("\\", "/").rpartition("/")[2] for path in paths.to_pylist()]


def find_columns(path: Path | Url, schema: Any, image: str | None, label: str | None) -> Columns:
    """The columns of a file.

    Args:
        path: of the file, for messages.
        schema: pyarrow's.
        image: its name; None: found by its type.
        label: the same.

    Raises:
        UserError: there is none of this name or type, or several might be meant.
    """
    for flag, name in (("image", image), ("label", label)):
        if name is not None and name not in schema.names:
            raise UserError(f"{path} has no column {name} (--{flag}-column){nearest(name, schema.names)}")
    features = _features(schema)
    image = image or _image_column(path, schema, features)
    if not _is_image(field := schema.field(image)):
        raise UserError(f"the column {image} of {path} is {field.type}; images are bytes, or a struct with bytes in it")
    is_struct = field.type.num_fields > 0
    label = label or _label_column(path, schema, features)
    kind = schema.field(label).type if label else ""
    if label and not _is_label(kind):
        raise UserError(
            f"the column {label} of {path} is {kind}; a label is a whole number or a text, one for each image"
            " (--label-column names another column)"
        )
    names = _class_names(schema, label) if label else []
    has_path = is_struct and any(child.name == "path" and _is_text(child.type) for child in field.type)
    others = [] if label else [each.name for each in schema if _is_label(each.type)]
    return Columns(image, is_struct, has_path, label, names, (str(field.type), str(kind)), others)


def _image_column(path: Path | Url, schema: Any, features: dict[str, Any]) -> str:
    found = [field.name for field in schema if _is_image(field)]
    said = [name for name in found if _kind(features.get(name)) == "Image"]
    if len(found := said or found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path} has {len(found)} columns of images: {', '.join(found)}; --image-column names one")
    listed = ", ".join(f"{field.name} ({str(field.type)[:60]})" for field in schema) or "none"
    lists = [field.name for field in schema if "list" in str(field.type) and "binary" in str(field.type)]
    hint = f"; {lists[0]} is a list, and one image a row is what is read" if lists else ""
    raise UserError(f"{path} has no column of images, which are bytes or a struct with bytes; it has {listed}{hint}")


def _label_column(path: Path | Url, schema: Any, features: dict[str, Any]) -> str:
    found = [name for name in schema.names if _kind(features.get(name)) == "ClassLabel"]
    if len(found) > 1:
        raise UserError(f"{path} has {len(found)} columns of labels: {', '.join(found)}; --label-column names one")
    return found[0] if found else LABEL if LABEL in schema.names else ""


def _is_image(field: Any) -> bool:
    if field.type.num_fields == 0:
        return str(field.type) in ("binary", "large_binary", "binary_view")
    return str(field.type).startswith("struct") and any(
        child.name == "bytes" and child.type.num_fields == 0 and "binary" in str(child.type) for child in field.type
    )


def _is_text(kind: Any) -> bool:
    return kind.num_fields == 0 and "string" in str(kind)


def _is_label(kind: Any) -> bool:
    return _is_text(kind) or re.fullmatch(r"bool|u?int(8|16|32|64)", str(kind)) is not None


def _features(schema: Any) -> dict[str, Any]:
    """What the hub's library has written about the columns."""
    try:
        features = parsed_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return features if isinstance(features, dict) else {}
    except (KeyError, ValueError, TypeError):
        return {}


def _kind(feature: Any) -> str:
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _class_names(schema: Any, label: str) -> list[str]:
    """By number, where the schema has them."""
    feature = _features(schema).get(label)
    names = feature.get("names") if feature and _kind(feature) == "ClassLabel" else None
    if not isinstance(names, list) or _is_text(schema.field(label).type):
        return []
    return distinct([str(name) for name in names])


def distinct(names: list[str]) -> list[str]:
    """Names of classes as folders; one that is empty or there twice (as "crane" may be) gets its number."""
    names = [name.replace("/", "_").strip() for name in names]
    counted = Counter(names)
    return [name if name and counted[name] == 1 else f"{name} {i}".strip() for i, name in enumerate(names)]
