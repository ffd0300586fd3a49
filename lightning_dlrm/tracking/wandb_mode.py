"""Whether a run goes to W&B's server: decided without loading W&B, which takes long."""

import netrc
import os
import socket
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from lightning_dlrm.contracts.errors import UserError

Mode = Literal["auto", "online", "offline", "disabled"]


def choose_mode(mode: Mode, seconds: float = 3.0) -> tuple[Literal["online", "offline", "disabled"], str]:
    """Whether the run goes online, and why not.

    W&B itself would prompt for a missing key and wait minutes for a missing network, so this is
    decided before it starts.

    Args:
        mode: ``auto`` goes online where there is a key and the server answers; WANDB_MODE, where
            set, takes the place of ``auto``.
        seconds: how long the server may take to answer.

    Returns:
        The mode, and the reason for ``offline`` in a few words.

    Raises:
        UserError: WANDB_MODE is none of W&B's modes.
    """
    wanted = os.environ.get("WANDB_MODE", "").lower()
    if not wanted:
        # W&B takes an empty one for a wrong one.
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
        return "offline", "no API key"
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
