"""Every guard of the list."""

from tests.mutants.batches import BATCHES
from tests.mutants.bytes import BYTES
from tests.mutants.guard import Guard
from tests.mutants.requests import REQUESTS
from tests.mutants.state import STATE, SWEEP
from tests.mutants.trainers import TRAINER

GUARDS: tuple[Guard, ...] = (*STATE, *SWEEP, *TRAINER, *BYTES, *REQUESTS, *BATCHES)
