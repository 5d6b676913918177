"""Support tickets in free text, each with its triage as one line of JSON. README.md explains labels and splits."""
