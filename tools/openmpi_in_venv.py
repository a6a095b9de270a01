"""Lets every program of this environment find the environment's own Open MPI.

``make setup`` copies this file into the environment when Open MPI comes from its wheel, beside a
``.pth`` file that imports it at each start of Python. Activating the environment is then optional:

- the wheel's ``mpirun`` knows where it lies, but the MPI library does not: a program started
  without ``mpirun`` fails in ``MPI_Init`` unless OPAL_PREFIX names the environment;
- ``horovodrun`` looks for ``mpirun`` on PATH.
"""

import os
import sys


def find_own_open_mpi() -> None:
    """Set OPAL_PREFIX, and put the environment's programs first on PATH."""
    os.environ.setdefault("OPAL_PREFIX", sys.prefix)
    programs = os.path.join(sys.prefix, "bin")
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if programs not in folders:
        os.environ["PATH"] = os.pathsep.join([programs, *folders])


find_own_open_mpi()
