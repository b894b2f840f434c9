"""torch.compile over step(): one graph, the results of the plain step to rounding."""

import pytest
import torch
from helpers import METHODS, assert_close, make_gradients, make_params, values

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("max_norm", [1.0, None])
@pytest.mark.parametrize("method", ["mars_adamw", "mars_lion", "mars_shampoo"])
def test_compiled_step(method, max_norm):
    """In one graph, where torch's own AdamW needs breaks. Step 1 has no state yet, so there are two graphs."""
    cls, keywords, _ = METHODS[method]
    torch._dynamo.reset()
    finals = []
    for compiled in (False, True):
        params = make_params([(7, 4), (6,)], dtype=torch.float32)
        optimizer = cls(params, lr=0.02, weight_decay=0.1, gamma=0.2, max_norm=max_norm, **keywords)
        step = torch.compile(optimizer.step, fullgraph=True) if compiled else optimizer.step
        for gradients in make_gradients(params, 4, scales=(0.05, 1.0)):
            for p, g in zip(params, gradients, strict=True):
                p.grad = g.clone()
            step()
        finals.append(values(params))
    assert_close(*finals, 1e-5 if method == "mars_shampoo" else 1e-6)


# With fullgraph the error is the compiler's, which names the function that would have raised ours.
NO_COMPILED_CLIP = (
    r"clip_grad_norm_\(\) (before a compiled step\(\)|of a MARS optimizer cannot be compiled)|refuse_to_compile"
)
COMPILERS = pytest.mark.parametrize("keywords", [{}, {"fullgraph": True}, {"backend": "eager"}], ids=str)


@COMPILERS
def test_a_clip_before_a_compiled_step_is_refused(keywords):
    """The factor of this update would be every update's. A graph break would leave half of the step compiled."""
    torch._dynamo.reset()
    (param,) = params = make_params([(7, 4)], dtype=torch.float32)
    cls = METHODS["mars_adamw"][0]
    optimizer = cls(params, lr=0.02)
    param.grad = torch.ones_like(param)
    optimizer.clip_grad_norm_(1.0)
    before = param.detach().clone()
    optimizer.step = torch.compile(optimizer.step, **keywords)  # as docs/performance.md has it
    with pytest.raises(RuntimeError, match=NO_COMPILED_CLIP):
        optimizer.step()
    with pytest.raises(RuntimeError, match=NO_COMPILED_CLIP):
        torch.compile(lambda: cls.step(optimizer), **keywords)()
    optimizer.zero_grad()
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=NO_COMPILED_CLIP):
        torch.compile(lambda: (optimizer.clip_grad_norm_(1.0), cls.step(optimizer)), **keywords)()
    assert torch.equal(param, before)
    optimizer.step()
    assert not torch.equal(param, before)


@COMPILERS
def test_a_clip_after_steps_were_compiled_is_refused(keywords):
    torch._dynamo.reset()
    (param,) = params = make_params([(7, 4)], dtype=torch.float32)
    optimizer = METHODS["mars_adamw"][0](params, lr=0.02)
    step = torch.compile(optimizer.step, **keywords)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        step()
    before = param.detach().clone()
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match=NO_COMPILED_CLIP):
        step()
    assert torch.equal(param, before)
