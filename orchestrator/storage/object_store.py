"""Copies between an object store and this machine."""

import os
import shutil
import uuid
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pyarrow.fs as pafs

from preferences import buckets

_CHUNK_BYTES = 64 * 2**20
_LOCAL = pafs.LocalFileSystem()


def ray_storage_arguments(location: str) -> tuple[pafs.FileSystem | None, str]:
    """Return Ray Train's `storage_filesystem` and `storage_path` for a run's checkpoints.

    Ray's own processes do not get the keys from the command's environment, so the filesystem carries them; it
    is sent between processes in memory and never written to disk.
    """
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    parts = urlsplit(location)
    if parts.scheme != "s3" or "@" in parts.netloc or not key or not secret:
        return None, location
    store, path = buckets.open_bucket(location)
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    options = {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme} if endpoint.netloc else {}
    options |= {k: v for k, v in parse_qsl(parts.query) if k in ("endpoint_override", "scheme")}
    session = os.environ.get("AWS_SESSION_TOKEN")
    return (
        pafs.S3FileSystem(
            access_key=key, secret_key=secret, session_token=session, region=store.region, **options
        ),
        path,
    )


def download_path(store: pafs.FileSystem, path: str, target: Path) -> None:
    """Replace `target` with a copy of the file or folder stored at `path`; delete it if there is none.

    Raises:
        OSError: it cannot be read, or a name in the folder leads out of it.
    """
    kind = store.get_file_info(path).type
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if kind == pafs.FileType.NotFound:
            remove_path(target)
            return
        if kind == pafs.FileType.Directory:
            _refuse_names_outside(store, path)
            part.mkdir()
        pafs.copy_files(
            path, str(part), source_filesystem=store, destination_filesystem=_LOCAL, chunk_size=_CHUNK_BYTES
        )
        if kind == pafs.FileType.Directory:
            remove_path(target)
        part.replace(target)
    finally:
        remove_path(part)


def _refuse_names_outside(store: pafs.FileSystem, path: str) -> None:
    """Raise OSError if a name below `path` has `..` in it: object stores allow that, and Arrow follows it."""
    for entry in store.get_file_info(pafs.FileSelector(path, recursive=True)):
        if ".." in entry.path.removeprefix(path).split("/"):
            raise OSError(f"{entry.path} is stored under a name that leads out of its folder")


def upload_path(source: Path, store: pafs.FileSystem, path: str) -> None:
    """Upload a file or a folder; then delete what the stored folder contains and the local one does not."""
    pafs.copy_files(  # one thread: Arrow's parallel uploads may block each other
        str(source), path, source_filesystem=_LOCAL, destination_filesystem=store, use_threads=False
    )
    if source.is_dir():
        local_files = {file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()}
        for entry in store.get_file_info(pafs.FileSelector(path, recursive=True)):
            if entry.is_file and os.path.relpath(entry.path, path) not in local_files:
                store.delete_file(entry.path)


def remove_path(path: Path) -> None:
    """Delete a file or a link, if it exists, or a folder with its contents."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
