"""Where a data set is: a path, or the address of an object store or a web server."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from moco_dist.config.credentials import has_credentials
from moco_dist.config.section import VARIABLE, path_of
from moco_dist.errors import UserError, nearest

SCHEMES = ("s3", "gs", "az", "https", "http")
_LIKE_ONE = re.compile(r"([A-Za-z][A-Za-z0-9+-]+):/")


class Url(str):
    """An address such as `s3://bucket/prefix`. It is text, since a path would make `s3:/bucket/prefix` of it.

    It has what a data root is asked for of a path, under the same names.
    """

    __slots__ = ()

    @property
    def scheme(self) -> str:
        """`s3` and so on."""
        return self.partition("://")[0]

    @property
    def store(self) -> "Url":
        """The bucket, container or server: the address without what lies in it."""
        return Url("/".join(self.split("/", 3)[:3]))

    @property
    def key(self) -> str:
        """What lies in the store, without a `/` at either end."""
        return "/".join(self.split("/", 3)[3:]).strip("/")

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The same without its suffix."""
        return PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        """`.tar` and so on."""
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> "Url":
        """The folder it lies in; that of the store is itself."""
        folder = self.key.rpartition("/")[0]
        return self.store / folder if folder else self.store

    def __truediv__(self, name: str) -> "Url":
        """What is called `name` in it."""
        return Url(f"{self.rstrip('/')}/{name}")

    def absolute(self) -> "Url":
        """Itself."""
        return self

    def resolve(self) -> "Url":
        """Itself."""
        return self


def root_of(text: str | Path) -> Path | Url:
    """The data root that a user means.

    Raises:
        UserError: it looks like an address and is none, has a password in it, or was one before it became a path; or
            `path_of`'s.
    """
    found = _LIKE_ONE.match(str(text))
    if isinstance(text, Path) and found and found[1].lower() in SCHEMES and not text.exists():
        raise UserError(f"{text}: an address is given as text; a Path makes {found[1]}:/ of {found[1]}://")
    if isinstance(text, Path) or not found:
        return path_of(text)
    scheme, rest = found[1].lower(), text[found.end() :].lstrip("/")
    if has_credentials(text) or "?" in text or "#" in text:
        raise UserError(
            f"{scheme}://... has a password, a token or a ?query, which would stand in logs; an object store's "
            "credentials come from the environment"
        )
    if variable := VARIABLE.search(text):
        raise UserError(f"{text} has {variable[1]}, which only a shell replaces; write the address")
    if scheme == "file":
        raise UserError(f"{text}: a path is written without file://; did you mean /{rest}?")
    if scheme == "hf":
        name = "/".join(rest.removeprefix("datasets/").split("/")[:2]) or "ORG/NAME"
        raise UserError(
            f"{text}: the hub's sets are downloaded first: hf download {name} --repo-type dataset --local-dir FOLDER; "
            "its parquet is packed by moco-dist data pack FOLDER OUT.beton, and tar shards are a data root as they are"
        )
    if scheme not in SCHEMES:
        known = {"gcs": "gs", "azure": "az", "abfs": "az", "abfss": "az", "s3a": "s3", "s3n": "s3"}
        hint = f"; did you mean {known[scheme]}://{rest}?" if scheme in known else nearest(scheme, SCHEMES)
        raise UserError(f"{text}: addresses of data begin with {', '.join(f'{name}://' for name in SCHEMES)}{hint}")
    if not text.startswith(f"{scheme}://") or text.startswith(f"{scheme}:///"):
        raise UserError(f"{text} is no address; did you mean {scheme}://{rest}?")
    if not rest.strip("/"):
        raise UserError(f"{text} names no {'server' if scheme.startswith('http') else 'bucket'}")
    return Url(text.rstrip("/"))


class _RootSchema:
    """How pydantic reads and writes a data root: an address by `root_of`, all else as a path."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def read(value: Any, read_path: core_schema.ValidatorFunctionWrapHandler) -> Path | Url:
            if isinstance(value, Url):
                return value
            return root_of(value) if isinstance(value, str | Path) else read_path(value)

        written = core_schema.to_string_ser_schema(when_used="json")
        return core_schema.no_info_wrap_validator_function(read, handler(Path), serialization=written)


DataRoot = Annotated[Path | Url, _RootSchema]
