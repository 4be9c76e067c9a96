"""What the programs share as programs: their options, errors, start and end, and how they are looked at."""

import os

# gRPC reads it while it is imported, and otherwise tells the operator of every peer that hangs up.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
