"""Who may ask: API keys, of which only the hashes are kept, in a file that may change at any time.

A key is 256 random bits, so a plain SHA-256 of it cannot be reversed or guessed; it needs none of
the slowness that passwords do. Every record is compared, each in constant time: how long an answer
takes tells nothing of the keys there are.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
import re
import secrets
from collections import Counter
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, PositiveFloat, StringConstraints, ValidationError

from imgcls.config import Section, names
from imgcls.data import filesystem
from imgcls.data.storage_settings import StorageConfig, with_config_storage
from imgcls.errors import RequestError, StorageMissing

KeyScope = Literal["predict", "admin"]
KeyScopes = Annotated[list[KeyScope], BeforeValidator(names)]

_KEY_PREFIX = "imgcls_"
"""By which programs that look for leaked secrets know one."""


class ApiKey(Section):
    """What is known of an API key."""

    name: Annotated[str, StringConstraints(pattern=r"^[\w.@-]{1,64}$")]
    """Whose it is; stands in metrics and logs."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Hex digest of the key."""
    scopes: KeyScopes = ["predict"]
    """predict: label images, describe the model. admin: metrics, load the model again."""
    images_per_minute: PositiveFloat | None = None
    """How many images it may send; as many as it likes if not given."""
    expires: datetime.date | None = None
    """The first day, in UTC, on which it is good for nothing."""

    def is_expired(self) -> bool:
        today = datetime.datetime.now(datetime.UTC).date()
        return self.expires is not None and today >= self.expires


class Keyring:
    """The keys that are accepted now.

    url: the file they stand in; `keys` are those that stand elsewhere and do not change

    A file without records is one whose last key was taken back: nobody enters. One that is gone or
    broken is no decision of anybody's, so a refresh then leaves what there was.
    """

    def __init__(self, url: str | None, keys: list[ApiKey] | None = None) -> None:
        self._url = url
        self._extra_keys = keys or []
        self._keys = self._load()

    def find(self, presented: str) -> ApiKey | None:
        """The record of a key that was presented; None when there is none, or it is expired."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return None if found is None or found.is_expired() else found

    def is_empty(self) -> bool:
        """Whether there is no key to enter with."""
        return not self._keys

    def refresh(self) -> None:
        """Read the file again; raises as the constructor does, and then keeps what was there."""
        self._keys = self._load()

    def _load(self) -> list[ApiKey]:
        if self._url is None:
            return self._extra_keys
        try:
            text = filesystem.read(self._url).decode("utf-8", "replace")
        except StorageMissing as error:
            raise RequestError(
                f"keys.file {self._url}: no such file; `imgcls key new --file {self._url} --name "
                "NAME` makes it, with a first key"
            ) from error
        return [*self._extra_keys, *parse_keys(text, f"keys.file {self._url}", may_be_empty=True)]


def parse_keys(text: str, place: str, *, may_be_empty: bool = False) -> list[ApiKey]:
    """The records of a YAML list.

    Raises RequestError, which begins with `place`, when they are none or not well-formed. No value
    is repeated in it, since one may be a key itself, put there by mistake.
    """
    try:
        records = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise RequestError(f"{place}: is no YAML{where}; correct it") from None
    except ValueError:  # the 30th of February, say
        raise RequestError(
            f"{place}: holds a date or a number that there is none of; correct it"
        ) from None
    if may_be_empty and (records is None or records == []):
        return []
    if not isinstance(records, list) or not records:
        raise RequestError(f"{place}: holds no key; `imgcls key new` makes one")
    keys = []
    for number, record in enumerate(records, 1):
        try:
            keys.append(ApiKey.model_validate(record))
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg']}"
                for problem in error.errors(include_input=False, include_url=False)
            )
            raise RequestError(f"{place}: key {number}: {wrong}") from None
    doubled = [name for name, count in Counter(key.name for key in keys).items() if count > 1]
    if doubled:
        raise RequestError(f"{place}: two keys are named {doubled[0]!r}; give each its own name")
    return keys


def load_keys_from_env(variable: str) -> list[ApiKey]:
    """The records in an environment variable, in the form of the file.

    Raises RequestError when it is not set, or its records are not well-formed.
    """
    text = os.environ.get(variable)
    if not text:
        raise RequestError(f"keys.env {variable}: is not set; put the text of a key file into it")
    return parse_keys(text, f"keys.env {variable}")


class NewKeyConfig(Section):
    """Settings of `imgcls key new`."""

    file: str
    """The YAML file to add it to (path or URL); made when it is not there."""
    name: str
    """Whose it is."""
    scopes: KeyScopes = ["predict"]
    """predict, admin, or both."""
    images_per_minute: PositiveFloat | None = None
    """How many images it may send."""
    days: Annotated[int, Field(gt=0)] | None = None
    """How long it is good for; for ever if not given."""
    storage: StorageConfig = StorageConfig()


@with_config_storage
def create_key(config: NewKeyConfig) -> str:
    """Make an API key: print it once, and keep its hash in a file.

    Raises RequestError when the name is taken or the file is not well-formed.
    """
    place = f"keys.file {config.file}"
    try:
        text = filesystem.read(config.file).decode("utf-8", "replace")
        there = [key.name for key in parse_keys(text, place, may_be_empty=True)]
        text = _FILE_HEADER if yaml.safe_load(text) == [] else text
    except StorageMissing:
        text, there = _FILE_HEADER, []
    if config.name in there:
        raise RequestError(
            f"{place}: has a key named {config.name!r}; delete its lines, or take another --name"
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
    added = yaml.safe_dump([record], sort_keys=False)
    parse_keys(added, "key")
    filesystem.write(config.file, (re.sub(r"(?<!\n)\Z", "\n", text) + added).encode())
    print(secret, flush=True)
    return secret


_FILE_HEADER = """# API keys of `imgcls serve`, by their hashes. Delete a key's lines to revoke it:
# this file is read again within seconds.
"""
