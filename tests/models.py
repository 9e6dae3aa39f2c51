"""Models that several test files share."""

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule


class Classifier(PyroModule):
    """A network whose outputs are logits, with a prior put on it by hand or by bayesianize."""

    def __init__(self, net, num_data=None):
        super().__init__()
        self.net = net
        self.num_data = num_data

    def forward(self, x, y=None):
        logits = pyro.deterministic("logits", self.net(x))
        with pyro.plate("data", self.num_data or len(x), subsample_size=len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


class Regression(PyroModule):
    """A network whose only output is the mean of unit-variance observations."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y=None):
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
