"""Every scenario: one entry a boundary of the service, each by the code that does it in production."""

from tests.failpoints.batch_scenarios import BATCH_SCENARIOS
from tests.failpoints.client_scenarios import CLIENT_SCENARIOS
from tests.failpoints.once_scenarios import ONCE_SCENARIOS
from tests.failpoints.pause_scenarios import PAUSE_SCENARIOS
from tests.failpoints.scenario import Facts, Scenario, collect_all, time_passes
from tests.failpoints.upload_scenarios import UPLOAD_SCENARIOS
from tests.failpoints.worker_scenarios import WORKER_SCENARIOS

SCENARIOS = (
    *CLIENT_SCENARIOS,
    *ONCE_SCENARIOS,
    *UPLOAD_SCENARIOS,
    *PAUSE_SCENARIOS,
    *WORKER_SCENARIOS,
    *BATCH_SCENARIOS,
)

__all__ = ["SCENARIOS", "Facts", "Scenario", "collect_all", "time_passes"]
