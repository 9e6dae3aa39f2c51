"""Models written by others, run unmodified: Pyro's examples, tests, tutorials, Stan translations.

Nothing of theirs is in this repository. Models are imported from a checkout of ``pyro-ppl/pyro``
(and, if given, of ``pyro-ppl/pyro-models``), and called with data made here or by the file itself:
where a model is local to a test or a ``main``, that function runs until it hands its model and data
to SVI, NUTS or HMC, and the particles take over from there. Modules that only plot or download are
replaced by stand-ins if they are not installed.

Each model runs with three update rules; a cell shows the loss of the first and of the last steps.
A model that fails so is run once more with the options of its entry, if it has some; the table
shows both.

Run as ``python benchmarks/others_models.py PYRO [--pyro-models PATH]``; prints a Markdown table.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import math
import runpy
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.forecast import Forecaster
from pyro.infer import HMC, MCMC, NUTS, SVI
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_fordes import RBF, SVGD, WGD, FordesError, ParticleInference, Weights

PARTICLES = 20
RULES = {
    "WGD()": WGD(),
    'WGD("sge", whiten="diag", calibrate=True)': WGD("sge", whiten="diag", calibrate=True),
    "SVGD()": SVGD(),
}
FALLS_NOT = " (does not fall)"
STAND_INS = ("wget", "visdom", "seaborn", "horovod", "sklearn.manifold")


@dataclass(frozen=True)
class Model:
    """A model with the arguments of its call."""

    function: Callable[..., Any]
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A model of others: its name, file, how to get it, and options for a second try."""

    name: str
    file: str
    build: Callable[[ModuleType], Model]
    options: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- getting at the models


def load(root: Path, file: str) -> ModuleType:
    """Import a file of a checkout: as part of the package ``tests``, or as a script is."""
    path = root / file
    if path.suffix == ".ipynb":
        return notebook(path)
    if file.startswith("tests/"):
        return importlib.import_module(file.removesuffix(".py").replace("/", "."))
    sys.path.insert(0, str(path.parent))
    try:
        for name in ("data", "utils", "util"):  # names that examples of several folders share
            sys.modules.pop(name, None)
        spec = importlib.util.spec_from_file_location("others_" + path.stem.replace("-", "_"), path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        with redirect_stdout(StringIO()):
            spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))


def notebook(path: Path) -> ModuleType:
    """The classes and functions of a notebook, with Pyro's usual names; no cell runs."""
    module = ModuleType(path.stem)
    vars(module).update(
        pyro=pyro, dist=dist, torch=torch, nn=nn, PyroModule=PyroModule, PyroSample=PyroSample
    )
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        try:
            tree = ast.parse("".join(cell["source"]))
        except SyntaxError:  # a cell with notebook magic
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                code = compile(ast.Module([node], []), path.name, "exec")
                try:
                    exec(code, vars(module))
                except NameError:  # built on a name of another cell
                    continue
    return module


class Caught(BaseException):
    """Carries a model out of the code that was about to run an inference on it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model


class Catcher:
    """Stands in for SVI, MCMC and their kernels."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self.model = model.model if isinstance(model, Catcher) else model

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Hand out the model."""
        raise Caught(Model(self.model, args, kwargs))

    run = step


def caught(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Model:
    """The model and data that a function hands to an inference of Pyro."""
    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            for cls in (SVI, MCMC, NUTS, HMC):
                if vars(module).get(cls.__name__) is cls and module.__name__ != __name__:
                    stack.enter_context(mock.patch.object(module, cls.__name__, Catcher))
        try:
            with redirect_stdout(StringIO()):
                function(*args, **kwargs)
        except Caught as found:
            return found.model
    raise RuntimeError(f"{function.__name__} ran no inference")


def call(function: str, /, *args: Any, **kwargs: Any) -> Callable[[ModuleType], Model]:
    """Catch the model of a module's function."""
    return lambda module: caught(getattr(module, function), *args, **kwargs)


def model(
    name: str, data: Callable[[ModuleType], tuple], **kwargs: Any
) -> Callable[[ModuleType], Model]:
    """A function of a module, with positional arguments made from the module."""
    return lambda module: Model(getattr(module, name), data(module), kwargs)


# ---------------------------------------------------------------- data of ours


def hits(_: ModuleType) -> tuple:
    at_bats = torch.full((18,), 45.0)
    return at_bats, dist.Binomial(45, 0.2 + 0.1 * torch.rand(18)).sample()


def captures(_: ModuleType) -> tuple:
    return (torch.rand(30, 5) < 0.5).float(), (torch.rand(30) < 0.5).float()


def tunes(module: ModuleType) -> tuple:
    settings = SimpleNamespace(hidden_dim=3, nn_dim=8, nn_channels=2, jit=False)
    return (torch.rand(4, 5, 6) < 0.2).float(), torch.tensor([5, 5, 4, 3]), settings


def documents(_: ModuleType) -> tuple:
    settings = SimpleNamespace(num_topics=3, num_words=12, num_docs=10, num_words_per_doc=8)
    return torch.randint(12, (8, 10)), settings


def sparse_regression(module: ModuleType) -> Model:
    x, y, *_ = module.get_data(N=20, P=8, S=3, Q=2)
    names = ("alpha1", "beta1", "alpha2", "beta2", "alpha3", "c", "expected_sparsity")
    return Model(
        module.model, (x, y, dict(zip(names, (3.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0), strict=True)))
    )


def sir(name: str) -> Callable[[ModuleType], Model]:
    def build(module: ModuleType) -> Model:
        settings = SimpleNamespace(population=100, recovery_time=7.0)
        module.args = settings
        return Model(getattr(module, name), (settings, torch.tensor([1.0, 2.0, 4.0, 6.0, 5.0])))

    return build


def dmm(module: ModuleType) -> Model:
    net = module.DMM(input_dim=6, z_dim=3, emission_dim=8, transition_dim=8, rnn_dim=8)
    tunes = (torch.rand(3, 4, 6) < 0.3).float()
    return Model(net.model, (tunes, tunes, torch.ones(3, 4), torch.tensor([4, 4, 4])))


def sparse_gamma(module: ModuleType) -> Model:
    net = module.SparseGammaDEF()
    net.top_width, net.mid_width, net.bottom_width, net.image_size = 5, 4, 3, 16
    return Model(net.model, (torch.randint(0, 5, (6, 16)).float(),))


def regression_module(module: ModuleType) -> Model:
    x = torch.randn(60)
    return Model(module.Model(60), (x, 1 + 2 * x + 0.3 * torch.randn(60)))


def vae(module: ModuleType) -> Model:
    return Model(module.VAE(z_dim=3, hidden_dim=16).model, (torch.rand(8, 1, 28, 28),))


def labelled_vae(module: ModuleType) -> Model:
    net = module.SSVAE(z_dim=3, hidden_layers=[16])
    return Model(net.model, (torch.rand(8, 784), torch.eye(10)[:8]))


def mixture(module: ModuleType) -> Model:
    prior, _, data = module.generate_data(20)
    return Model(module.model, (prior, data, 20))


def bart(module: ModuleType) -> Model:
    data = torch.randn(24 * 7 * 2, 2)
    return caught(Forecaster, module.Model(), data, torch.zeros(len(data), 0))


def forecast(name: str) -> Callable[[ModuleType], Model]:
    return lambda module: caught(
        Forecaster, getattr(module, name)(), torch.randn(7, 2), torch.zeros(7, 0)
    )


def gaussian_process(index: int) -> Callable[[ModuleType], Model]:
    return lambda module: caught(module.test_hmc, *module._TEST_CASES()[index])


def deep_gp(module: ModuleType) -> Model:
    def train(gp: Any, num_steps: int) -> None:
        raise Caught(Model(gp.model))

    with mock.patch.object(module, "train", train):
        return caught(module.test_inference_deepGP)


def chain(module: ModuleType) -> Model:
    fixture = module.GaussianChain(dim=5, chain_len=4, num_obs=5)
    return Model(fixture.model, (fixture.data,))


def walks(_: ModuleType) -> tuple:
    return (torch.rand(8, 50) < 0.5) * 1.0, torch.arange(50), 50


def some_walks(_: ModuleType) -> tuple:
    return (torch.rand(8, 20) < 0.5) * 1.0, torch.arange(20), 50


def rugged(module: ModuleType) -> Model:
    x = torch.randn(50, 3)
    return Model(
        module.BayesianRegression(3, 1), (x, x @ torch.tensor([1.0, -1.0, 0.5]) + torch.randn(50))
    )


UNIFORM = {"init_loc_fn": init_to_uniform(radius=0.5)}
LOOP = {"vectorize": "loop"}
GP_TESTS, NUTS_TESTS = "tests/contrib/gp/test_models.py", "tests/infer/mcmc/test_nuts.py"
HMC_TESTS, GUIDE_TESTS = "tests/infer/mcmc/test_hmc.py", "tests/infer/test_autoguide.py"
FORECASTS, FUNNEL = (
    "tests/contrib/forecast/test_forecaster.py",
    "tests/infer/reparam/test_neutra.py",
)
BASEBALL, CJS = "examples/baseball.py", "examples/capture_recapture/cjs.py"

CASES = [
    Case(
        "eight schools",
        "examples/eight_schools/mcmc.py",
        lambda m: Model(m.conditioned_model, (m.model, m.data.sigma, m.data.y)),
    ),
    Case(
        "eight schools, centred",
        "examples/eight_schools/svi.py",
        model("model", lambda m: (m.data,)),
    ),
    Case("baseball, fully pooled", BASEBALL, model("fully_pooled", hits)),
    Case("baseball, not pooled", BASEBALL, model("not_pooled", hits)),
    Case("baseball, partially pooled", BASEBALL, model("partially_pooled", hits), UNIFORM),
    Case("baseball, logits", BASEBALL, model("partially_pooled_with_logit", hits)),
    Case("LKJ correlations", "examples/lkj.py", model("model", lambda _: (torch.randn(100, 3),))),
    Case(
        "LKJ correlations, double",
        "examples/lkj.py",
        model("model", lambda _: (torch.randn(100, 3).double(),)),
    ),
    Case("banana", "examples/neutra.py", model("model", lambda _: (1.15, 1.0)), UNIFORM),
    Case("sparse kernel regression", "examples/sparse_regression.py", sparse_regression, UNIFORM),
    Case("SIR, vectorised", "examples/sir_hmc.py", sir("vectorized_model"), LOOP),
    Case("SIR, enumerated", "examples/sir_hmc.py", sir("continuous_model")),
    Case(
        "minipyro",
        "examples/minipyro.py",
        call("main", SimpleNamespace(backend="pyro", jit=False, learning_rate=0.02, num_steps=1)),
    ),
    Case("deep Markov model", "examples/dmm.py", dmm),
    Case("sparse gamma DEF", "examples/sparse_gamma_def.py", sparse_gamma, UNIFORM),
    Case("regression module", "examples/svi_torch.py", regression_module),
    Case("VAE", "examples/vae/vae.py", vae),
    Case("VAE, labels given", "examples/vae/ss_vae_M2.py", labelled_vae),
    Case("BART forecast", "examples/contrib/forecast/bart.py", bart, LOOP | UNIFORM),
    Case(
        "inclined plane",
        "examples/inclined_plane.py",
        model("model", lambda m: (m.observed_data,)),
        LOOP,
    ),
    Case("topics (LDA)", "examples/lda.py", model("model", documents)),
    Case("HMM, enumerated", "examples/hmm.py", model("model_1", tunes)),
    Case("HMM, DiscreteHMM", "examples/hmm.py", model("model_7", tunes), LOOP),
    Case("capture-recapture 1", CJS, model("model_1", captures)),
    Case("capture-recapture 5", CJS, model("model_5", captures)),
    Case("discrete network", "examples/toy_mixture_model_discrete_enumeration.py", mixture),
    Case("logistic regression", NUTS_TESTS, call("test_logistic_regression", False, True)),
    Case("Beta-Bernoulli", NUTS_TESTS, call("test_beta_bernoulli", 0.1, False, False, False)),
    Case("Gamma-Normal", NUTS_TESTS, call("test_gamma_normal", False, True), UNIFORM),
    Case("Dirichlet-Categorical", NUTS_TESTS, call("test_dirichlet_categorical", False)),
    Case("Gamma-Beta", NUTS_TESTS, call("test_gamma_beta", False)),
    Case("Gaussian mixture", NUTS_TESTS, call("test_gaussian_mixture_model", False)),
    Case("Bernoulli latents", NUTS_TESTS, call("test_bernoulli_latent_model", False)),
    Case("Gaussian HMM", NUTS_TESTS, call("test_gaussian_hmm", 3)),
    Case("Beta-Binomial, collapsed", NUTS_TESTS, call("test_beta_binomial", True), LOOP),
    Case("Gamma-Poisson, collapsed", NUTS_TESTS, call("test_gamma_poisson", True)),
    Case("observed latents", NUTS_TESTS, call("test_structured_mass")),
    Case("Gaussian chain", HMC_TESTS, chain),
    Case(
        "logistic regression, pyro.param",
        HMC_TESTS,
        call("test_logistic_regression", 0.1, None, 1, False, False, False),
    ),
    Case("Neal's funnel", FUNNEL, model("neals_funnel", lambda _: (10,))),
    Case("GP regression", GP_TESTS, gaussian_process(0)),
    Case("GP regression, 4 outputs", GP_TESTS, gaussian_process(1)),
    Case("sparse GP regression", GP_TESTS, gaussian_process(2), {"lr": 1e-5}),
    Case("variational GP", GP_TESTS, gaussian_process(4)),
    Case("variational sparse GP", GP_TESTS, gaussian_process(6)),
    Case("deep GP", GP_TESTS, deep_gp, {"lr": 1e-3}),
    Case("forecast, Laplace noise", FORECASTS, forecast("Model0")),
    Case("forecast, GaussianHMM", FORECASTS, forecast("Model3")),
    Case("forecast, stable LinearHMM", FORECASTS, forecast("Model4"), LOOP),
    Case(
        "SIR, compartmental",
        "tests/contrib/epidemiology/test_models.py",
        call("test_simple_sir_smoke", 7, 0, {}, "svi"),
    ),
    Case(
        "profile HMM",
        "tests/contrib/mue/test_models.py",
        call("test_ProfileHMM_smoke", False),
        LOOP,
    ),
    Case(
        "factor MuE",
        "tests/contrib/mue/test_models.py",
        call("test_FactorMuE_smoke", False, "Normal", False, False, False),
        LOOP,
    ),
    Case(
        "CEVAE",
        "tests/contrib/cevae/test_cevae.py",
        call("test_smoke", 20, 2, "normal"),
        {"lr": 1e-3},
    ),
    Case("easyguide", "tests/contrib/easyguide/test_easyguide.py", model("model", walks)),
    Case(
        "easyguide, minibatch",
        "tests/contrib/easyguide/test_easyguide.py",
        model("model", some_walks),
    ),
    Case("PyroModule with parameters", "tests/nn/test_module.py", call("test_svi_smoke")),
    Case(
        "linear regression module",
        GUIDE_TESTS,
        lambda m: caught(m.test_linear_regression_smoke, m.AutoDelta, m.Trace_ELBO),
    ),
    Case("subsampled plate", GUIDE_TESTS, lambda m: caught(m.test_subsample_model, m.AutoDelta)),
    Case("Bayesian regression", "tutorial/source/bayesian_regression.ipynb", rugged),
]

TRANSLATED = [
    "arm.kidiq_interaction", "arm.kidscore_momiq", "arm.mesquite", "arm.radon_intercept",
    "arm.radon_chr", "arm.electric_chr", "arm.hiv_chr", "arm.pilots_ch13", "arm.wells_dist100",
    "arm.multilevel_logistic", "arm.earnings_latin_square_chr", "arm.anova_radon_nopred",
    "bugs.litter", "bugs.pump", "bugs.dyes", "bugs.lsat", "bugs.beetles_probit",
    "misc.eight_schools", "misc.irt", "misc.irt_multilevel", "misc.ma2",
]  # fmt: skip


def translated(root: Path, name: str) -> Callable[[ModuleType], Model]:
    """A Stan model as pyro-models has it, with the data that lie beside it."""

    def build(module: ModuleType) -> Model:
        file = root / "pyro_models" / (name.replace(".", "/") + ".py")
        entry = {"module": module, "data_file": f"{file}.json"}
        data = runpy.run_path(str(root / "pyro_models" / "utils.py"))["data"](entry)
        # Parameters of Stan's first block are sampled in init_params, as their loader has it.
        return Model(lambda data: module.model(data, module.init_params(data)), (data,))

    return build


# ---------------------------------------------------------------- running them


def too_long(*_: Any) -> None:
    raise TimeoutError("took too long")


def attempt(
    build: Callable[[], Model], rule: Any, steps: int, limit: int, lr: float = 0.05, **options: Any
) -> str:
    """Losses of a run, or ``failed: `` and why."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(limit)
    try:
        found = build()
        inference = ParticleInference(
            found.function,
            pyro.optim.Adam({"lr": lr}),
            PARTICLES,
            kernel=RBF(Weights()),
            transport=rule,
            seed=0,
            **options,
        )
        losses = inference.run(steps, *found.args, progress_bar=False, **found.kwargs)
    except Exception as error:
        text = " ".join(str(error).split())
        kind = type(error).__name__
        return f"failed: {kind if isinstance(error, FordesError) else 'not ours: ' + kind}: {text}"
    finally:
        signal.alarm(0)
    block = max(1, steps // 10)
    first, last = losses[:block].mean().item(), losses[-block:].mean().item()
    finite = losses.isfinite().all() and all(
        value.isfinite().all() for value in inference.get_samples().values()
    )
    if not finite or math.isnan(last):
        return "failed: silently: values that are not finite"
    return f"{first:.4g} to {last:.4g}" + ("" if last < first else FALLS_NOT)


def run_case(case: Case, build: Callable[[], Model], steps: int, limit: int) -> str:
    """A row of the table."""
    cells, notes = [], []
    for rule in RULES.values():
        cell = attempt(build, rule, steps, limit)
        if cell.startswith("failed: "):
            note = cell.removeprefix("failed: ")[:300]
            if note not in notes:
                notes.append(note)
            cell = "no"
        if case.options and (cell == "no" or FALLS_NOT in cell):
            again = attempt(build, rule, steps, limit, **case.options)
            if again.startswith("failed: "):
                again, note = "no", again.removeprefix("failed: ")[:300]
                if note not in notes:
                    notes.append(note)
            cell += f"; with {', '.join(case.options)}: {again}"
        cells.append(cell)
    row = [case.name, f"`{case.file}`", *cells, "; ".join(notes).replace("|", r"\|")]
    return "| " + " | ".join(row) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pyro", type=Path, help="a checkout of pyro-ppl/pyro")
    parser.add_argument("--pyro-models", type=Path, help="a checkout of pyro-ppl/pyro-models")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--limit", type=int, default=60, help="seconds for a run")
    parser.add_argument("--only", default="", help="run the cases whose name or file has this")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in STAND_INS:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            sys.modules[name] = mock.MagicMock(__name__=name, __spec__=None)
    # Two names of a package for Python 2, which old examples import; a stand-in is no ModuleType.
    sys.modules.setdefault("six", SimpleNamespace(string_types=(str,)))  # type: ignore[arg-type]
    # In front, so that `tests` is theirs; Pyro is imported by now and stays the installed one.
    sys.path.insert(0, str(options.pyro.resolve()))

    cases = [(case, options.pyro, case.build) for case in CASES]
    for name in TRANSLATED if options.pyro_models else ():
        file = f"pyro_models/{name.replace('.', '/')}.py"
        build = translated(options.pyro_models, name)
        cases.append((Case(name, file, build, UNIFORM), options.pyro_models, build))
    print("| model | file | " + " | ".join(f"`{rule}`" for rule in RULES) + " | what failed |")
    print("|---" * (len(RULES) + 3) + "|")
    started = time.perf_counter()
    for case, root, build in cases:
        if options.only in f"{case.name} {case.file}":
            # The conftest of Pyro's tests sets double precision.
            torch.set_default_dtype(torch.float64 if "tests/" in case.file else torch.float32)
            row = run_case(
                case,
                lambda case=case, root=root, build=build: build(load(root, case.file)),
                options.steps,
                options.limit,
            )
            print(row, flush=True)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
