"""Pictures of predictions, uncertainty and particles, with matplotlib (extra ``plots``).

Every function draws into the axes that it is given, or into those of a new figure, and returns
them; save with ``axes.figure.savefig(...)``. Tensors may be on any device. Traces, forests and
posterior predictive checks are ArviZ's: see `to_arviz`.
"""

from pyro_fordes.plots.particles import (
    input_gradients as input_gradients,
    kernel_matrix as kernel_matrix,
    training as training,
)
from pyro_fordes.plots.predictions import (
    decision_map as decision_map,
    regression_band as regression_band,
    uncertainty_map as uncertainty_map,
)
from pyro_fordes.plots.scores import (
    corruption_curves as corruption_curves,
    ood_histograms as ood_histograms,
    reliability as reliability,
)
