"""API keys: records of their hashes in a YAML file that may be edited while the service runs.

A key is 256 random bits, so its plain SHA-256 cannot be reversed or guessed; a slow password hash
is not needed. A lookup compares every record in constant time, so that response times reveal
nothing about the existing keys.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import os
import re
import secrets
import textwrap
from collections import Counter
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, PositiveFloat, StringConstraints, ValidationError

from imgcls.config import Section, names
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import StorageConfig, with_config_storage
from imgcls.errors import RequestError, StorageMissing

KeyScope = Literal["predict", "admin", "label"]
KeyScopes = Annotated[list[KeyScope], BeforeValidator(names)]

_MAX_DAYS = 36_500
"""Maximum lifetime of a key; a date must be before the year 10000."""
_KEY_PREFIX = "imgcls_"
"""Prefix by which secret scanners recognize a leaked key."""


class ApiKey(Section):
    """Record of an API key."""

    name: Annotated[str, StringConstraints(pattern=r"^[\w.@-]{1,64}$")]
    """Name of the key's owner, shown in metrics and logs."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the key, as hexadecimal digits."""
    scopes: KeyScopes = ["predict"]
    """predict: classify images, describe the model. admin: read metrics, reload the model. label:
    label images on the labeling page."""
    images_per_minute: PositiveFloat | None = None
    """Rate limit in images per minute; unlimited if not set."""
    expires: datetime.date | None = None
    """First day (UTC) on which the key is no longer valid."""

    def is_expired(self) -> bool:
        today = datetime.datetime.now(datetime.UTC).date()
        return self.expires is not None and today >= self.expires


class Keyring:
    """The API keys that are currently accepted.

    url:  key file (path or URL), or None
    keys: further keys, which do not change

    A key file without records is valid: its last key was revoked, and every request is rejected. A
    missing or malformed file is taken for a mistake: a refresh raises and keeps the previous keys.
    A file of zero bytes revokes the keys only when two refreshes in a row find it so: editors and
    shells empty a file before they write it.
    """

    def __init__(self, url: str | None, keys: list[ApiKey] | None = None) -> None:
        self._url = url
        self._extra_keys = keys or []
        self._was_blank = False
        self._keys = self._load()

    def find(self, secret: str) -> ApiKey | None:
        """Find the record of a key; None if it is unknown or expired."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return None if found is None or found.is_expired() else found

    def is_empty(self) -> bool:
        return not self._keys

    def refresh(self) -> None:
        """Read the file again. Raises as the constructor does, and then keeps the previous keys."""
        was_blank = self._was_blank
        keys = self._load()
        if was_blank or not self._was_blank:
            self._keys = keys

    def _load(self) -> list[ApiKey]:
        self._was_blank = False
        if self._url is None:
            return self._extra_keys
        try:
            text = filesystem.read(self._url).decode("utf-8", "replace")
        except StorageMissing as error:
            raise RequestError(
                f"keys.file {self._url}: no such file. Run `imgcls key new --file {self._url} "
                "--name NAME` to create it with a first key"
            ) from error
        self._was_blank = not text
        return [*self._extra_keys, *parse_keys(text, f"keys.file {self._url}", may_be_empty=True)]


def parse_keys(text: str, place: str, *, may_be_empty: bool = False) -> list[ApiKey]:
    """Parse a YAML list of key records.

    place: where the text comes from, the beginning of every error message
    Raises RequestError if the text is malformed or has no records. The message repeats no value of
    the file, since a value may be a key that was pasted there by mistake.
    """
    try:
        records = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise RequestError(f"{place}: invalid YAML{where}. Correct the file") from None
    except ValueError:  # e.g. February 30
        raise RequestError(f"{place}: invalid date or number. Correct the file") from None
    if may_be_empty and (records is None or records == []):
        return []
    if not isinstance(records, list) or not records:
        raise RequestError(f"{place}: contains no key. Run `imgcls key new` to create one")
    keys = []
    for number, record in enumerate(records, 1):
        try:
            keys.append(ApiKey.model_validate(record))
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'record'}: {problem['msg']}"
                for problem in error.errors(include_input=False, include_url=False)
            )
            raise RequestError(f"{place}: key {number}: {problems}") from None
    duplicates = [name for name, count in Counter(key.name for key in keys).items() if count > 1]
    if duplicates:
        raise RequestError(
            f"{place}: two keys are named {duplicates[0]!r}. Give each key its own name"
        )
    return keys


def load_keys_from_env(variable: str) -> list[ApiKey]:
    """Parse the records in an environment variable, in the format of the key file.

    Raises RequestError if it is not set or malformed.
    """
    text = os.environ.get(variable)
    if not text:
        raise RequestError(
            f"keys.env {variable}: the environment variable is not set. Set it to the text of a "
            "key file"
        )
    return parse_keys(text, f"keys.env {variable}")


class NewKeyConfig(Section):
    """Settings of `imgcls key new`."""

    file: str
    """Key file (path or URL) to append the key to; created if missing."""
    name: str
    """Name of the key's owner, shown in metrics and logs."""
    scopes: KeyScopes = ["predict"]
    """predict: classify images. admin: read metrics, reload the model. label: label images on the
    labeling page. Separate several scopes by commas: predict,label."""
    images_per_minute: PositiveFloat | None = None
    """Rate limit in images per minute; unlimited if not set."""
    days: Annotated[int, Field(gt=0, le=_MAX_DAYS)] | None = None
    """Days until the key expires, up to 36,500; it does not expire if not set."""
    storage: StorageConfig = StorageConfig()


@with_config_storage
def create_key(config: NewKeyConfig) -> str:
    """Create an API key: print it once, and append its hash to the key file.

    Returns the key. Raises RequestError if the name is taken, or if the file is malformed or cannot
    be extended.
    """
    place = f"keys.file {config.file}"
    try:
        text = filesystem.read(config.file).decode("utf-8", "replace")
        keys = parse_keys(text, place, may_be_empty=True)
        text = _FILE_HEADER if yaml.safe_load(text) == [] else text
    except StorageMissing:
        text, keys = _FILE_HEADER, []
    if config.name in [key.name for key in keys]:
        raise RequestError(
            f"{place}: already has a key named {config.name!r}. Remove its record, or pass another "
            "--name"
        )
    secret = _KEY_PREFIX + secrets.token_urlsafe(32)
    record: dict[str, Any] = {
        "name": config.name,
        "sha256": hashlib.sha256(secret.encode()).hexdigest(),
        "scopes": list(config.scopes),
    }
    if config.images_per_minute is not None:
        record["images_per_minute"] = config.images_per_minute
    if config.days is not None:
        today = datetime.datetime.now(datetime.UTC).date()
        record["expires"] = today + datetime.timedelta(days=config.days)
    filesystem.write(config.file, _append_record(text, keys, record, place).encode())
    print(secret, flush=True)
    return secret


def _append_record(text: str, keys: list[ApiKey], record: dict[str, Any], place: str) -> str:
    """The text of a key file with one more record, at the indentation of the others.

    keys: those of the text
    Raises RequestError if the text is a list of another form, e.g. `[{name: a, ...}]`.
    """
    added = yaml.safe_dump([record], sort_keys=False)
    wanted = [*keys, *parse_keys(added, "key")]
    indent = re.search(r"^ *(?=-\s)", text, re.MULTILINE)
    combined = re.sub(r"(?<!\n)\Z", "\n", text) + textwrap.indent(
        added, indent[0] if indent else ""
    )
    with contextlib.suppress(RequestError):
        if parse_keys(combined, place) == wanted:
            return combined
    raise RequestError(
        f"{place}: a record cannot be appended to a list of this form. Write each record on lines "
        'of its own that begin with "- name:", or pass another --file; nothing was written'
    )


_FILE_HEADER = """# API keys of `imgcls serve`, stored as hashes. Remove a record to revoke its key:
# running services read this file again within seconds.
"""
