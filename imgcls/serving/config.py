"""The settings of `imgcls serve`, each section beside the others; checked before Ray starts."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from imgcls.config import Names, Section, UnitFloat
from imgcls.data.preprocess import DecodeMode
from imgcls.data.storage_settings import StorageConfig
from imgcls.log import LogFormat
from imgcls.models.bundle import Precision

Port = Annotated[int, Field(ge=1, le=65535)]
MIB = 1 << 20


class HttpConfig(Section):
    """Where it listens."""

    host: str = "127.0.0.1"
    """The address to listen on; other than this machine's own only with keys."""
    port: Port = 8000
    certificate: str | None = None
    """PEM file of the TLS certificate and its chain; with it, https instead of http."""
    private_key: str | None = None
    """PEM file of the certificate's private key."""
    proxy: Literal["python", "haproxy"] = "python"
    """What Ray Serve listens with. haproxy: much faster, without TLS; see docs/serving.md."""
    cors_origins: Names = []
    """Web pages from elsewhere that may ask, e.g. https://app.example.com; none by default."""
    request_timeout_s: PositiveFloat = 120.0
    """A request that is not answered for so long is given up."""

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key belong together: give both, or neither")
        if self.proxy == "haproxy" and self.certificate is not None:
            raise ValueError("door haproxy has no TLS in Ray Serve; say python, or end TLS before")
        return self

    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class KeysConfig(Section):
    """Who may ask."""

    shorthand: ClassVar[str | None] = "file"

    file: str | None = None
    """A YAML file of API keys, as `imgcls key new` makes it; read again when it changes."""
    env: str | None = None
    """An environment variable that holds the text of such a file."""
    refresh_interval_s: PositiveFloat = 2.0
    """How often the file is looked at."""

    def is_configured(self) -> bool:
        return self.file is not None or self.env is not None


class LimitsConfig(Section):
    """What a request may be."""

    image_bytes: PositiveInt = 20 * MIB
    """Of one image file."""
    body_bytes: PositiveInt = 64 * MIB
    """Of a request with several."""
    images: PositiveInt = 64
    """In one request."""
    pixels: PositiveInt = 100_000_000
    """Of one image, as its header says; as in labelling."""
    upload_timeout_s: PositiveFloat = 60.0
    """A body that has not arrived after so long is refused."""
    spool_bytes: PositiveInt = 2 << 30
    """Of all bodies that are arriving or waiting, per replica; on disk where one is above 1 MiB."""
    proxy_bytes: PositiveInt = 512 * MIB
    """Of all bodies that came in by a door and are not answered; in Ray Serve's memory."""
    waiting_images: PositiveInt = 256
    """That wait for the model, per replica; more are refused with 503 and Retry-After."""


class ReplicaConfig(Section):
    """How many processes answer, and when there are more of them."""

    shorthand: ClassVar[str | None] = "least"

    min_replicas: PositiveInt | None = None
    """One per GPU, or per CPU where there is none, when not given."""
    max_replicas: PositiveInt | None = None
    """Above `least`: more are started as requests queue up, and ended when they do not."""
    cpus: PositiveFloat | None = None
    """Of each replica; its network and its decoding share them. Chosen from what there is."""
    target_ongoing_requests: PositiveInt = 16
    """Under way per replica, that the number of replicas is steered to."""
    drain_period_s: NonNegativeFloat = 5.0
    """Between the end being announced at /readyz and the door being shut."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < (self.min_replicas or 1):
            raise ValueError(f"most {self.max_replicas} is below least {self.min_replicas or 1}")
        return self


class ServeConfig(Section):
    """Settings of `imgcls serve`."""

    model: str
    """The bundle (folder or URL)."""
    http: HttpConfig = HttpConfig()
    keys: KeysConfig = KeysConfig()
    limits: LimitsConfig = LimitsConfig()
    replicas: ReplicaConfig = ReplicaConfig()
    batch_size: PositiveInt = 16
    """Images per forward pass at most: those that wait when the network is free."""
    decode: DecodeMode | None = None
    """exact: decode JPEGs whole. fast: large ones at reduced size. Default: the bundle's own."""
    precision: Precision = "auto"
    """auto takes bf16 where the hardware has it, else fp32, as in labelling."""
    top_k: PositiveInt = 5
    """Labels per image, if a request does not say."""
    threshold: UnitFloat | None = None
    """A prediction is accepted when its confidence reaches it; the bundle's own if not given."""
    storage: StorageConfig = StorageConfig()
    detach: bool = False
    """On a cluster: leave it serving and come back. Said again, it changes what is serving."""
    log: LogFormat = "text"
    """json: one object a line."""

    def dump_for_replicas(self) -> dict[str, Any]:
        """As JSON, for Ray Serve to hand to every replica."""
        return self.model_dump(mode="json")
