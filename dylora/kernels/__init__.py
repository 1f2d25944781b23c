"""How the routed update is computed: kernels of one meaning, and the rule that selects one.

    y += Σ_e g_e · s_e · B_e A_e x

dense     every expert for every token (`dense.py`): two products, the gate on the rank axis between
          them.
grouped   mature experts only where they are chosen (`grouped.py`): tokens sorted by expert, grouped
          products.
gather    a handful of tokens without gradient: the rows of the chosen experts are looked up
          (`decode.py`, which has the dense kernel of a few tokens, too).

Immature experts are mixed for every token, so beside the last two they go to the dense kernel.

With a gradient an update has two steps. What enters a projection is computed once for all that
share its input (q, k and v): h = x Aᵀ, and in backward the whole gradient of x, the frozen
projections' part included (`frozen_linear.py`). What leaves it, B (g·s·h), is added into the base's
output in place. Both do by hand what autograd would do, to keep less (x once, h, and the gates), to
add instead of making a second tensor, and to compute no gradient of frozen experts.
"""
