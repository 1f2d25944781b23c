"""Sentences and cells that the terminal and the page have in common."""

from typing import Any

from dylora.evaluation.passk.estimate import wilson


def describe_routing(found: dict[str, Any]) -> str:
    """In a line: how sparse routing became, and what that saves."""
    active, shared = found["active_experts"], found["shared_experts"]
    every = found.get("experts_a_layer", found["experts"])
    parameters, used = found["parameters"], found["active_parameters"]
    told = f"a token uses {active:.2f} of {every:g} experts"
    told += f" ({shared} of them for all tokens)" if shared else ""
    if active > every - 0.005:
        return f"{told}: routing is dense"
    return (
        f"{told}, and with them {used / 1e6:.2f} of {parameters / 1e6:.2f} million parameters of "
        f"experts and routers: {1 - used / parameters:.0%} of these are not computed for it"
    )


def format_share(share: float | None, count: int) -> str:
    """A share of so many answers with its 95 % interval, in percent."""
    if share is None:
        return "-"
    if not count:
        return f"{share:.0%}"
    found = wilson(round(share * count), count)
    return f"{share:.0%} [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def format_loss(loss: float | None, half: float | None) -> str:
    """A loss in nats, and half of its 95 % interval where that is known."""
    if loss is None:
        return "-"
    return f"{loss:.3f}" + ("" if half is None else f" ±{half:.3f}")
