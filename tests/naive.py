"""Slow and obvious implementations that the library is checked against."""

import math

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample


def unit(g, eps=1e-12):
    """Gradient over its length, typed out."""
    return g / torch.sqrt((g * g).sum(-1, keepdim=True) + eps**2)


def bandwidth(r, per):
    """Median heuristic by sorting, point by point: (point, particle) one per second particle."""
    count, num_points = r.shape[:2]
    h = torch.zeros(num_points, count, dtype=r.dtype)
    for b in range(num_points):
        d = torch.stack([((r[i, b] - r[:, b]) ** 2).sum(-1) for i in range(count)])
        for j in range(count):
            values = d.flatten() if per == "point" else d[:, j]
            values = values.sort().values
            n = len(values)
            median = (values[(n - 1) // 2] + values[n // 2]) / 2
            h[b, j] = median / (2 * math.log(count))
    return h


def heat_error(x, h):
    """h^(D+2) sum_k lambda(x_k)^2 of the density estimate, all derivatives by autograd."""
    dimension = x.shape[1]

    def q(y, centres):
        kernels = torch.exp(-((y - centres) ** 2).sum(-1) / (2 * h))
        return h ** (-dimension / 2) * kernels.sum()

    score = torch.stack([torch.func.grad(lambda y: q(y, x).log())(point) for point in x])
    total = torch.zeros((), dtype=x.dtype)
    for point in x:
        laplacian = torch.func.jacrev(torch.func.grad(lambda y: q(y, x)))(point).trace()
        by_centres = torch.func.grad(lambda centres, point=point: q(point, centres))(x)
        total = total + (laplacian + (by_centres * score).sum()) ** 2
    return h ** (dimension + 2) * total


def log_kernel_sum(r, h):
    """sum_i log sum_j mean_b k(r_i, stopped r_j), by explicit differences."""
    total = torch.zeros((), dtype=r.dtype)
    for i in range(len(r)):
        inner = torch.zeros((), dtype=r.dtype)
        for j in range(len(r)):
            d = ((r[i] - r[j].detach()) ** 2).sum(-1)
            inner = inner + torch.exp(-d / (2 * h[:, j])).mean()
        total = total + inner.log()
    return total


def log_joint_of_one(model, values, transforms, args, kwargs, subsamples=None):
    """Log density, log determinant and trace of one particle, by Pyro's own handlers."""
    constrained = {name: transforms[name](value) for name, value in values.items()}
    log_det = sum(
        transforms[name].log_abs_det_jacobian(value, constrained[name]).sum()
        for name, value in values.items()
    )
    data = {**constrained, **(subsamples or {})}
    trace = poutine.trace(poutine.condition(model, data=data)).get_trace(*args, **kwargs)
    log_density = sum(
        (site["fn"].log_prob(site["value"]) * site["scale"]).sum()
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site_is_subsample(site)
    )
    return log_density, log_det, trace
