"""Settings of `imgcls serve`, one class per section; validated before Ray starts."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from imgcls.config import Names, Section, UnitFloat
from imgcls.data.decoding.preprocess import DecodeMode
from imgcls.data.manifests.manifest import ManifestConfig
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.log import LogFormat
from imgcls.models.bundle import EngineName, Precision

Port = Annotated[int, Field(ge=1, le=65535)]
MIB = 1 << 20
MAX_WAITING_EXPLANATIONS = 16
"""Maximum number of images that wait for an explanation in one replica."""


class HttpConfig(Section):
    """Listening address, TLS and HTTP proxy."""

    host: str = "127.0.0.1"
    """Address to listen on. An address other than loopback requires API keys."""
    port: Port = 8000
    """TCP port to listen on."""
    certificate: str | None = None
    """PEM file with the TLS certificate chain; enables https."""
    private_key: str | None = None
    """PEM file with the private key of the certificate."""
    proxy: Literal["python", "haproxy"] = "python"
    """HTTP proxy of Ray Serve. haproxy has a higher throughput but no TLS; see docs/serving.md."""
    cors_origins: Names = []
    """Origins of other websites whose pages may send requests, e.g. https://app.example.com."""
    request_timeout_s: PositiveFloat = 120.0
    """Timeout of one request, in seconds; answered with 408 after that."""

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key must be set together")
        if self.proxy == "haproxy" and self.certificate is not None:
            raise ValueError(
                "proxy haproxy does not support TLS in Ray Serve. Set proxy to python, or "
                "terminate TLS in front of the service"
            )
        return self

    def is_loopback(self) -> bool:
        """Whether the service can be reached from this machine only."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class KeysConfig(Section):
    """API keys."""

    shorthand: ClassVar[str | None] = "file"

    file: str | None = None
    """YAML file of API keys, created by `imgcls key new`; read again when it changes."""
    env: str | None = None
    """Name of an environment variable that contains the text of a key file."""
    refresh_interval_s: PositiveFloat = 2.0
    """Interval between two reads of the key file, in seconds."""

    def is_configured(self) -> bool:
        return self.file is not None or self.env is not None


class LimitsConfig(Section):
    """Limits on requests and on queued work."""

    image_bytes: PositiveInt = 20 * MIB
    """Maximum size of one image file, in bytes."""
    body_bytes: PositiveInt = 64 * MIB
    """Maximum size of a request with several images, in bytes."""
    images: PositiveInt = 64
    """Maximum number of images in one request."""
    explained_images: Annotated[int, Field(ge=0, le=MAX_WAITING_EXPLANATIONS)] = 4
    """Maximum number of images in one request with explain=true, up to 16. 0: no explanations."""
    pixels: PositiveInt = 100_000_000
    """Maximum number of pixels of one image, checked in its header before decoding."""
    upload_timeout_s: PositiveFloat = 60.0
    """Maximum time for a request body to arrive, in seconds."""
    spool_bytes: PositiveInt = 2 << 30
    """Maximum total size of the bodies held by one replica, in bytes; over 1 MiB each on disk."""
    proxy_bytes: PositiveInt = 512 * MIB
    """Maximum total size of request bodies buffered by one HTTP proxy, in bytes."""
    waiting_images: PositiveInt = 256
    """Maximum number of images queued in one replica; above it requests are rejected with 503."""


class ReplicaConfig(Section):
    """Number of replicas (processes with a copy of the model) and their resources."""

    shorthand: ClassVar[str | None] = "min_replicas"

    min_replicas: PositiveInt | None = None
    """Minimum number of replicas. Default: one per GPU; without GPUs one per CPU, up to 8; at most
    max_replicas."""
    max_replicas: PositiveInt | None = None
    """Maximum number of replicas; autoscaled if above min_replicas. Default: min_replicas."""
    cpus: PositiveFloat | None = None
    """CPUs reserved for one replica, for decoding and the model. Default: an equal share for
    max_replicas if all fit on the nodes, else for min_replicas; at most those of one node."""
    target_ongoing_requests: PositiveInt = 16
    """Target number of concurrent requests per replica for autoscaling."""
    drain_period_s: NonNegativeFloat = 5.0
    """Time between /readyz turning 503 and the shutdown, in seconds; requests are still served."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        min_replicas = self.min_replicas or 1
        if self.max_replicas is not None and self.max_replicas < min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} < min_replicas {min_replicas}")
        return self


class LabelingConfig(Section):
    """Page at /label where people label images in the browser; off unless manifest is set."""

    manifest: ManifestConfig | None = None
    """Images to label, in this order, such as the manifest.parquet that `imgcls select` writes."""
    output: str | None = None
    """Folder (path or URL) for the labels table, one Parquet file per annotator."""
    classes: Names = []
    """Classes to offer in addition to those of the model, separated by commas."""
    annotations_per_image: Annotated[int, Field(ge=1, le=10)] = 1
    """Number of annotators who label each image. With 2 or more the page shows their agreement."""

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        if (self.manifest is None) != (self.output is None):
            raise ValueError("manifest and output must be set together")
        if self.manifest is None and (self.classes or self.annotations_per_image > 1):
            raise ValueError("classes and annotations_per_image need manifest and output")
        return self


class ServeConfig(Section):
    """Settings of `imgcls serve`."""

    positional: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    """Model bundle: folder or URL, or models:/NAME@ALIAS or models:/NAME/VERSION in the MLflow
    model registry."""
    http: HttpConfig = HttpConfig()
    keys: KeysConfig = KeysConfig()
    limits: LimitsConfig = LimitsConfig()
    replicas: ReplicaConfig = ReplicaConfig()
    labeling: LabelingConfig = LabelingConfig()
    batch_size: PositiveInt = 16
    """Maximum number of images in one forward pass."""
    decode: DecodeMode | None = None
    """exact: decode JPEGs at full size. fast: large ones at reduced size. Default: the bundle's."""
    precision: Precision = "auto"
    """Numeric precision of the model; auto: bf16 if the hardware supports it, otherwise fp32. fp16:
    on GPUs, for those without bf16."""
    engine: EngineName = "auto"
    """Library that runs the network: torch, or openvino, an optional package for CPUs. auto: torch.
    """
    top_k: PositiveInt = 5
    """Default number of labels per image."""
    threshold: UnitFloat | None = None
    """Minimum confidence of an accepted prediction, or minimum score of each predicted label of a
    multi-label model. Default: the bundle's."""
    storage: StorageConfig = StorageConfig()
    detach: bool = False
    """Return once the service runs on the cluster; run the same command again to change it."""
    log: LogFormat = "text"
    """Log format; json: one object per line."""

    def dump_for_replicas(self) -> dict[str, Any]:
        """The settings as JSON, for the user config of the replicas."""
        return self.model_dump(mode="json")
