"""`python -m bigram_circuits.cli`: the command `bigram-circuits`, where it is not on the path."""

from bigram_circuits.cli import run

run()
