"""An API process that kills itself at its next commit once a file is there, before or after it, as the file says.

python -m tests.api.dying_api LISTENING_DESCRIPTOR FILE
"""

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy.engine.default import DefaultDialect

from api.app import create_app


def main(descriptor: int, trap: Path) -> None:
    commit = DefaultDialect.do_commit

    def commit_and_die(self: DefaultDialect, connection: Any) -> None:
        when = trap.read_text() if trap.exists() else "never"
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        commit(self, connection)
        if when == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    DefaultDialect.do_commit = commit_and_die  # type: ignore[method-assign]
    server = uvicorn.Server(uvicorn.Config(create_app(), log_level="warning"))
    server.run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
