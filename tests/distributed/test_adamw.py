"""AdamW and clipping: the same training on two ranks and under ZeRO, and a state that either engine goes on with."""

import pytest
import torch

from moco_dist.data.plan import plan_of
from moco_dist.distributed.collectives import process_group
from moco_dist.method.build import build_method
from moco_dist.run.checkpoint import replicated_tensors
from tests.distributed.program import NUM_SAMPLES, images, largest_difference, run_program, small_config, views_at
from tests.world import run

CLIP = 0.2  # less than the gradients' norm


@pytest.mark.slow
def test_adamw_and_clipping_are_the_same_on_two_ranks_in_float64():
    configs = [small_config(optim={"optimizer": "adamw", "base_lr": 1e-3, "clip_grad_norm": CLIP, "weight_decay": 0.1,
                                   "grad_accum_steps": accum}) for accum in (1, 2)]  # fmt: skip
    (expected,) = run(run_program, 1, configs[0], 4)
    assert min(expected["gradient_norms"]) > CLIP
    clipped = torch.nn.utils.get_total_norm(list(expected["gradients"][0].values()))
    assert clipped.item() == pytest.approx(CLIP, rel=1e-4)
    for ours in run(run_program, 2, configs[1], 4):
        for name in ("losses", "gradient_norms", "query_encoder", "key_encoder", "queue"):
            assert largest_difference(ours[name], expected[name]) < 1e-8, name


def config_of(**engine):
    optim = {"precision": "fp32", "optimizer": "adamw", "base_lr": 5e-5, "weight_decay": 0.1, "clip_grad_norm": CLIP}
    return small_config(optim=optim, engine=engine)


def outcomes(world, configs):
    """Gradient norms and the state after three steps, and whether the optimiser takes twice its state."""
    found = []
    with process_group(world, alone_too=True):
        for config in configs:
            method = build_method(config, world)
            # Of smaller pictures float32's rounding would part the engines within three steps.
            plan, table = plan_of(config, NUM_SAMPLES), images(torch.float32, side=24)
            results = [method.train_step(views_at(table, plan, step, world), 1e-4, True) for step in range(3)]
            state = {name: value.clone() for name, value in replicated_tensors(method).items()}
            twice = {name: 2 * value for name, value in method.engine.optimizer_tensors().items()}
            takes_it = True
            if config.engine.zero_stage:  # in the others these are the optimiser's own tensors, filled in place
                method.engine.load_optimizer_tensors(twice)
                takes_it = largest_difference(method.engine.optimizer_tensors(), twice) == 0
            found.append(([result.scalars["gradient_norm"].item() for result in results], state, takes_it))
    return found


@pytest.mark.slow
def test_zero_computes_and_keeps_what_the_other_engine_does():
    pytest.importorskip("deepspeed")
    ((norms, state, _),) = run(outcomes, 1, [config_of()])[0]
    assert min(norms) > CLIP
    configs = [config_of(), *(config_of(kind="deepspeed", zero_stage=stage) for stage in (0, 1, 2))]
    for of_rank in run(outcomes, 2, configs):
        for their_norms, theirs, takes_it in of_rank:
            assert their_norms == pytest.approx(norms, rel=1e-4) and takes_it
            assert theirs.keys() == state.keys()
            for name in state:
                if name.startswith("optimizer."):
                    expected = state[name].double()
                    assert (theirs[name] - expected).norm() <= 1e-3 * expected.norm() + 1e-12, name
                elif name.startswith("query_encoder."):
                    assert largest_difference(theirs[name], state[name]) < 2e-4, name
