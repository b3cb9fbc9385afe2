"""Solvers, schedules, guidance and masks against diffusers' schedulers and Z-Image pipelines."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from inkstream.sampling.masks import latent_mask, start_index
from inkstream.sampling.schedules import SCHEDULES, shifted
from inkstream.sampling.solvers import SOLVERS, drive
from rounding import agree

STEPS = 8
UNITS = 8 * STEPS
"""A step rounds about four times, and the velocity, whose slope is 3, carries on what the steps before it rounded."""


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=seeded(seed))


def velocity(x, t):
    return torch.sin(3 * x) + x.roll(1, -1) * t


def published_euler(steps, shift):
    """Z-Image's scheduler, set up as its pipeline does."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    return scheduler


@pytest.mark.parametrize("shift", [3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 4, 8, 9, 28, 50])
def test_simple_is_the_grid_of_the_published_scheduler(steps, shift):
    theirs = published_euler(steps, shift).sigmas.tolist()
    assert SCHEDULES["simple"](steps, shift) == pytest.approx(theirs, abs=1e-6)


def test_euler_is_the_published_scheduler_step_for_step():
    scheduler, noise = published_euler(8, 3.0), gaussian(0, 4, 6, 6)
    theirs = noise
    for timestep in scheduler.timesteps:
        v = velocity(theirs, timestep.item() / 1000)
        theirs = scheduler.step(v, timestep, theirs, return_dict=False)[0]
    ours = drive(SOLVERS["euler"](noise, SCHEDULES["simple"](8, 3.0)), velocity)
    agree(ours, theirs, UNITS)


def test_heun_is_the_flow_matching_heun_scheduler():
    scheduler, noise = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0), gaussian(0, 4, 6, 6)
    scheduler.set_timesteps(8)
    theirs = noise
    for timestep in scheduler.timesteps:
        v = velocity(theirs, timestep.item() / 1000)
        theirs = scheduler.step(v, timestep, theirs, return_dict=False)[0]
    ts = [*dict.fromkeys(scheduler.sigmas.tolist())]
    assert len(ts) == 9
    agree(drive(SOLVERS["heun"](noise, ts), velocity), theirs, UNITS)


def test_lcm_is_the_flow_matching_lcm_scheduler_with_the_same_seed():
    scheduler, noise = diffusers.FlowMatchLCMScheduler(shift=3.0), gaussian(0, 4, 6, 6)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4))
    theirs, generator = noise, seeded(1)
    for timestep in scheduler.timesteps:
        v = velocity(theirs, timestep.item() / 1000)
        theirs = scheduler.step(v, timestep, theirs, generator=generator, return_dict=False)[0]
    ours = drive(SOLVERS["lcm"](noise, SCHEDULES["simple"](4, 3.0), seeded(1)), velocity)
    agree(ours, theirs, UNITS)


def test_dpmpp_2m_is_dpm_solver_multistep_in_the_notation_of_a_growing_noise():
    """Their EDM solver has l = -ln sigma as we have; its preconditioning is undone, so that it sees the same image."""
    ts, noise = SCHEDULES["simple"](8, 3.0), gaussian(0, 1, 4, 6, 6)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(solver_order=2, final_sigmas_type="zero")
    scheduler.set_timesteps(8)
    scheduler.sigmas = torch.tensor(ts)
    theirs = noise
    for timestep, t in zip(scheduler.timesteps, ts):
        nothing = torch.zeros_like(theirs)
        skip = scheduler.precondition_outputs(theirs, nothing, torch.tensor(t))
        scale = scheduler.precondition_outputs(nothing, nothing + 1, torch.tensor(t))
        image = theirs - t * velocity(theirs, t)
        theirs = scheduler.step((image - skip) / scale, timestep, theirs, return_dict=False)[0]
    ours = drive(SOLVERS["dpmpp_2m"](noise, ts), velocity)
    agree(ours, theirs, UNITS)


def test_dpm_solver_multistep_for_flows_is_euler_at_order_one():
    """At order two it weighs by the half-logSNR, infinite at t = 1, where `dpmpp_2m` weighs by -ln t: not the same."""
    noise = gaussian(0, 1, 4, 6, 6)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=1, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(8)
    ts = scheduler.sigmas.tolist()
    theirs = noise
    for timestep, t in zip(scheduler.timesteps, ts):
        theirs = scheduler.step(velocity(theirs, t), timestep, theirs, return_dict=False)[0]
    agree(drive(SOLVERS["euler"](noise, ts), velocity), theirs, UNITS)


def test_time_shift_by_mu_is_the_static_shift_of_its_exponential():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for t in (0.1, 0.5, 0.9):
        assert shifted(t, float(np.exp(0.83))) == pytest.approx(scheduler.time_shift(0.83, 1.0, torch.tensor(t)).item())


def test_strength_starts_where_the_image_to_image_pipeline_does():
    for steps in (1, 4, 8, 50):
        for strength in (0.0, 0.01, 0.3, 0.6, 0.75, 0.99, 1.0):
            pipeline = SimpleNamespace(scheduler=published_euler(steps, 3.0))
            left = diffusers.ZImageImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")[1]
            assert steps - start_index(steps, strength) == left


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
def test_the_latent_mask_is_the_inpainting_pipelines(height, width):
    """Its mask processor, then `prepare_mask_latents`, which scales to the latents with the nearest pixel."""
    mask = torch.rand(height, width, generator=seeded(0))
    processor = diffusers.image_processor.VaeImageProcessor(
        do_normalize=False, do_binarize=True, do_convert_grayscale=True, vae_scale_factor=16
    )
    theirs = processor.preprocess(mask[None, None], height=height, width=width)
    theirs = torch.nn.functional.interpolate(theirs, size=(height // 8, width // 8), mode="nearest")
    assert torch.equal(latent_mask(mask, height // 8, width // 8), theirs[0])
