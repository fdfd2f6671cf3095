"""Storage settings: how object stores and web servers are reached, and where that applies.

`use_settings` applies settings to the code that runs within it, in this thread (a context
variable), so that two jobs in two threads can use two stores. Threads, tasks and processes that a
job starts do not inherit them: `bind_settings`, `bind_iterator` and `create_thread_pool` pass them
on. Only processes of one job (Ray workers, trials, Serve replicas) set them for the whole process.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Annotated, Any, Concatenate, ParamSpec, Protocol, TypeVar

from pydantic import AfterValidator, BeforeValidator, PositiveFloat, PositiveInt

from imgcls import config
from imgcls.config import Section
from imgcls.data.storage.robots import RobotsDirective

P = ParamSpec("P")
T = TypeVar("T")


def _check_local_folder(folder: str) -> str:
    """The absolute path, since the workers of a run have other working directories."""
    path = re.sub("^file:(//)?(?=/)", "", folder)
    if "://" in path:
        raise ValueError("must be a folder on a disk, not a URL")
    return os.path.abspath(path)


class StorageConfig(Section):
    """Access to object stores. Credentials come from each store's own chain, never from here."""

    endpoint_url: str | None = None
    """URL of an S3 store other than AWS (default: AWS_ENDPOINT_URL)."""
    region: str | None = None
    """S3 region (default: from the environment or the AWS profile)."""
    profile: str | None = None
    """Profile in ~/.aws to use."""
    anon: bool = False
    """Read public buckets without credentials."""
    requester_pays: bool = False
    """Pay for requests to requester-pays buckets."""
    attempt_timeout_s: PositiveFloat = 15.0
    """Timeout of one request attempt, in seconds."""
    retry_timeout_s: PositiveFloat = 60.0
    """Total time to retry a request after transient errors, in seconds."""
    max_requests_per_host: PositiveInt = 64
    """Maximum concurrent requests to one HTTP host, over all workers of a run."""
    user_agent: str = "imgcls"
    """User-Agent header of HTTP requests; some hosts require a contact address in it."""
    robots_opt_outs: Annotated[tuple[RobotsDirective, ...], BeforeValidator(config.names)] = ()
    """X-Robots-Tag directives that exclude an image, such as noai,noimageai; its row gets the
    status opted_out."""
    http_cache: Annotated[str, AfterValidator(_check_local_folder)] | None = None
    """Local folder that keeps images from web servers; an image in it is not requested again, also
    if it has changed on its server. Nothing is removed from it."""

    def split_across(self, processes: int) -> StorageConfig:
        """The settings of each of `processes` processes that share the limit per host."""
        share = max(1, self.max_requests_per_host // max(1, processes))
        return self.model_copy(update={"max_requests_per_host": share})


class HasStorage(Protocol):
    """A job's configuration with a section `storage`."""

    @property
    def storage(self) -> StorageConfig: ...


C = TypeVar("C", bound=HasStorage)


class _Process:
    settings = StorageConfig()


_current: ContextVar[StorageConfig | None] = ContextVar("imgcls_storage_settings", default=None)


def current_settings() -> StorageConfig:
    """The settings that apply here: of the enclosing `use_settings`, else of the process."""
    return _current.get() or _Process.settings


@contextlib.contextmanager
def use_settings(settings: StorageConfig | Mapping[str, Any] | None) -> Iterator[None]:
    """Apply settings to everything that runs within, in this thread.

    Parameters
    ----------
    settings
        A configuration, or a mapping of its keys; None changes nothing.

    Raises
    ------
    ConfigError
        A key or a value is wrong.
    """
    if isinstance(settings, Mapping):
        settings = config.build(StorageConfig, settings)
    token = _current.set(settings or _current.get())
    try:
        yield
    finally:
        _current.reset(token)


def set_process_settings(settings: StorageConfig) -> None:
    """Apply settings to the whole process; for processes of one job only, such as Ray workers."""
    _Process.settings = settings


def with_config_storage(
    job: Callable[Concatenate[C, P], T],
) -> Callable[Concatenate[C, P], T]:
    """Decorator for a job's function: the settings `config.storage` apply while it runs."""

    @functools.wraps(job)
    def run(request: C, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with use_settings(request.storage):
            return job(request, *args, **kwargs)

    return run


def bind_settings(function: Callable[..., T], /, *bound: Any, **named: Any) -> Callable[..., T]:
    """A partial function for another thread or process, where the current settings then apply."""
    return bind_settings_split(1, function, *bound, **named)


def bind_settings_split(
    processes: int, function: Callable[..., T], /, *bound: Any, **named: Any
) -> Callable[..., T]:
    """As `bind_settings`, for `processes` processes that share the request limit per host."""
    settings = current_settings().split_across(processes)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        with use_settings(settings):
            return function(*bound, *args, **named, **kwargs)

    return call


def create_thread_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """A thread pool in which the caller's context variables apply, such as these settings."""
    values = [*contextvars.copy_context().items(), (_current, current_settings())]

    def set_values() -> None:
        for variable, value in values:
            variable.set(value)

    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=set_values)


def bind_iterator(items: Iterable[T]) -> Iterator[T]:
    """The same items; the current settings apply while each is made, in whichever thread.

    For libraries such as DuckDB, which read their input in threads of their own.
    """
    end: Any = object()
    return iter(bind_settings(next, iter(items), end), end)
