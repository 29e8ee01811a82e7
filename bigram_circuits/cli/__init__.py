"""The command line. Heavy modules are imported when a command needs them."""

from bigram_circuits.cli.arguments import parser
from bigram_circuits.cli.program import main, run

__all__ = ["main", "parser", "run"]
