"""Time of a jitted step of NumPyro's ``SVGD`` on the problem of ``step_time.py``.

It needs an interpreter with numpyro (``pip install numpyro``), not pyro_fordes, and prints one
line of JSON: seconds per step by the clock and of the processor (lower quartile of the rounds),
seconds until the first step is compiled, and versions. The kernel is NumPyro's default, one RBF
between whole particles; arithmetic is single precision on one core. ``step_time.py --numpyro
PYTHON`` runs it.
"""

import argparse
import itertools
import json
import os
import time

# Both before jax is loaded, which counts the cores at once.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax
import numpyro
import numpyro.distributions as dist
from jax import numpy as jnp
from numpyro.contrib.einstein import SVGD, RBFKernel
from numpyro.infer import init_to_uniform


def make_model(sizes: list[int], num_data: int):
    """The Bayesian MLP, with standard Normal priors."""

    def model(x, y):
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            weight = numpyro.sample(
                f"{i}.weight", dist.Normal(0.0, 1.0).expand([fan_out, fan_in]).to_event(2)
            )
            bias = numpyro.sample(f"{i}.bias", dist.Normal(0.0, 1.0).expand([fan_out]).to_event(1))
            x = (x if i == 0 else jax.nn.relu(x)) @ weight.T + bias
        with numpyro.plate("data", num_data, subsample_size=len(y)):
            numpyro.sample("y", dist.Categorical(logits=x), obs=y)

    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of a step of NumPyro's SVGD.")
    parser.add_argument("--particles", type=int, default=10)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 100, 100, 10])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--num-data", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    options = parser.parse_args()

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (options.batch, options.sizes[0]))
    y = jax.random.randint(keys[1], (options.batch,), 0, options.sizes[-1])
    svgd = SVGD(
        make_model(options.sizes, options.num_data),
        numpyro.optim.Adam(1e-3),
        RBFKernel(),
        num_stein_particles=options.particles,
        # About the range in which torch starts a layer of 100 inputs.
        guide_kwargs={"init_loc_fn": init_to_uniform(radius=0.1)},
    )
    state = svgd.init(keys[2], x, y)
    update = jax.jit(svgd.update)
    start = time.perf_counter()
    state, _ = jax.block_until_ready(update(state, x, y))
    compiled = time.perf_counter() - start
    walls, cpus = [], []
    for _ in range(options.rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(options.steps):
            state, _ = update(state, x, y)
        jax.block_until_ready(state)
        cpus.append((time.process_time() - cpu) / options.steps)
        walls.append((time.perf_counter() - wall) / options.steps)
    particles = jax.tree.leaves(svgd.get_params(state))
    assert all(value.dtype == jnp.float32 and jnp.isfinite(value).all() for value in particles)
    assert {len(value) for value in particles} == {options.particles}
    found = {
        "wall": sorted(walls)[options.rounds // 4],
        "cpu": sorted(cpus)[options.rounds // 4],
        "compile": compiled,
        "weights": sum(value[0].size for value in particles),
        "versions": f"numpyro {numpyro.__version__}, jax {jax.__version__}",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
