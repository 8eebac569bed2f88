"""This command of 1.0 is gone: `GONE` in common/cli.py names what to use."""

from common.cli import refuse_gone
from common.errors import run_command

if __name__ == "__main__":
    run_command(lambda _: refuse_gone("python -m adapters.inspect"))
