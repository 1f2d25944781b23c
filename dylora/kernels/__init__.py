"""How the routed update is computed: three ways to one meaning, and the rule that chooses.

    y += Σ_e g_e · s_e · B_e A_e x

wide      every expert for every token (`wide.py`): two products, the gate folded into the rank axis
          between them.
grouped   mature experts only where they are chosen (`grouped.py`): tokens sorted by expert, grouped
          products.
gathered  a handful of tokens without gradient: the rows of the chosen experts are looked up
          (`packed.py`, which also has the wide way of a few tokens).

Immature experts are mixed for every token, so beside the last two they go the wide way.

With a gradient an update has two steps. What enters a projection is computed once for all that
share its input (q, k and v): h = x Aᵀ, and in backward the whole gradient of x, the frozen
projections' part included (`taken.py`). What leaves it, B (g·s·h), is added into the base's output
in place. Both do by hand what autograd would do, to keep less (x once, h, and the gates), to add
instead of making a second tensor, and to compute no gradient of frozen experts.

Shape letters: T tokens, D input width, O output width, E experts, R rank, C columns (E·R summed
over stacks), K top-k, P pairs of a token and an expert (T·K).
"""
