"""Contract: our numbers are FuxiCTR's, for every file of shared/golden_fuxictr and of the folders in PARITY_DIR."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.folders import cases
from tests.parity.fuxictr import Case

CASES = cases("fuxictr_*.npz")
if not CASES:
    pytest.skip("FuxiCTR's golden files lie in ../shared/golden_fuxictr, which is not here", allow_module_level=True)


def files(kind: str) -> list[Path]:
    return [path for path in CASES if ("_fit_" in path.stem) == (kind == "fit")]


def close(name: str, ours: Tensor, theirs: Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
    ours, theirs = ours.detach(), theirs.to(ours.dtype)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("path", files("train"), ids=lambda path: path.stem)
def test_training_run(path: Path) -> None:
    case = Case(path)
    module = case.module()
    network, arrays = module.network, case.arrays
    optimizer = module.make_optimizer(network)
    places, noisy = case.places(network), case.noisy(network)
    losses, totals, norms, probabilities = [], [], [], []
    for step in range(case.meta["steps"]):
        optimizer.zero_grad()
        batch = case.batch("", step)
        logits = module(batch)
        loss = module.batch_loss(logits, batch.label) / len(batch)
        total = loss + module.penalty()
        total.backward()
        losses.append(loss.detach())
        totals.append(torch.as_tensor(total).detach())
        norms.append(optimizer.gradient_norm())
        probabilities.append(logits.detach().sigmoid())
        if step == 0:
            for name, (tensor, view, change) in places.items():
                if f"first_grad/{name}" in arrays and id(tensor) not in noisy:
                    expected = change(arrays[f"first_grad/{name}"])
                    close(name, view(tensor.grad), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-9)
        optimizer.clip_gradient_norm(case.meta["max_gradient_norm"])
        optimizer.step()
    close("losses", torch.stack(losses), arrays["losses"], rtol=1e-5)
    close("total_losses", torch.stack(totals), arrays["total_losses"], rtol=1e-5)
    close("grad_norms", torch.stack(norms), arrays["grad_norms"], rtol=1e-5)
    close("first_probability", probabilities[0], arrays["first_probability"], atol=1e-6)
    close("last_probability", probabilities[-1], arrays["last_probability"], atol=1e-5)
    by_noise = 3e-5 if case.meta["net_regularizer"] else case.meta["optimizer"]["lr"] * case.meta["steps"]
    for name, (tensor, view, change) in places.items():
        close(name, view(tensor), change(arrays[f"final/{name}"]), atol=by_noise if id(tensor) in noisy else 1e-5)

    case.load(network, "final")
    with torch.no_grad():
        probability = module.eval()(case.batch("eval_", slice(None))).sigmoid()
    close("eval_probability", probability, arrays["eval_probability"], atol=1e-6)
