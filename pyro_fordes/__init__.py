"""Particle inference for Pyro: repulsive ensembles of any Pyro model's posterior."""

from pyro_fordes import (
    corruptions as corruptions,
    diagnostics as diagnostics,
    metrics as metrics,
    plots as plots,
)
from pyro_fordes._checks import (
    ArgumentError as ArgumentError,
    CheckpointError as CheckpointError,
    FordesError as FordesError,
    MissingDependencyError as MissingDependencyError,
    ModelError as ModelError,
    NumericalError as NumericalError,
    RankError as RankError,
    StateError as StateError,
)
from pyro_fordes.additive import Additive as Additive
from pyro_fordes.bandwidths import Fixed as Fixed, HeatEquation as HeatEquation, Median as Median
from pyro_fordes.bnn import bayesianize as bayesianize, init_to_modules as init_to_modules
from pyro_fordes.comparison import compare as compare
from pyro_fordes.dynamics import WAG as WAG, Langevin as Langevin, WNes as WNes
from pyro_fordes.evaluation import evaluate as evaluate
from pyro_fordes.function_spaces import Features as Features, Outputs as Outputs
from pyro_fordes.inference import ParticleInference as ParticleInference
from pyro_fordes.input_gradients import InputGradients as InputGradients
from pyro_fordes.io_arviz import to_arviz as to_arviz
from pyro_fordes.kernels import IMQ as IMQ, RBF as RBF, Mixture as Mixture
from pyro_fordes.lengthscales import (
    Lengthscale as Lengthscale,
    identity_lengthscale as identity_lengthscale,
    pca_lengthscale as pca_lengthscale,
    tuned_lengthscale as tuned_lengthscale,
)
from pyro_fordes.log_joint import LogJoint as LogJoint
from pyro_fordes.prediction import ParticlePredictive as ParticlePredictive
from pyro_fordes.schedules import (
    Constant as Constant,
    Cyclic as Cyclic,
    Inverse as Inverse,
    Linear as Linear,
    Tanh as Tanh,
)
from pyro_fordes.spaces import Weights as Weights
from pyro_fordes.trajectory import Trajectory as Trajectory
from pyro_fordes.transports import SVGD as SVGD, WGD as WGD, Ensemble as Ensemble
from pyro_fordes.tuning import tune as tune

__version__ = "0.1.0"
