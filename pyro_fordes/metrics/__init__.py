r"""How good predictions of several particles are, from tensors of theirs.

Classification takes ``log_probs``, normalised log probabilities ``(particle, point, class)``, and
``labels``, integers ``(point,)``. From logits take ``logits.log_softmax(-1)``, from probabilities
``probs.log()``; what is not normalised is refused. A probability of exactly 0 is fine.

Regression takes ``predictions``, ``(particle, point)``, and ``targets``, ``(point,)``. Each
particle predicts a number, or with ``sd`` a normal distribution around it.

The prediction that is scored is the equal mixture of the particles',
:math:`\bar p(y) = \frac1M \sum_i p_i(y)`. Logs are natural. Results are tensors on the device and
in the type of the predictions (float32 for half precision): without axes where one number describes
all points. Labels and targets may be on another device.

Scores of rankings come from scikit-learn (extra ``eval``). The others are a few lines each and need
no extra; they are tested against scikit-learn and torchmetrics.
"""

from pyro_fordes.metrics.classification import (
    Reliability as Reliability,
    accuracy as accuracy,
    brier as brier,
    ece as ece,
    nll as nll,
    reliability as reliability,
)
from pyro_fordes.metrics.regression import coverage as coverage, crps as crps, rmse as rmse
from pyro_fordes.metrics.uncertainty import (
    Detection as Detection,
    Uncertainty as Uncertainty,
    detection as detection,
    disagreement as disagreement,
    pairwise_kl as pairwise_kl,
    uncertainty as uncertainty,
)
