"""API keys: made, found, taken back, and never shown."""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path

import pytest

from imgcls.config import build
from imgcls.errors import RequestError
from imgcls.serving import api_keys
from imgcls.serving.api_keys import ApiKey, Keyring, NewKeyConfig, create_key, parse_keys
from imgcls.serving.config import ServeConfig
from imgcls.serving.deployment import run_preflight_checks


def made(file: Path, name: str = "nightly", **settings: object) -> str:
    return create_key(build(NewKeyConfig, {"file": str(file), "name": name, **settings}))


def test_a_new_key_is_found_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    one = made(file)
    other = made(file, "ops", scopes="predict,admin", images_per_minute=60, days=1)
    text = file.read_text()
    assert one not in text
    assert other not in text
    ring = Keyring(str(file))
    found = ring.find(one)
    assert found is not None
    assert (found.name, found.scopes) == ("nightly", ["predict"])
    second = ring.find(other)
    assert second is not None
    assert second.scopes == ["predict", "admin"]
    assert second.images_per_minute == 60
    assert ring.find(one + "x") is None
    assert ring.find("") is None
    assert ring.find("\udcff") is None


def test_keys_differ_and_are_long(tmp_path: Path) -> None:
    secrets = {made(tmp_path / "keys.yaml", f"key{i}") for i in range(5)}
    assert len(secrets) == 5
    assert all(len(secret) >= 43 + len("imgcls_") for secret in secrets)


def test_a_key_whose_lines_are_deleted_is_good_for_nothing_after_a_refresh(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    gone, stays = made(file, "gone"), made(file, "stays")
    ring = Keyring(str(file))
    lines = file.read_text().split("- name: ")
    file.write_text("- name: " + next(part for part in lines if part.startswith("stays")))
    assert ring.find(gone) is not None
    ring.refresh()
    assert ring.find(gone) is None
    assert ring.find(stays) is not None


def test_a_file_that_is_broken_by_an_edit_leaves_the_keys_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    secret = made(file)
    ring = Keyring(str(file))
    file.write_text("- name: [")
    with pytest.raises(RequestError, match=r"is no YAML \(line 1\)"):
        ring.refresh()
    file.unlink()
    with pytest.raises(RequestError, match="no such file; `imgcls key new"):
        ring.refresh()
    assert ring.find(secret) is not None


@pytest.mark.parametrize("left", ["", "# nobody\n", "[]\n"])
def test_the_last_key_can_be_taken_back_and_another_one_made(tmp_path: Path, left: str) -> None:
    file = tmp_path / "keys.yaml"
    secret = made(file)
    ring = Keyring(str(file))
    file.write_text(left)
    ring.refresh()
    assert ring.find(secret) is None
    assert ring.is_empty()
    another = made(file)
    ring.refresh()
    assert ring.find(secret) is None
    assert ring.find(another) is not None


def test_a_service_is_not_started_with_keys_of_which_there_are_none(
    tmp_path: Path, colour_bundle: Path
) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("# nobody\n")
    config = build(ServeConfig, {"model": str(colour_bundle), "keys": str(file)})
    with pytest.raises(RequestError, match=r"holds no key; `imgcls key new --file"):
        run_preflight_checks(config)
    made(file)
    assert run_preflight_checks(config) == []


def test_an_expired_key_is_not_found() -> None:
    digest = hashlib.sha256(b"old").hexdigest()
    today = datetime.datetime.now(datetime.UTC).date()
    tomorrow = today + datetime.timedelta(days=1)
    assert Keyring(None, [ApiKey(name="old", sha256=digest, expires=today)]).find("old") is None
    assert (
        Keyring(None, [ApiKey(name="old", sha256=digest, expires=tomorrow)]).find("old") is not None
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no key"),
        ("name: x", "holds no key"),
        ("- name: x", "key 1: sha256: Field required"),
        ("- name: a b\n  sha256: " + "0" * 64, "key 1: name: String should match"),
        ("- name: x\n  sha256: imgcls_secret", "key 1: sha256: String should match"),
        ("- name: x\n  sha256: " + "a" * 64 + "\n  scopes: [root]", "key 1: scopes.0"),
        ("- name: x\n  expires: 2027-02-30", "a date or a number that there is none of"),
        (f"- {{name: x, sha256: {'a' * 64}}}\n- {{name: x, sha256: {'b' * 64}}}", "named 'x'"),
    ],
)
def test_a_wrong_file_is_refused_without_a_word_of_what_may_be_a_key(text: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_keys(text, "keys.file keys.yaml")
    assert str(caught.value).startswith("keys.file keys.yaml: ")
    assert said in str(caught.value)
    assert "imgcls_secret" not in str(caught.value)


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    made(file)
    before = file.read_text()
    with pytest.raises(RequestError, match="has a key named 'nightly'"):
        made(file)
    assert file.read_text() == before


def test_a_file_without_a_last_line_end_takes_another_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    first = made(file, "first")
    file.write_text(file.read_text().rstrip("\n"))
    second = made(file, "second")
    ring = Keyring(str(file))
    assert ring.find(first) is not None
    assert ring.find(second) is not None


def test_keys_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(b"it").hexdigest()
    monkeypatch.setenv("SERVICE_KEYS", f"- {{name: it, sha256: {digest}}}")
    assert Keyring(None, api_keys.load_keys_from_env("SERVICE_KEYS")).find("it") is not None
    monkeypatch.delenv("SERVICE_KEYS")
    with pytest.raises(RequestError, match=r"keys\.env SERVICE_KEYS: is not set"):
        api_keys.load_keys_from_env("SERVICE_KEYS")


def test_every_record_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        ApiKey(name=f"key{i}", sha256=hashlib.sha256(f"{i}".encode()).hexdigest()) for i in range(5)
    ]
    compared: list[str] = []

    def compare(one: str, other: str) -> bool:
        compared.append(one)
        return one == other

    monkeypatch.setattr("imgcls.serving.api_keys.hmac.compare_digest", compare)
    for presented in ("0", "4", "none"):
        compared.clear()
        Keyring(None, records).find(presented)
        assert compared == [record.sha256 for record in records]
