"""The rule that chooses the way."""

# Measured by experiments/speed/benchmark.py --section sparse (numbers in docs/performance.md). The
# grouped way wins where a token leaves out enough experts, and where there is enough left out in
# all to pay for sorting: the wide way's work grows with tokens times experts, its own far less.
# Without a backward pass there is less to save. On CUDA not measured: an estimate.
GROUPED_FROM = {"cpu": 4.0, "cuda": 16.0}  # mature experts per place of the top-k
GROUPED_WORK = {True: 320, False: 800}  # tokens times those; by whether a backward pass follows
# Looking rows up wins where reading all experts costs more than to copy those of every token.
GATHERED_FROM = 32.0  # mature experts per place, and at least twice the tokens
GATHERED_TOKENS = 48  # at most


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
    few = not needs_grad and tokens <= GATHERED_TOKENS
    if few and per_place >= max(GATHERED_FROM, 2 * tokens):
        return "gathered"
    threshold = GROUPED_FROM.get(device, GROUPED_FROM["cuda"])
    pays = tokens * per_place >= GROUPED_WORK[needs_grad]
    return "grouped" if pays and per_place >= threshold else "wide"
