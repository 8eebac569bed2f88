"""AdamW without the import of PyTorch's compiler."""

from inspect import unwrap

import torch


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101), for a training
    loop that does not compile the optimizer.

    PyTorch wraps the five methods below to hide them from torch.compile. The first call of a
    wrapper imports torch._dynamo and sympy, which takes longer than the import of torch. So this
    class unwraps the methods. If a method has no wrapper, `unwrap` returns the method unchanged.
    """

    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    load_state_dict = unwrap(torch.optim.AdamW.load_state_dict)
    state_dict = unwrap(torch.optim.AdamW.state_dict)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
