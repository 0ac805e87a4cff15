"""Where something is on another machine: the text that gets it, and what of it may be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from .errors import UsageError
from .wording import shown

__all__ = ["URL", "as_url", "redacted"]

_BEGINNING = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_WITHIN = re.compile(_BEGINNING.pattern + r"[^\s'\"<>\\)\]]*")
_HTTP = ("http", "https")
#: Where what stands before an @ is a part of the place: a revision, a container.
_PLACES_WITH_AT = ("abfs", "abfss", "hf")


@dataclass(frozen=True, slots=True, repr=False)
class URL:
    """A URL. As text it has neither password nor query, which may be a signature.

    Attributes:
        secret: All of it, as the user gave it.
    """

    secret: str

    @property
    def scheme(self) -> str:
        return self.secret.partition("://")[0].lower()

    @property
    def is_http(self) -> bool:
        return self.scheme in _HTTP

    @property
    def name(self) -> str:
        """What it is called inside its folder."""
        path = urlsplit(self.secret).path if self.is_http else self.secret.partition("://")[2]
        name = path.rstrip("/").rpartition("/")[2]
        return unquote(name) if self.is_http else name

    def within(self, name: str) -> URL:
        """What has a name in this folder: a path with ``/``."""
        if not self.is_http:
            return URL(f"{self.secret.rstrip('/')}/{name}")
        parts = urlsplit(self.secret)
        return URL(urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}")))

    @property
    def folder(self) -> URL:
        """The folder that it is in."""
        if not self.is_http:
            return URL(self.secret.rstrip("/").rpartition("/")[0])
        parts = urlsplit(self.secret)
        return URL(urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0])))

    def __str__(self) -> str:
        return shown(_without_secrets(self.secret))

    def __repr__(self) -> str:
        return f"URL({str(self)!r})"


def as_url(given: object) -> URL | None:
    """A URL, if it is one; ``Path`` makes another text of it, which is none any more.

    Raises:
        UsageError: if it begins like one and is none.
    """
    if isinstance(given, URL):
        return given
    if not isinstance(given, str) or not _BEGINNING.match(given):
        return None
    url = URL(given)
    try:
        host = urlsplit(given).hostname  # which may be malformed
    except ValueError:
        host = None
    if (url.is_http and not host) or not given.isprintable():
        raise UsageError(f"{url}: is no URL")
    return url


def redacted(text: object) -> str:
    """What a library says, safe to print: its URLs without password and query."""
    return shown(_WITHIN.sub(lambda match: _without_secrets(match[0]), str(text)))


#: A user and a password, of which the keys of S3 may hold slashes; but not a port.
_PASSWORD = re.compile(r"[^/@:]*:(?!\d+(/|$))[^@]*@")
_USER = re.compile(r"[^/@]*@")


def _without_secrets(text: str) -> str:
    scheme, _, rest = text.partition("://")
    rest = _PASSWORD.sub("", rest, count=1) if _PASSWORD.match(rest) else rest
    if scheme.lower() not in _PLACES_WITH_AT and (user := _USER.match(rest)):
        rest = rest[user.end() :]
    rest, mark, _ = rest.partition("?")
    return f"{scheme}://{rest}{'?…' if mark else ''}"
