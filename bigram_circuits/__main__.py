"""`python -m bigram_circuits`: the command line, also for `torchrun -m bigram_circuits`."""

from bigram_circuits.cli import run

if __name__ == "__main__":
    run()
