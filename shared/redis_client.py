"""Connections to Redis or Valkey. Every call has a timeout: nobody waits on a broker that went away."""

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.settings import Settings

CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 15.0
"""Longer than any BLOCK in use."""


def connect(settings: Settings) -> redis.Redis:
    """A pooled client for threads. Raises `redis.RedisError` on use, not here."""
    return redis.Redis.from_url(
        settings.resolved_redis_url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=READ_TIMEOUT_S,
        retry=Retry(NoBackoff(), 1),
    )


def connect_async(settings: Settings, max_connections: int = 100) -> redis.asyncio.Redis:
    """A pooled client for the event loop. A call that blocks holds one connection for as long; when all are taken, the
    next call waits for one."""
    return redis.asyncio.Redis.from_pool(
        redis.asyncio.BlockingConnectionPool.from_url(
            settings.resolved_redis_url,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=READ_TIMEOUT_S,
            max_connections=max_connections,
            timeout=READ_TIMEOUT_S,
        )
    )
