"""The likelihood judge: under which constitution does the frozen initial model find the response likelier? The training
objective restated: a diagnostic, never the headline.
"""

from collections.abc import Sequence
from math import exp, log


def likelihood_score(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """1 where the frozen initial model gives `ours` a higher posterior of the first constitution than `theirs`.

    Each is one response's length-normalised log-probs under the C constitutions [C], the judged one first. Equal
    posteriors tie at 0.5.
    """
    def posterior(column):  # log of the softmax's first entry
        top = max(column)
        return column[0] - top - log(sum(exp(x - top) for x in column))

    a, b = posterior(ours), posterior(theirs)
    return 0.5 + 0.5 * ((a > b) - (a < b))
