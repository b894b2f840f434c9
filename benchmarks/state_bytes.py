"""Bytes of optimizer state per parameter, for every variant and setting, counted after two steps.

    python benchmarks/state_bytes.py

AdamW8bit is bitsandbytes's and Lion pytorch_optimizer's, where these packages are installed (the `bench` extra).
"""

import importlib.util

import torch

from hf_mars import MarsAdamW, MarsLion, MarsShampoo

SETTINGS = {
    "the default": {},
    "max_norm=1": {"max_norm": 1.0},
    "last_grad_dtype=bfloat16": {"last_grad_dtype": "bfloat16"},
    "state_dtype=bfloat16, last_grad_dtype=bfloat16": {"state_dtype": "bfloat16", "last_grad_dtype": "bfloat16"},
    "max_norm=1, state_dtype=bfloat16, last_grad_dtype=bfloat16": {
        "max_norm": 1.0,
        "state_dtype": "bfloat16",
        "last_grad_dtype": "bfloat16",
    },
    "state_dtype=float32": {"state_dtype": "float32"},
    "kahan_sum=false": {"kahan_sum": False},
    "exact=true": {"exact": True},
}


def count(make, dtype):
    """Bytes of state per parameter of one matrix of ``dtype``; blocks' scales count, single numbers do not."""
    param = torch.nn.Parameter(torch.randn(512, 512).to(dtype))
    optimizer = make([param])
    for _ in range(2):
        param.grad = 1e-3 * torch.randn_like(param)
        if getattr(optimizer, "needs_previous_point", False):
            grad, param.grad = param.grad, None
            with optimizer.previous_point():
                param.grad = grad.clone()
            param.grad = grad
        optimizer.step()
    tensors = [value for value in optimizer.state[param].values() if torch.is_tensor(value)]
    return sum(t.nbytes for t in tensors if t.numel() > 256) / param.numel()


def others():
    found = {"torch.optim.AdamW": torch.optim.AdamW, "torch.optim.Muon": torch.optim.Muon}
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer import Lion

        found["pytorch_optimizer.Lion"] = Lion
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit

        found["bitsandbytes AdamW8bit"] = AdamW8bit
    return found


def rows():
    """(name, settings, bytes for float32 parameters, bytes for bfloat16 parameters)."""
    dtypes = (torch.float32, torch.bfloat16)
    for name, cls in others().items():
        yield (name, "", *(count(cls, dtype) for dtype in dtypes))
    for cls in (MarsAdamW, MarsLion, MarsShampoo):
        for title, settings in SETTINGS.items():
            counts = [count(lambda params, c=cls, s=settings: c(params, **s), dtype) for dtype in dtypes]
            yield (cls.__name__, title, *counts)


def main():
    print("| optimizer | settings | float32 parameters | bfloat16 parameters |\n| --- | --- | --- | --- |")
    for name, title, wide, narrow in rows():
        print(f"| {name} | {title} | {wide:.4g} | {narrow:.4g} |")


if __name__ == "__main__":
    main()
