"""Compiled encoders compute what eager ones do, in one graph each, compiled once a kind of micro-batch."""

import pytest
import torch
from torch import nn

from moco_dist.config.pretrain import EngineConfig, ModelConfig
from moco_dist.data.views import Views
from moco_dist.engine import ddp, speed
from moco_dist.engine.optimizer import LARS
from moco_dist.method import moco
from moco_dist.method.batch_norm import GroupedBatchNorm2d, set_micro_batch
from moco_dist.method.build import build_method
from moco_dist.method.encoder import build_encoder
from tests.distributed.expected import STEPS, differences, reference
from tests.distributed.program import largest_difference, run_program, small_config
from tests.world import run


def trace_only():
    """The compiler's front half: the same graphs and functions, run as they are."""
    options = speed.compile_options

    def with_backend(config):
        return {**options(config), "mode": None, "backend": "aot_eager"}

    moco.compile_options = ddp.compile_options = with_backend


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "accum"), [(1, 2), (2, 1)])
def test_compiled_encoders_equal_the_reference(world_size, accum):
    """Where DDP is compiled, its graph is cut at the gradient buckets."""
    config = small_config(engine={"compile": "model"}, optim={"grad_accum_steps": accum})
    found = differences(run(run_program, world_size, config, STEPS, trace_only), reference())
    assert max(found.values()) < 1e-10, found


def graphs_of_micro_batches(world):
    """The number of graphs after 3 steps of 4 micro-batches, through one and through several BN groups a call."""
    counts = []
    for num_groups in (1, 2):
        encoder = build_encoder(ModelConfig(arch="resnet10", head_hidden_dims=(8,), bn_group_size=4), 0)
        graphs = []
        encoder.compile(backend=lambda graph, _, graphs=graphs: graphs.append(graph) or graph, fullgraph=True,
                        dynamic=False)  # fmt: skip
        for i in range(12):
            set_micro_batch(encoder, i % 4, 4)
            encoder(torch.randn(4 * num_groups, 3, 32, 32)).sum().backward()
        counts.append(len(graphs))
    return counts


def test_an_encoder_is_one_graph_and_compiled_twice_at_most():
    """For the first micro-batch of a step, which decays the running statistics, and for the others."""
    assert run(graphs_of_micro_batches, 1) == [[2, 2]]


def grouped_and_fused(world):
    """What inductor makes of convolution, grouped BN and ReLU, beside eager mode; and its code."""
    from torch._inductor.utils import run_and_get_code

    def layers():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), GroupedBatchNorm2d(8, 4), nn.ReLU()).to(
            memory_format=torch.channels_last  # type: ignore[call-overload]
        )

    eager, compiled = layers(), layers()
    x = torch.randn(16, 3, 9, 9).to(memory_format=torch.channels_last)
    function = torch.compile(compiled, fullgraph=True, dynamic=False)

    def forward_backward():
        out = function(x)
        out.square().sum().backward()
        return out

    out, codes = run_and_get_code(forward_backward)
    expected = eager(x)
    expected.square().sum().backward()
    ours, theirs = ([*layers.buffers(), *(p.grad for p in layers.parameters())] for layers in (compiled, eager))
    for a, b in zip([out, *ours], [expected, *theirs], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    return "\n".join(codes), out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_groups_are_fused_not_put_together():
    code, is_channels_last = run(grouped_and_fused, 1)[0]
    assert is_channels_last
    assert "batch_norm" not in code
    assert "aten.cat" not in code
    assert "clone(" not in code


def lars_twice(world):
    """Weights after steps at changing rates, by LARS as it is and compiled; and how often it was compiled."""
    outcomes = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = LARS(list(model.parameters()), 0.9, 0.1, 0.01)
        if is_compiled:
            optimizer.compile()
        for step in range(5):
            optimizer.param_groups[0]["lr"] = 0.5 / (1 + step)
            model.weight.grad, model.bias.grad = torch.randn(3, 4), torch.randn(3)
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
        outcomes.append([p.detach() for p in model.parameters()])
    return *outcomes, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_lars_is_compiled_once_for_all_rates():
    plain, compiled, graphs = run(lars_twice, 1)[0]
    assert largest_difference(plain, compiled) < 1e-6
    assert graphs == 1


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("benchmark", [False, True])
def test_cudnn_and_tf32_are_what_the_config_says(tf32, benchmark):
    speed.set_backends(EngineConfig(allow_tf32=tf32, cudnn_benchmark=benchmark))
    assert torch.backends.cudnn.benchmark == benchmark
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32


def backends_after_build(world):
    build_method(small_config(engine={"allow_tf32": True, "cudnn_benchmark": False}), world)
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark


def test_a_run_sets_them():
    assert run(backends_after_build, 1) == [(True, False)]


def test_cuda_graphs_are_a_mode_of_the_compiler():
    assert speed.compile_options(EngineConfig(compile="model"))["mode"] is None
    assert speed.compile_options(EngineConfig(compile="model", cuda_graphs=True))["mode"] == "reduce-overhead"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "engine", [{"compile": "model"}, {"compile": "step"}, {"compile": "model", "cuda_graphs": True}], ids=str
)
@pytest.mark.parametrize("accum", [1, 2])
def test_on_a_gpu(engine, accum):
    """Six steps of each way, against eager mode."""
    from moco_dist.data.plan import Plan
    from moco_dist.distributed.world import World
    from tests.distributed.program import NUM_SAMPLES, images

    def losses(engine):
        config = small_config(engine=engine, optim={"precision": "fp32", "base_lr": 5e-4, "grad_accum_steps": accum})
        world = World(device="cuda:0")
        method = build_method(config, world)
        plan, table = Plan(NUM_SAMPLES, 64, 3), images(torch.float32).cuda()
        found = []
        for step in range(6):
            views = table[torch.from_numpy(plan.query_indices(step, world)).cuda()]
            order = torch.from_numpy(plan.key_permutation(step)).cuda()
            found.append(method.train_step(Views(views[:, 0], views[order, 1], order), 1e-4, False).loss.item())
        return found

    assert largest_difference(losses(engine), losses({})) < 1e-3
