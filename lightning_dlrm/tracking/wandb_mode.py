"""Choice of W&B's mode, without importing wandb, which takes long."""

import netrc
import os
import socket
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from lightning_dlrm.contracts.errors import UserError

NO_KEY = "no API key"
"""Why a run is offline."""
Mode = Literal["auto", "online", "offline", "disabled"]


def choose_mode(mode: Mode, seconds: float = 3.0) -> tuple[Literal["online", "offline", "disabled"], str]:
    """Return the mode of a run, before wandb starts.

    wandb itself would prompt for a missing API key, and would wait for minutes without a network.

    Args:
        mode: ``auto`` is online if there is an API key and the server answers; WANDB_MODE, if set, replaces ``auto``.
        seconds: longest time to wait for the server.

    Returns:
        The mode, and a short reason if it is ``offline``.

    Raises:
        UserError: WANDB_MODE is not a mode of W&B.
    """
    wanted = os.environ.get("WANDB_MODE", "").lower()
    if not wanted:
        # wandb refuses an empty WANDB_MODE.
        os.environ.pop("WANDB_MODE", None)
    elif wanted not in ("online", "offline", "disabled", "dryrun"):
        raise UserError(f"WANDB_MODE is {wanted}; set it to online, offline or disabled, or leave it out")
    if mode == "auto":
        if wanted == "disabled":
            return "disabled", ""
        if wanted in ("offline", "dryrun"):
            return "offline", "WANDB_MODE asks for it"
    if mode in ("offline", "disabled"):
        return mode, "asked for" if mode == "offline" else ""
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = server.hostname or "api.wandb.ai"
    if not _has_key(host):
        return "offline", NO_KEY
    try:
        socket.create_connection((host, server.port or (80 if server.scheme == "http" else 443)), seconds).close()
    except OSError:
        return "offline", f"{host} does not answer"
    return "online", ""


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
