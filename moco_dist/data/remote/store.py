"""Object stores and web servers, by `obstore`: what lies there, and ranges of its bytes.

Whatever goes wrong is an OSError, as of a file, so that the same patience and the same words serve both. obstore finds
credentials in the environment, where each store's own tools look for them; they are never seen here.

obstore keeps threads that a forked process lacks: a child of a process that has used it would wait for ever. So what is
asked once is asked in a child, by `apart`, and the process that starts loader workers stays without such threads.
"""

import contextlib
import errno
import functools
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from moco_dist.config.address import Url
from moco_dist.config.credentials import without_credentials
from moco_dist.data.images import MissingDataError
from moco_dist.data.processes import made_by_processes
from moco_dist.data.storage import WAITS_SECONDS, patiently
from moco_dist.errors import InfrastructureError, UserError

T = TypeVar("T")

# Before the second try and so on, while images are read: a server may be away for a minute. obstore itself repeats a
# request twice within a second before, and says nothing of it.
READ_WAITS_SECONDS = (*WAITS_SECONDS, 16.0, 32.0)
FIRST_WAITS_SECONDS = WAITS_SECONDS[:2]  # the same of what a start asks: a wrong address is told soon
CHANGED = "it has changed since its images were listed; start again"
_CLIENT = {"connect_timeout": "5s", "read_timeout": "20s", "timeout": "60s"}
_RETRIES = {
    "max_retries": 2,
    "retry_timeout": timedelta(seconds=10),
    "backoff": {"base": 2, "init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1)},
}
# Addresses of a store of one's own; one that is http:// is meant so.
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL")
_METADATA_SERVER = "169.254.169.254"  # a cloud machine's own, which is asked where the environment has no credentials
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
# What a user or role has to be allowed.
_RIGHTS = {
    "s3": "s3:ListBucket and s3:GetObject are needed", "gs": "storage.objects.list and storage.objects.get are needed",
    "az": "the role Storage Blob Data Reader is needed", "https": "no credentials are sent to a web server",
    "http": "no credentials are sent to a web server",
}  # fmt: skip
# Codes of S3 and Azure, by what is wrong.
_OF_CREDENTIALS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AuthenticationFailed",
}  # fmt: skip
_OF_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}
# A mistake, if a start finds it.
_MISTAKES = {errno.EACCES, errno.ENOKEY, errno.EINVAL}

_user: int | None = None  # the process, this one or one that it was forked from, which has used obstore


class Object(NamedTuple):
    """What a store says of an object: bytes, entity tag ("" where it has none), and when it was changed, in ns."""

    size: int
    tag: str
    changed_ns: int


class Listing(NamedTuple):
    """What lies in a folder of a store, by name."""

    objects: dict[str, Object]
    folders: list[str]


def can_list(url: Url) -> bool:
    """Whether a store says what lies in it; web servers do not."""
    return not url.scheme.startswith("http")


def list_folder(folder: Url) -> Listing:
    """What lies in a folder; nothing where there is none.

    Raises:
        OSError: the store does not answer, has no such bucket, or refuses.
    """
    with _failures(folder) as obstore:
        found = obstore.list_with_delimiter(_store(folder.store), f"{folder.key}/" if folder.key else None)
        objects = {row["path"].rpartition("/")[2]: _object(row) for row in found["objects"]}
        return Listing(objects, sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]))


def look_at(url: Url) -> Object:
    """An object.

    Raises:
        OSError: there is none, or the store does not answer or refuses.
    """
    with _failures(url) as obstore:
        return _object(obstore.head(_store(url.store), _key(url)))


def read_range(url: Url, start: int, size: int, known: Object | None = None) -> memoryview:
    """Bytes of an object, by one request; `known` is what it was when it was listed.

    Raises:
        OSError: they cannot be read, or the object has changed.
    """
    options: dict[str, Any] = {"range": (start, start + size)} if size else {}
    if known is not None and known.tag and not known.tag.startswith("W/"):
        options["if_match"] = known.tag
    with _failures(url) as obstore:
        found = obstore.get(_store(url.store), _key(url), options=options)
        if known is not None and _has_changed(known, _object(found.meta)):
            raise OSError(errno.EINVAL, CHANGED)
        data = memoryview(found.bytes())
    if size and len(data) != size:
        raise OSError(errno.EIO, f"{len(data):,} bytes came, and {size:,} were asked for")
    return data


def read_whole(url: Url) -> bytes:
    """An object's content.

    Raises:
        OSError: see `read_range`.
    """
    return bytes(read_range(url, 0, 0))


def asked(ask: Callable[[], T], url: Url) -> T:
    """`ask()`, which a start needs to know, tried three times; `url` is what is asked for.

    Raises:
        UserError: the store says that there is no such thing, or that it is not for this user.
        InfrastructureError: it does not answer, or fails.
    """
    try:
        return patiently(ask, url, FIRST_WAITS_SECONDS)
    except OSError as error:
        raise cannot_ask(url, error) from error


def cannot_ask(url: Url, error: OSError) -> UserError:
    """The exception for what a start needs to know, and a store does not say."""
    text = f"{url} cannot be read: {error.strerror}"
    if error.errno == errno.ENOENT:
        return MissingDataError(text)
    return (UserError if error.errno in _MISTAKES else InfrastructureError)(text)


def apart(ask: Callable[[], T]) -> T:
    """`ask()`, in a child, so that this process may still start others that use obstore."""
    (found,) = made_by_processes(lambda _: ask(), range(1), int(not is_used_here()), 1)
    return found


def is_used_here() -> bool:
    """Whether this process has used obstore, so that its children cannot."""
    return _user == os.getpid()


def _module() -> Any:
    global _user
    try:
        import obstore
    except ImportError:
        raise UserError("data at an address is read by obstore: pip install 'moco_dist[remote]'") from None
    if _user not in (None, os.getpid()):
        raise RuntimeError("a process that has used obstore was forked; its child cannot use it")
    _user = os.getpid()
    return obstore


@functools.lru_cache(maxsize=16)
def _store(url: Url) -> Any:
    """The store of a bucket or server. A child of the one process that may have called it does not come here."""
    from obstore.store import from_url

    plain = url.scheme == "http" or any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
    return from_url(url, client_options={**_CLIENT, "allow_http": plain}, retry_config=_RETRIES)  # type: ignore[arg-type]


def _key(url: Url) -> str:
    return unquote(url.key) if url.scheme.startswith("http") else url.key


def _object(row: Any) -> Object:
    tag = row["e_tag"] or ""
    if tag and not tag.startswith(('"', "W/")):
        tag = f'"{tag}"'  # Azure's listing leaves out the quotes that a tag has in every other answer
    return Object(row["size"], tag, int(row["last_modified"].timestamp() * 1_000_000) * 1_000)


def _has_changed(known: Object, now: Object) -> bool:
    """Whether an object is another one than was listed. Not every web server minds the tag that is asked for."""
    if known.tag and now.tag:
        return (known.size, known.tag) != (now.size, now.tag)
    return known.size != now.size or (not known.tag and known.changed_ns != now.changed_ns)


@contextlib.contextmanager
def _failures(url: Url) -> Iterator[Any]:
    """Gives obstore; within it, what that raises becomes an OSError with a reason in a few words."""
    obstore = _module()
    from obstore import exceptions

    try:
        yield obstore
    except FileNotFoundError as error:
        raise OSError(errno.ENOENT, "there is no such object") from error
    except exceptions.PreconditionError as error:
        raise OSError(errno.EINVAL, CHANGED) from error
    except (exceptions.BaseError, ValueError) as error:
        raise OSError(*_reason(str(error), url, error)) from error


def _reason(text: str, url: Url, error: Exception) -> tuple[int, str]:
    """An error number and a few words for what obstore says in many."""
    from obstore import exceptions

    if _METADATA_SERVER in text or "Account must be specified" in text:
        return errno.ENOKEY, f"the environment has no credentials ({_CREDENTIALS[url.scheme]})"
    code = re.search(r"<Code>(\w+)</Code>", text)
    status = re.search(r"status code: (\d{3}[^:\n]*)", text)
    said = " ".join(part for part in (status and status[1].strip(), code and f"({code[1]})") if part)
    if "Invalid Access Key" in text:  # it is not in base 64
        return errno.EACCES, f"the environment's credentials are damaged ({_CREDENTIALS[url.scheme]})"
    if code and code[1] in ("NoSuchBucket", "ContainerNotFound"):
        return errno.ENOENT, f"there is no bucket {url.store}"
    if (code and code[1] in _OF_REGION) or "incorrectly configured region" in text:
        right = re.search(r"expecting '([\w-]+)'", text)
        where = f"in {right[1]}" if right else "in another region"
        return errno.EACCES, f"the bucket is {where}, and AWS_REGION is {os.environ.get('AWS_REGION', 'not set')}"
    if code and code[1] in _OF_CREDENTIALS:
        return errno.EACCES, f"the store does not take the credentials: {said}; set {_CREDENTIALS[url.scheme]}"
    if said.startswith(("401", "403")) or isinstance(
        error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError
    ):
        return errno.EACCES, f"access is denied: {said}; {_RIGHTS[url.scheme]}"
    if said.startswith("400") and not code and url.scheme == "s3":
        return errno.EACCES, f"{said}: AWS_REGION is wrong, or the credentials have expired"
    if "Range request not supported" in text:
        return errno.EINVAL, "the server gives no parts of a file, which images are; download it"
    if "error sending request" in text:
        return errno.EIO, "the server does not answer"
    line = text.partition("\n")[0]
    return errno.EIO, said or without_credentials(line.rpartition(" - ")[2] or line)[:200]
