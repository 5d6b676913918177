"""GPU-side processes: claiming and supervising jobs, training, generating, sweeping. Never imports `api`."""
