"""A CUDA card that is not there: the released sizes run on it as shapes, and every operation is counted.

    fake.py       the card: fake CUDA tensors, autocast by CUDA's rules, fused attention
    backward.py   the backward pass, since PyTorch's engine refuses a device that is not there
    count.py      what was run: kernels with bytes and FLOPs, casts, copies between devices, reads by the host
    calls.py      encode, sample and guided sample of the four heads, as the policy server makes them
    steps.py      the training steps, by the learner and agents that the trainer has
    forecast.py   milliseconds of what was counted, at stated rates of a card

benchmarks/suites/operations.py prints the figures, tests/benchmarks/test_operations.py holds the budgets.
"""
