"""A server that forks the worker processes of a program. It imports little, so that the server starts at once."""

import multiprocessing
from multiprocessing import forkserver


def serve_processes() -> None:
    """Start a server that loads the libraries once, in parallel with this process, and forks the worker processes. For
    programs only, as it sets the start method of all their processes. Without a server, each worker loads them."""
    multiprocessing.set_start_method("forkserver")
    forkserver.set_forkserver_preload(["datamodules.preprocess.pipeline", "numpy.ma"])  # pyarrow loads that when used
    try:
        forkserver.ensure_running()
    except OSError:  # the name of the temporary folder may be too long for a socket
        multiprocessing.set_start_method("spawn", force=True)
