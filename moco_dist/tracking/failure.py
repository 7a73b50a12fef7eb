"""Why MLflow did not take something, in the words of a person who may mend it."""

import http.client
import os
import re
from urllib.parse import urlsplit

from moco_dist.config.credentials import without_credentials
from moco_dist.tracking.database import file_of, way_out

LONGEST = 500  # letters
CAUSES = {  # what stands somewhere in a message of requests, urllib3 or OpenSSL: what it means
    "Name or service not known": "nobody knows its host's name",
    "No address associated with hostname": "nobody knows its host's name",
    "nodename nor servname": "nobody knows its host's name",
    "Failed to resolve": "nobody knows its host's name",
    "Temporary failure in name resolution": "no name server answers",
    "CERTIFICATE_VERIFY_FAILED": "this machine does not trust its certificate; MLFLOW_TRACKING_SERVER_CERT_PATH names "
    "that of your own authority",
    "WRONG_VERSION_NUMBER": "it has no encryption; write http:// where https:// is",
    "No route to host": "no way leads to its host",
    "Network is unreachable": "no way leads to its host",
}
SILENCE = ("Max retries exceeded", "timeout exception", "Connection refused", "timed out")
BROKEN = ("Connection aborted", "Connection broken", "Connection reset", "IncompleteRead", "RemoteDisconnected")


def reason(error: Exception, uri: str = "") -> str:
    """What went wrong: in one line, without credentials, with the end of a long message, where its reason is.

    Args:
        error: of mlflow, requests, SQLAlchemy or a database's driver.
        uri: of the server; a proxy that stands before it is named.
    """
    text = without_credentials(str(error))
    known = next((meaning for sign, meaning in CAUSES.items() if sign in text), "")
    answered = re.search(r"too many (\d{3}) error responses", text)
    if answered:
        code = int(answered[1])
        said = f"it answers {code} {http.client.responses.get(code, '')}".rstrip()
    elif known:
        said = f"it does not answer: {known}"
    elif any(sign in text for sign in SILENCE):
        said = "it does not answer"
    elif any(sign in text for sign in BROKEN):
        said = "it does not answer: it ended in the middle"
    else:
        said = _in_one_line(text) or type(error).__name__
    path = file_of(uri)
    if path is not None and "is malformed" in text and "mv " not in text:
        said = f"{said}; {way_out(path)}"
    proxy = proxy_of(uri)
    return f"{said} (asked through the proxy {proxy})" if proxy else said


def proxy_of(uri: str) -> str:
    """The proxy through which a server is asked and how to ask it without, as words; "" where none is."""
    host = urlsplit(without_credentials(uri)).hostname
    if not uri.startswith("http") or not host:
        return ""
    try:
        from requests.utils import get_environ_proxies  # MLflow asks by it
    except ImportError:
        return ""
    scheme = uri.partition(":")[0]
    proxies = get_environ_proxies(uri, None)
    name = next((name for name in (scheme, "all") if proxies.get(name)), None)
    if name is None:
        return ""
    variable = f"{name}_proxy" if os.environ.get(f"{name}_proxy") else f"{name}_proxy".upper()
    proxy = proxies[name] if "://" in proxies[name] else f"http://{proxies[name]}"  # USER:PASSWORD@HOST is taken too
    return f"{without_credentials(proxy)} of {variable}; NO_PROXY={host} leaves it out"


def _in_one_line(text: str) -> str:
    """A message without SQLAlchemy's statement, a web page's marks and line breaks; a long one without its middle."""
    text = re.sub(r"\s*\[SQL: .*|\s*\(Background on this error at: \S+\)", "", text, flags=re.DOTALL)
    if re.search(r"<(?:html|!doctype)\b", text, re.IGNORECASE):
        text = re.sub(r"<(style|script|head)\b.*?</\1>|<[^<>]{1,200}>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    text = " ".join(text.split()).removesuffix(".")
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 3]} ... {text[-LONGEST * 2 // 3 :]}"
