"""What the API and the workers both know: settings, errors, tables, state changes, storage, queue, protocols."""
