"""The last word on an environment: ranks that reduce a tensor with every framework asked for.

Run as ``horovodrun -np 2 python tools/smoke.py torch tensorflow``.
"""

import importlib
import sys

from mpi4py import MPI


def average_of_ranks(framework: str) -> float:
    """The mean rank, computed by Horovod inside the given framework."""
    horovod = importlib.import_module(f"horovod.{framework}")
    horovod.init(comm=MPI.COMM_WORLD)
    if framework == "torch":
        own = importlib.import_module("torch").tensor([float(horovod.rank())])
    else:
        own = importlib.import_module("tensorflow").constant([float(horovod.rank())])
    average = horovod.allreduce(own, name="smoke")
    return float(average[0])


def main() -> None:
    """Compare each framework's answer with the known one; any other ends the job."""
    expected = (MPI.COMM_WORLD.size - 1) / 2
    for framework in sys.argv[1:]:
        average = average_of_ranks(framework)
        if average != expected:
            sys.exit(f"horovod.{framework} averaged the ranks to {average}, not {expected}")
        print(f"horovod.{framework}: the mean rank is {average}", flush=True)


if __name__ == "__main__":
    main()
