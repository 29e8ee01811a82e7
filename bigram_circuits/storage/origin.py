"""Which run a file is of, and whether a run was made here.

Every file of a run's folder but the mask repeats, under `of`, what it belongs to, so that a file of another run is
noticed. And `config.json` carries a hash with a key that this user keeps on this machine: the names in a run that was
made elsewhere are somebody else's words, and are opened only if the user repeats them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigram_circuits.storage.records import opened
from bigram_circuits.storage.typed import Record, shown

_KEY_BYTES = 32


@dataclass(frozen=True)
class Origin(Record):
    """What a file in a run's folder is of."""

    run: str | None = None
    """Checksum of the run's `config.json`; None if it was measured without looking at a run."""
    subnetwork: str | None = None
    """Checksum of the masks."""
    text: str | None = None
    """Fingerprint of the text it was measured on; None for what is not measured."""
    source: str | None = None
    """Where that text was read from, as a phrase."""

    def check(self, run: str | None, subnetwork: str | None) -> None:
        """Raise ValueError unless this may be the origin of a file of a run with these two checksums."""
        for what, mine, its in (("run", self.run, run), ("subnetwork", self.subnetwork, subnetwork)):
            if None not in (mine, its) and mine != its:
                raise ValueError(f"it is of another {what} (checksum {shown(mine)}, not {shown(its)})")


def sign(record: Mapping[str, Any]) -> str | None:
    """Hash a JSON record with this user's key, which is made if there is none; None if no key can be kept here."""
    try:
        return _hash(record, _read_key() or _make_key())
    except (OSError, RuntimeError):  # no home folder, or one that cannot be written
        return None


def is_signed(record: Mapping[str, Any], signature: str | None) -> bool:
    """Whether `sign` gave this signature to this record, for this user and on this machine."""
    try:
        key = _read_key()
    except (OSError, RuntimeError, ValueError):
        return False
    return key is not None and signature is not None and hmac.compare_digest(_hash(record, key), signature)


def signed(record: Any) -> Any:
    """A record with its field `signature` set to that of this user on this machine."""
    return replace(record, signature=sign(_unsigned(record)))


def is_ours(record: Any) -> bool:
    """Whether this user signed a record on this machine."""
    return is_signed(_unsigned(record), record.signature)


def _unsigned(record: Any) -> Mapping[str, Any]:
    return replace(record, signature=None).to_json()


def _hash(record: Mapping[str, Any], key: bytes) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16, key=key).hexdigest()


def _key_path() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.local/state"
    return Path(state).expanduser() / "bigram_circuits" / "key"


def _read_key() -> bytes | None:
    """The user's key; None if there is none."""
    try:
        with opened(_key_path()) as file:
            key = file.read(_KEY_BYTES + 1)
    except FileNotFoundError:
        return None
    return key if len(key) == _KEY_BYTES else None


def _make_key() -> bytes:
    """Make a key that only this user can read; if another process has just made one, that is the key."""
    path = _key_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
    key = _read_key()
    if key is None:
        raise OSError(f"{str(path)!r} holds no key")
    return key
