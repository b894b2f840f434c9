"""How far the momentum m_t is from the full gradient: ‖m_t − ∇F(x_t)‖² of momentum, approximate and exact MARS.

    python benchmarks/exact_variance.py

prints a markdown table, in about half a minute on one CPU core. The problem is a finite sum: multinomial logistic
regression on 512 random points with noisy labels, in mini-batches of 64 drawn with replacement, trained by MarsAdamW
without its clip. Every row sees the same batches from the same start; only the correction differs. m_t is
bias-corrected, as AdamW uses it, and the error is averaged over all steps of a run.
"""

import argparse
import statistics

import torch
from torch.nn.functional import cross_entropy

from hf_mars import MarsAdamW

POINTS, DIMENSIONS, CLASSES, BATCH, STEPS, BETA1 = 512, 20, 5, 64, 200, 0.95
# (name, exact, γ); γ = 0 is plain momentum
ROWS = [("momentum", False, 0.0)]
ROWS += [(form, form == "exact", gamma) for form in ("approx", "exact") for gamma in (0.025, 0.1, 0.5, 1.0)]


def run(*, exact: bool, gamma: float, lr: float, seed: int, steps: int = STEPS) -> tuple[float, float]:
    """One training run: the mean of ‖m_t − ∇F(x_t)‖² over its steps, and the full loss F at its end."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(POINTS, DIMENSIONS, generator=generator, dtype=torch.float64)
    true_weight = torch.randn(DIMENSIONS, CLASSES, generator=generator, dtype=torch.float64)
    noise = torch.randn(POINTS, CLASSES, generator=generator, dtype=torch.float64)
    labels = (inputs @ true_weight + noise).argmax(1)
    weight = torch.nn.Parameter(torch.zeros(CLASSES, DIMENSIONS, dtype=torch.float64))
    optimizer = MarsAdamW([weight], lr=lr, betas=(BETA1, 0.99), gamma=gamma, exact=exact, max_norm=None)

    def loss(batch=slice(None)):
        return cross_entropy(inputs[batch] @ weight.T, labels[batch])

    errors = []
    for t in range(1, steps + 1):
        batch = torch.randint(POINTS, (BATCH,), generator=generator)
        full_gradient = torch.autograd.grad(loss(), weight)[0]
        if exact:
            with optimizer.previous_point():
                loss(batch).backward()
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        momentum = optimizer.state[weight]["exp_avg"] / (1 - BETA1**t)
        errors.append((momentum - full_gradient).square().sum().item())
    return statistics.fmean(errors), loss().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print(
        "Mean ± standard deviation over", arguments.seeds, "seeds of 1000 ‖m_t − ∇F(x_t)‖² (F after the last step)\n"
    )
    print("| form | γ |", " | ".join(f"lr {lr:g}" for lr in arguments.lrs), "|")
    print("| --- | --- |", " | ".join("---" for _ in arguments.lrs), "|")
    for name, exact, gamma in ROWS:
        cells = []
        for lr in arguments.lrs:
            results = [run(exact=exact, gamma=gamma, lr=lr, seed=seed) for seed in range(arguments.seeds)]
            errors, losses = ([1000 * error for error, _ in results], [loss for _, loss in results])
            spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
            cells.append(f"{statistics.fmean(errors):.1f} ± {spread:.1f} ({statistics.fmean(losses):.3f})")
        print(f"| {name} | {gamma:g} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
