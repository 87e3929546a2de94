from __future__ import annotations

import pytest
import torch
from torch import nn

from stack.parallel.ema import Ema, EmaConfig
from stack.parallel.engine import LocalEngine, OptimConfig, ParallelConfig, parameter_groups
from stack.parallel.zero import deepspeed_config


def test_a_step_is_clipped_adamw():
    torch.manual_seed(0)
    network, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    twin.load_state_dict(network.state_dict())
    config = OptimConfig(lr=0.01, weight_decay=0.1, clip=0.5)
    engine = LocalEngine(network, config, ParallelConfig(accumulate=2), torch.device("cpu"))
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=config.betas, eps=config.eps, weight_decay=0.1)
    for step in range(5):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) * 10
        for half in x.chunk(2):
            engine.backward(network(half).square().mean())
        info = engine.step(0.01)
        twin(x).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        adamw.step()
        adamw.zero_grad()
        assert info.grad_norm == pytest.approx(float(norm), rel=1e-5)
        torch.testing.assert_close(network.weight, twin.weight)


def test_bf16_weights_follow_fp32_masters():
    """Steps too small for bf16 add up in the masters."""
    network = nn.Linear(2, 1, bias=False)
    nn.init.ones_(network.weight)
    parallel = ParallelConfig(precision="bf16")
    engine = LocalEngine(network, OptimConfig(lr=1e-4, weight_decay=0.0), parallel, torch.device("cpu"))
    for _ in range(60):
        engine.backward(network(torch.ones(1, 2, dtype=torch.bfloat16)).float().mean())
        engine.step(1e-4)
    assert network.weight.dtype == torch.bfloat16
    (partition,) = engine.partitions
    torch.testing.assert_close(partition.master, torch.full((2,), 1 - 60e-4), rtol=1e-4, atol=0)
    torch.testing.assert_close(network.weight.detach().float().view(-1), partition.master, rtol=4e-3, atol=0)


def test_weight_decay_goes_by_the_modules_tags():
    from stack.nn.linear import Linear

    decayed, rest = parameter_groups(Linear(4, 3), OptimConfig(weight_decay=0.3))
    assert ([p.ndim for p in decayed["params"]], decayed["weight_decay"]) == ([2], 0.3)
    assert ([p.ndim for p in rest["params"]], rest["weight_decay"]) == ([1], 0.0)


def test_the_average_forgets_its_start_and_then_decays():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    engine = LocalEngine(network, OptimConfig(), ParallelConfig(), torch.device("cpu"))
    ema = Ema(engine, EmaConfig(decay=0.9))
    nn.init.ones_(network.weight)
    expected = 0.0
    for step in range(1, 200):
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
    (value,) = ema.gathered().values()
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_deepspeed_knows_every_key_of_its_configuration():
    """It takes misspelt keys without a word, so ours are held against its own names."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = deepspeed_config(OptimConfig(), ParallelConfig(zero_stage=3), 4, bf16=True)
    known = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    assert set(config) - {"zero_optimization"} <= known | {"bf16"}
    assert set(config["zero_optimization"]) <= set(DeepSpeedZeroConfig.model_fields)
    assert set(config["bf16"]) <= set(DeepSpeedBF16Config.model_fields)
