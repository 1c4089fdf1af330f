"""Published files: download them, check them, keep them whole. No torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import re
import urllib.error
import urllib.request
from pathlib import Path

from vggfeat.errors import InputError, WeightsError, WeightsUnavailableError, first_line
from vggfeat.files import DAY, locked, new_file, remove_leftovers

CONNECT_TIMEOUT = 5.0  # seconds until a server must have answered the call
READ_TIMEOUT = 60.0  # seconds that a running download may stand still


def published_digest(filename: str) -> str:
    """The leading hex digits of the sha256 that a file name publishes: NAME-1a2b3c4d.pth.

    Raises:
        InputError: it publishes none.
    """
    match = re.search(r"-([0-9a-f]{8,})\.", filename)
    if not match:
        raise InputError(f"expected a file name that publishes its sha256, NAME-1a2b3c4d.pth, got {filename!r}")
    return match[1]


def verify(
    path: Path, digest: str = "", *, record: bool = True, otherwise: str = "delete it and it is fetched again"
) -> str:
    """Check a file's sha256 against the digits that its name publishes and against what its first check recorded.

    The record is the file's name with `.sha256` appended, in the format of `sha256sum`.

    Args:
        path: the file.
        digest: leading hex digits that the sha256 must have, of a published file.
        record: write the record where there is no file of that name and the folder allows it.
        otherwise: what the error says to do with a file that is not what its name publishes.

    Returns:
        The sha256.

    Raises:
        WeightsUnavailableError: the file cannot be read.
        WeightsError: they differ.
    """
    try:
        actual = _sha256(*file_key(path))
    except OSError as error:
        raise WeightsUnavailableError(f"{path} cannot be read: {error.strerror}") from error
    if not actual.startswith(digest):
        raise WeightsError(
            f"{path} is damaged or was changed: its sha256 starts with {actual[:8]}, expected {digest[:8]}; {otherwise}"
        )
    known = _read_record(path)
    if known and known != actual:
        again = "; delete both and it is fetched again" if digest else ""
        raise WeightsError(
            f"{path} was changed since it was first checked: its sha256 is {actual}, recorded in "
            f"{_record_path(path).name} is {known}{again}"
        )
    if record and known is None:
        _write_record(path, actual)
    return actual


def recorded(path: Path) -> bool:
    """Whether a file's sha256 was recorded when it was checked before."""
    return bool(_read_record(path))


def _read_record(path: Path) -> str | None:
    """The sha256 recorded of a file; None where there is none yet, empty where the record is something else."""
    try:
        text = _record_path(path).read_text(encoding="utf-8", errors="replace").strip().lower()
    except FileNotFoundError:
        return None
    except OSError:
        return ""
    if not text:
        return None
    match = re.match(r"[0-9a-f]{64}\b", text)
    return match[0] if match else ""


def file_key(path: Path) -> tuple[str, int, int]:
    """Identifies one state of a file: resolved path, size, modification time."""
    stat = path.stat()
    return (str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    """A file's sha256; an unchanged file is read once a process, however many losses are made of it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record_path(path: Path) -> Path:
    """Where a file's sha256 is recorded."""
    return path.with_name(path.name + ".sha256")


def _write_record(path: Path, digest: str) -> None:
    """Record a file's sha256, where the folder allows it."""
    with contextlib.suppress(OSError), new_file(_record_path(path), overwrite=True) as file:
        file.write(f"{digest}  {path.name}\n".encode())


def _patient(kind: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
    """A connection that gives up calling after CONNECT_TIMEOUT and listening after READ_TIMEOUT."""

    class Connection(kind):  # type: ignore[misc, valid-type]
        def connect(self) -> None:
            super().connect()
            self.sock.settimeout(READ_TIMEOUT)

    return Connection


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_patient(http.client.HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_patient(http.client.HTTPSConnection), request)


def fetch(url: str, folder: Path) -> Path:
    """Download a published file, unless it is there, verify it, and only then give it its name.

    On a terminal there is a progress bar. Of several processes that want it at once, such as those of a training run,
    one downloads it for all.

    Args:
        url: where it is; the file's name publishes the start of its sha256.
        folder: where it goes; made if need be.

    Raises:
        WeightsError: it is there, and was changed.
        WeightsUnavailableError: the server cannot be reached, refuses, or stops half way; or the folder is not
            writable; or what came is not what the name publishes. No partial file is left.
        InputError: the name publishes nothing.
    """
    from tqdm import tqdm

    name = url.rsplit("/", 1)[-1]
    digest, path = published_digest(name), folder / name
    opener = urllib.request.build_opener(_Handler)
    request = urllib.request.Request(url, headers={"User-Agent": "vggfeat"})
    sha = hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, DAY)
        with locked(folder, waiting=f"waiting for another process that downloads into {folder}"):
            if path.is_file():
                verify(path, digest)
                return path
            with opener.open(request, timeout=CONNECT_TIMEOUT) as response, new_file(path, overwrite=True) as file:
                length = int(response.headers.get("Content-Length") or 0)
                # disable=None: only where stderr is a terminal
                with tqdm(total=length or None, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                    while chunk := response.read(1 << 20):
                        sha.update(chunk)
                        file.write(chunk)
                        bar.update(len(chunk))
                if file.tell() < length:
                    raise WeightsUnavailableError(f"download of {url} stopped after {file.tell()} of {length} bytes")
                if not sha.hexdigest().startswith(digest):
                    raise WeightsUnavailableError(  # such as the page of a hotel's network
                        f"{url} gave a file whose sha256 starts with {sha.hexdigest()[:8]}, expected {digest}"
                    )
    except urllib.error.HTTPError as error:
        error.close()  # it is also the response, holding the connection
        raise WeightsUnavailableError(f"{url} answered {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # a length that is no number
        reason = first_line(getattr(error, "reason", None) or error)
        raise WeightsUnavailableError(f"download of {url} failed ({reason})") from error
    _write_record(path, sha.hexdigest())
    return path
