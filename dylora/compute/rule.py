"""The rule that chooses the way."""

# Measured by experiments/speed/benchmark.py --section sparse (numbers in docs/performance.md): the
# grouped way wins where a token leaves out enough experts and there are tokens to fill its products
# (on CUDA not measured: an estimate); looking rows up wins where reading all experts costs more.
GROUPED_FROM = {"cpu": 4.0, "cuda": 16.0}  # mature experts per place of the top-k
GROUPED_TOKENS = 64
GATHERED_TOKENS = 16
GATHERED_FROM = 32.0


def choose_way(*, tokens: int, mature: int, top_k: int, needs_grad: bool, device: str) -> str:
    """wide, grouped or gathered, from what is known without looking at the gates.

    Args:
        tokens: T of this pass.
        mature: how many experts only their chosen tokens use.
        top_k: how many of those a token may use.
        needs_grad: whether a backward pass follows.
    """
    if mature <= top_k:
        return "wide"
    per_place = mature / top_k
    if not needs_grad and tokens <= GATHERED_TOKENS:
        return "gathered" if per_place >= GATHERED_FROM else "wide"
    threshold = GROUPED_FROM.get(device, GROUPED_FROM["cuda"])
    if tokens >= GROUPED_TOKENS and per_place >= threshold:
        return "grouped"
    return "wide"
