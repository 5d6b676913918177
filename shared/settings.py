"""The operator's choices: environment variables, read once, frozen.

Everything here is named `ANNEAL_<FIELD>`; what a *client* may choose about a run is `shared.training_spec`.
Secrets are read here and never logged.
"""

import hashlib
import os
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

BYTES_PER_GIB = 2**30
MODEL_ACTIONS = ("exports", "push")
"""What may follow a model's id in a URL, and so can't be the end of one."""
FOLDER_SCHEMES = ("file", "local")
MAX_SOCKET_PATH_BYTES = 100
"""The kernel takes 107 bytes of path for a unix socket."""


class Settings(BaseSettings):
    """One frozen object for a process. Units are in the names: `_s` seconds, `_bytes` bytes."""

    model_config = SettingsConfigDict(env_prefix="ANNEAL_", env_ignore_empty=True, frozen=True, extra="ignore")

    data: Path = Path("anneal-data")
    """Folder of everything this host keeps: database, storage, working folders, logs. Made absolute."""
    host: str = "127.0.0.1"
    """Address the API binds. Anything but loopback demands `api_key`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port the API binds; 0 picks a free one."""
    api_key: str | None = Field(default=None, repr=False)
    """The one bearer token of the project `default`. Unset: loopback only, no authentication."""
    database_url: str | None = Field(default=None, repr=False)
    """SQLAlchemy URL. Unset: SQLite in `data`. PostgreSQL: `postgresql+psycopg://…`."""
    redis_url: str | None = Field(default=None, repr=False)
    """Redis or Valkey. Unset: `anneal up` embeds a Valkey on a unix socket in `data`."""
    storage_url: str | None = None
    """Where files, checkpoints and models are: a folder, or an object store such as `s3://bucket/prefix`, the same for
    all nodes. Unset: `data`/storage."""
    cache_bytes: int = Field(default=20 * BYTES_PER_GIB, gt=0)
    """How much of an object store this host keeps a copy of; past it the least recently used go."""
    models_dir: Path | None = None
    """The operator's own base models: `models_dir/<owner>/<name>/` with config.json and safetensors."""
    base_models: tuple[str, ...] = ("HuggingFaceTB/SmolLM2-135M-Instruct",)
    """Hub ids that jobs may name as a base, beside what `models_dir` holds. JSON list in the environment."""
    hub_offline: bool = False
    """Never ask the Hugging Face hub; use only local folders, its cache and packaged weights."""

    lease_s: float = Field(default=60, gt=0)
    """How long a claimed run belongs to its worker without a renewal."""
    heartbeat_s: float = Field(default=15, gt=0)
    """How often the lease is renewed."""
    poll_s: float = Field(default=1, gt=0)
    """How often a supervisor looks for a cancel request, and the sweep for stale rows (five times this)."""
    trainer_stop_s: float = Field(default=10, gt=0)
    """Between the order to cancel and SIGKILL of a trainer."""
    deploy_stop_s: float = Field(default=60, gt=0)
    """How long a trainer may take to save a checkpoint when its worker is shut down."""
    trainer_silent_s: float = Field(default=60, gt=2)
    """A trainer that says nothing for this long was stopped or hangs: it is killed, and its job goes on elsewhere."""
    trainer_memory_bytes: int | None = Field(default=None, gt=0)
    """Memory a trainer may take: of the GPU, or of the host beyond what its libraries need. Unset: all there is."""
    standby_trainer: bool = True
    """Whether a worker keeps a trainer that has its imports behind it, for the next job to start in."""
    max_attempts: int = Field(default=3, ge=1)
    """Trainer deaths without a new checkpoint before the job fails."""
    max_faults: int = Field(default=20, ge=1)
    """Faults in a row that are not the trainer's (hub, disk, a worker that vanished) before the job fails."""
    retry_delay_s: float = Field(default=2, ge=0)
    """Wait before a job whose run died is tried again; doubles with each further death, up to five minutes."""

    garbage_age_s: float = Field(default=3600, ge=0)
    """Bytes in storage that no row names are removed once they are this old; younger ones may still get their row."""

    max_upload_bytes: int = 512 * 2**20
    """Largest file accepted in one request."""
    max_large_upload_bytes: int = Field(default=8 * BYTES_PER_GIB, gt=0)
    """Largest file accepted in parts (`/v1/uploads`)."""
    inline_validation_bytes: int = 4 * 2**20
    """Uploads up to this size are validated before the answer; larger ones by `worker batch`."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What generates. `auto`: `vllm` where there is an NVIDIA GPU and `vllm_python` is set, else `transformers`."""
    vllm_python: Path | None = None
    """The interpreter of the environment that has vLLM, which can't share ours; `make setup-vllm` builds one."""
    vllm_options: tuple[str, ...] = ()
    """More of `vllm serve`'s own options, after ours: a JSON list like `["--api-server-count", "4"]`."""
    generation_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format models are served in. `auto`: bfloat16 where the hardware computes in it."""
    generation_memory_bytes: int = Field(default=4 * BYTES_PER_GIB, gt=0)
    """Budget of loaded models with their key-value caches; past it the least recently used is evicted."""
    generation_slots: int = Field(default=8, ge=1)
    """Requests decoded at once by one generator."""
    generation_batch_slots: int = Field(default=4, ge=1)
    """Requests of batches decoded at once by one generator, beside the live ones; while there are any, a single one."""
    generation_load_wait_s: float = Field(default=60, gt=0)
    """How long a live request waits for its model to be loaded before it is told to come back."""
    generation_warm_up: bool = True
    """Whether a model is loaded as soon as its job has succeeded."""
    pinned_models: tuple[str, ...] = ()
    """Models that every generator loads at its start and never evicts: a JSON list of names."""
    generation_deadline_s: float = Field(default=600, gt=0)
    """A request older than this is answered with an error."""
    generation_stall_s: float = Field(default=120, gt=0)
    """A vLLM server that was asked and has given nobody a token for so long hangs, and is replaced."""
    generation_queue: int = Field(default=256, ge=1)
    """Requests that may wait; one more is answered 429."""
    batch_requests: int = Field(default=16, ge=1)
    """Requests of one batch that generators are given at once."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("base_models")
    @classmethod
    def _no_action(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name.rsplit("/", 1)[-1] in MODEL_ACTIONS:
                raise ValueError(
                    f"the base model {name!r} is named like an action on a model ({', '.join(MODEL_ACTIONS)}), and its "
                    "URL would mean that action; serve a copy under another name from ANNEAL_MODELS_DIR"
                )
        return names

    @field_validator("data", "models_dir", "vllm_python")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    @model_validator(mode="after")
    def _lease_outlives_heartbeats(self) -> Self:
        if self.heartbeat_s * 2 > self.lease_s:
            raise ValueError(
                f"ANNEAL_HEARTBEAT_S={self.heartbeat_s:g} must be at most half of ANNEAL_LEASE_S={self.lease_s:g}, "
                "or a single late renewal loses the run"
            )
        return self

    @property
    def engine_problem(self) -> str | None:
        """What keeps the chosen engine from running on this host. No error of the settings: an API has no engine."""
        if self.engine != "vllm" or (self.vllm_python is not None and self.vllm_python.exists()):
            return None
        return (
            "ANNEAL_ENGINE=vllm needs ANNEAL_VLLM_PYTHON, the interpreter of an environment that has vLLM; it is "
            f"{self.vllm_python}. `make setup-vllm` builds one: ANNEAL_VLLM_PYTHON=.venv-vllm/bin/python"
        )

    @property
    def generation_sequences(self) -> int:
        """Requests of all kinds that one generator decodes at once."""
        return self.generation_slots + self.generation_batch_slots

    @cached_property
    def resolved_database_url(self) -> str:
        """The database to use, the SQLite default filled in."""
        return self.database_url or f"sqlite:///{self.data / 'anneal.db'}"

    @cached_property
    def resolved_redis_url(self) -> str:
        """The broker to use; by default the embedded one's socket."""
        return self.redis_url or f"unix://{self.valkey_socket}"

    @field_validator("storage_url")
    @classmethod
    def _storage_can_be_opened(cls, url: str | None) -> str | None:
        scheme, separator, rest = (url or "").partition("://")
        if not separator or scheme in FOLDER_SCHEMES:
            return url
        from fsspec.registry import known_implementations  # here: most services have a folder, and start faster

        known = known_implementations.get(scheme)
        if known is None or not rest or (rest.startswith("/") and scheme in ("s3", "s3a")):
            raise ValueError(
                f"ANNEAL_STORAGE_URL={url!r} is no folder and no object store; "
                "give a path, or a bucket as in s3://bucket/prefix"
            )
        package = str(known["class"]).partition(".")[0]
        if find_spec(package) is None:
            raise ValueError(f"ANNEAL_STORAGE_URL={url!r} needs the package {package}; run `pip install {package}`")
        return url

    @property
    def storage_is_folder(self) -> bool:
        """Whether `storage_url` names a folder; else it names an object store."""
        scheme, separator, _ = (self.storage_url or "").partition("://")
        return not separator or scheme in FOLDER_SCHEMES

    @cached_property
    def storage_root(self) -> Path:
        """Absolute folder behind `storage_url`.

        Raises:
            ValueError: storage is an object store.
        """
        url = self.storage_url
        if url is None:
            return self.data / "storage"
        if not self.storage_is_folder:
            raise ValueError(f"ANNEAL_STORAGE_URL={url!r} is no folder")
        return Path(url.partition("://")[2] if "://" in url else url).expanduser().absolute()

    @cached_property
    def valkey_socket(self) -> Path:
        """Unix socket of the embedded Valkey: in `data`, or in a private folder under /tmp if that path is too long."""
        path = self.data / "valkey" / "valkey.sock"
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
            return path
        name = hashlib.sha256(os.fsencode(self.data)).hexdigest()[:16]
        return Path("/tmp") / f"anneal-{os.getuid()}-{name}" / "valkey.sock"  # noqa: S108 - cli.valkey makes it ours, 0700

    @cached_property
    def run_dir(self) -> Path:
        """Heartbeats, locks, process logs and working folders of this host. Never the only copy of anything."""
        return self.data / "run"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """This process's settings, read from the environment on first use."""
    return Settings()
