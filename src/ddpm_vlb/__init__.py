"""Likelihood training and evaluation of denoising diffusion models, for Hugging Face diffusers."""

from .distributions import DiagonalGaussian
from .evaluation import (
    VLBEstimate,
    VLBTerms,
    check_data,
    estimate_vlb,
    evaluate_vlb,
    pilot_probabilities,
)
from .forward_process import Diffused, ForwardProcess
from .losses import hybrid_loss, nats_to_bits_per_dim, prior_kl, simple_loss, vlb_loss, vlb_term
from .pipeline_ddpm_vlb import DDPMVLBPipeline
from .respacing import spaced_timesteps
from .reverse_process import Prediction, ReverseProcess
from .schedules import beta_start_for_levels, make_betas, rescale_betas_zero_snr
from .scheduling_ddpm_vlb import DDPMVLBScheduler
from .timestep_samplers import (
    ImportanceTimesteps,
    LossSecondMomentTimesteps,
    LowDiscrepancyTimesteps,
    UniformTimesteps,
    covariance_eigenvalues,
    gaussian_model_terms,
)

__version__ = "0.1.0"

__all__ = [
    "DDPMVLBPipeline",
    "DDPMVLBScheduler",
    "DiagonalGaussian",
    "Diffused",
    "ForwardProcess",
    "ImportanceTimesteps",
    "LossSecondMomentTimesteps",
    "LowDiscrepancyTimesteps",
    "Prediction",
    "ReverseProcess",
    "UniformTimesteps",
    "VLBEstimate",
    "VLBTerms",
    "beta_start_for_levels",
    "check_data",
    "covariance_eigenvalues",
    "estimate_vlb",
    "evaluate_vlb",
    "gaussian_model_terms",
    "hybrid_loss",
    "make_betas",
    "nats_to_bits_per_dim",
    "pilot_probabilities",
    "prior_kl",
    "rescale_betas_zero_snr",
    "simple_loss",
    "spaced_timesteps",
    "vlb_loss",
    "vlb_term",
]
