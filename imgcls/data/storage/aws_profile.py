"""Credentials of an AWS profile, for libraries that read a profile from the environment only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AwsProfile:
    """The credentials of a profile as they are now, and its region; None where it has none."""

    access_key: str | None
    secret_key: str | None
    token: str | None
    region: str | None


def read_aws_profile(name: str | None) -> AwsProfile:
    """Read a profile, also one whose credentials come from a role, a process or a login.

    Without a name, all fields are None.
    """
    if not name:
        return AwsProfile(None, None, None, None)
    import botocore.session

    session = botocore.session.Session(profile=name)
    region = session.get_config_variable("region")
    credentials = session.get_credentials()
    if credentials is None:
        return AwsProfile(None, None, None, region)
    frozen = credentials.get_frozen_credentials()
    return AwsProfile(frozen.access_key, frozen.secret_key, frozen.token, region)
