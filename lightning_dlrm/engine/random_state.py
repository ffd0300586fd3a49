"""States of the random generators that training uses, such as for dropout."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_dlrm.sharding.collectives import Ranks


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of all ranks' generators; all ranks call it together.

    Returns:
        ``cpu``, and ``cuda`` on a CUDA device: uint8 [ranks, bytes of a state].
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    ranks = Ranks()
    return {kind: torch.from_numpy(np.stack(ranks.all_gather(state.numpy()))) for kind, state in states.items()}


def restore_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the states that ``random_states`` returned; another device or more ranks draw other numbers."""
    rank = Ranks().rank
    for kind, of_ranks in states.items():
        # Older checkpoints have the state of one rank.
        of_ranks = torch.atleast_2d(of_ranks)
        state = of_ranks[rank % len(of_ranks)].clone()
        if kind == "cpu":
            torch.set_rng_state(state)
        elif device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
