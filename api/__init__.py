"""HTTP: validation, OpenAI's shapes, live streams. Runs no model, imports no torch, waits on no broker in a request."""
