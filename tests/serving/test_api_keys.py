"""API keys: created, found, revoked, and never shown."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
from pathlib import Path

import pytest

from imgcls.config import build
from imgcls.errors import ConfigError, RequestError
from imgcls.serving import api_keys
from imgcls.serving.api_keys import ApiKey, Keyring, NewKeyConfig, create_key, parse_keys
from imgcls.serving.config import ServeConfig
from imgcls.serving.deployment import run_preflight_checks


def create(file: Path, name: str = "nightly", **settings: object) -> str:
    return create_key(build(NewKeyConfig, {"file": str(file), "name": name, **settings}))


def test_a_new_key_is_found_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    one = create(file)
    other = create(file, "ops", scopes="predict,admin", images_per_minute=60, days=1)
    text = file.read_text()
    assert one not in text
    assert other not in text
    keyring = Keyring(str(file))
    found = keyring.find(one)
    assert found is not None
    assert (found.name, found.scopes) == ("nightly", ["predict"])
    second = keyring.find(other)
    assert second is not None
    assert second.scopes == ["predict", "admin"]
    assert second.images_per_minute == 60
    assert keyring.find(one + "x") is None
    assert keyring.find("") is None
    assert keyring.find("\udcff") is None


def test_keys_are_random_and_long(tmp_path: Path) -> None:
    secrets = {create(tmp_path / "keys.yaml", f"key{i}") for i in range(5)}
    assert len(secrets) == 5
    assert all(len(secret) >= 43 + len("imgcls_") for secret in secrets)


def test_a_key_whose_record_is_removed_is_rejected_after_a_refresh(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    gone, stays = create(file, "gone"), create(file, "stays")
    keyring = Keyring(str(file))
    lines = file.read_text().split("- name: ")
    file.write_text("- name: " + next(part for part in lines if part.startswith("stays")))
    assert keyring.find(gone) is not None
    keyring.refresh()
    assert keyring.find(gone) is None
    assert keyring.find(stays) is not None


def test_a_malformed_or_missing_file_keeps_the_previous_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    secret = create(file)
    keyring = Keyring(str(file))
    file.write_text("- name: [")
    with pytest.raises(RequestError, match=r"invalid YAML \(line 1\)"):
        keyring.refresh()
    file.unlink()
    with pytest.raises(RequestError, match=r"no such file\. Run `imgcls key new"):
        keyring.refresh()
    assert keyring.find(secret) is not None


def test_a_file_that_is_empty_while_it_is_rewritten_revokes_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    secret = create(file)
    text = file.read_text()
    keyring = Keyring(str(file))
    for following in (text, "- name: ["):
        file.write_text("")
        keyring.refresh()
        assert keyring.find(secret) is not None
        file.write_text(following)
        with contextlib.suppress(RequestError):
            keyring.refresh()
        assert keyring.find(secret) is not None
    file.write_text("")
    keyring.refresh()
    assert keyring.find(secret) is not None
    keyring.refresh()
    assert keyring.find(secret) is None


@pytest.mark.parametrize("left", ["# no keys\n", "[]\n"])
def test_the_last_key_can_be_revoked_and_another_one_created(tmp_path: Path, left: str) -> None:
    file = tmp_path / "keys.yaml"
    secret = create(file)
    keyring = Keyring(str(file))
    file.write_text(left)
    keyring.refresh()
    assert keyring.find(secret) is None
    assert keyring.is_empty()
    another = create(file)
    keyring.refresh()
    assert keyring.find(secret) is None
    assert keyring.find(another) is not None


def test_a_service_does_not_start_with_an_empty_key_file(
    tmp_path: Path, color_bundle: Path
) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("# no keys\n")
    config = build(ServeConfig, {"model": str(color_bundle), "keys": str(file)})
    with pytest.raises(RequestError, match=r"contains no key\. Run `imgcls key new --file"):
        run_preflight_checks(config)
    create(file)
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
    ("text", "message"),
    [
        ("", "contains no key"),
        ("name: x", "contains no key"),
        ("- name: x", "key 1: sha256: Field required"),
        ("- name: a b\n  sha256: " + "0" * 64, "key 1: name: String should match"),
        ("- name: x\n  sha256: imgcls_secret", "key 1: sha256: String should match"),
        ("- name: x\n  sha256: " + "a" * 64 + "\n  scopes: [root]", "key 1: scopes.0"),
        ("- name: x\n  expires: 2027-02-30", "invalid date or number"),
        (f"- {{name: x, sha256: {'a' * 64}}}\n- {{name: x, sha256: {'b' * 64}}}", "named 'x'"),
    ],
)
def test_an_invalid_file_is_rejected_without_repeating_a_possible_key(
    text: str, message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parse_keys(text, "keys.file keys.yaml")
    assert str(caught.value).startswith("keys.file keys.yaml: ")
    assert message in str(caught.value)
    assert "imgcls_secret" not in str(caught.value)


def test_a_duplicate_name_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    create(file)
    before = file.read_text()
    with pytest.raises(RequestError, match="already has a key named 'nightly'"):
        create(file)
    assert file.read_text() == before


def test_a_key_is_appended_to_a_file_without_a_final_newline(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    first = create(file, "first")
    file.write_text(file.read_text().rstrip("\n"))
    second = create(file, "second")
    keyring = Keyring(str(file))
    assert keyring.find(first) is not None
    assert keyring.find(second) is not None


DIGEST = hashlib.sha256(b"first").hexdigest()


@pytest.mark.parametrize(
    "text",
    [
        f"  - name: first\n    sha256: {DIGEST}\n    scopes:\n      - predict\n",
        f"# keys\n- {{name: first, sha256: {DIGEST}}}  # by hand",
        f"-   name: first\n    sha256: {DIGEST}\n\n# the end\n",
        f" -\n  name: first\n  sha256: {DIGEST}\n  scopes: \n   - predict\n",
    ],
)
def test_a_key_is_appended_at_the_indentation_of_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    second, third = create(file, "second"), create(file, "third")
    assert file.read_text().startswith(text)
    keyring = Keyring(str(file))
    for secret in ("first", second, third):
        assert keyring.find(secret) is not None


@pytest.mark.parametrize(
    "text",
    [
        f"[{{name: first, sha256: {DIGEST}}}]\n",
        f"---\n- name: first\n  sha256: {DIGEST}\n...\n",
    ],
)
def test_a_file_that_cannot_be_extended_is_refused_and_kept(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(RequestError, match="a record cannot be appended to a list of this form"):
        create(file, "second")
    assert file.read_text() == text
    assert capsys.readouterr().out == ""


def test_a_key_may_be_valid_for_a_century_at_most(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    secret = create(file, days=36_500)
    assert Keyring(str(file)).find(secret) is not None
    with pytest.raises(ConfigError, match="days: Input should be less than or equal to 36500"):
        create(file, "other", days=9_999_999)


def test_keys_are_loaded_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(b"it").hexdigest()
    monkeypatch.setenv("SERVICE_KEYS", f"- {{name: it, sha256: {digest}}}")
    assert Keyring(None, api_keys.load_keys_from_env("SERVICE_KEYS")).find("it") is not None
    monkeypatch.delenv("SERVICE_KEYS")
    with pytest.raises(
        RequestError, match=r"keys\.env SERVICE_KEYS: the environment variable is not set"
    ):
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
    for secret in ("0", "4", "none"):
        compared.clear()
        Keyring(None, records).find(secret)
        assert compared == [record.sha256 for record in records]
