"""`make test-sdk` alone collects `behaviours`: they need clients that nothing else here needs."""

import os

collect_ignore_glob = [] if os.environ.get("SDK_SUITE") else ["behaviours/*"]
