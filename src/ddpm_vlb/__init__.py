"""Likelihood training and evaluation of denoising diffusion models, for Hugging Face diffusers."""

from .distributions import DiagonalGaussian
from .estimation import VLBEstimator, estimate_vlb
from .evaluation import VLBTerms, check_data, evaluate_vlb
from .forward_process import Diffused, ForwardProcess
from .gaussian_model import GaussianModel, covariance_eigenvalues, gaussian_model_terms
from .losses import hybrid_loss, nats_to_bits_per_dim, prior_kl, simple_loss, vlb_loss, vlb_term
from .model_card import model_card
from .optimal_paths import optimal_paths
from .pilot import ControlVariate, Pilot, fit_pilot
from .pipeline_ddpm_vlb import DDPMVLBPipeline
from .respacing import SquaredErrors, StoredPath, spaced_timesteps
from .reverse_process import Prediction, ReverseProcess
from .schedules import beta_start_for_levels, make_betas, rescale_betas_zero_snr
from .scheduling_ddpm_vlb import DDPMVLBScheduler
from .scores import VLBEstimate, VLBScores, estimate_from_scores, merge_scores
from .step_statistics import StepStatistics, collect_statistics, spread_knots, step_costs
from .timestep_samplers import (
    ImportanceTimesteps,
    LossSecondMomentTimesteps,
    LowDiscrepancyTimesteps,
    UniformTimesteps,
)

__version__ = "0.1.0"

__all__ = [
    "ControlVariate",
    "DDPMVLBPipeline",
    "DDPMVLBScheduler",
    "DiagonalGaussian",
    "Diffused",
    "ForwardProcess",
    "GaussianModel",
    "ImportanceTimesteps",
    "LossSecondMomentTimesteps",
    "LowDiscrepancyTimesteps",
    "Pilot",
    "Prediction",
    "ReverseProcess",
    "SquaredErrors",
    "StepStatistics",
    "StoredPath",
    "UniformTimesteps",
    "VLBEstimate",
    "VLBEstimator",
    "VLBScores",
    "VLBTerms",
    "beta_start_for_levels",
    "check_data",
    "collect_statistics",
    "covariance_eigenvalues",
    "estimate_from_scores",
    "estimate_vlb",
    "evaluate_vlb",
    "fit_pilot",
    "gaussian_model_terms",
    "hybrid_loss",
    "make_betas",
    "merge_scores",
    "model_card",
    "nats_to_bits_per_dim",
    "optimal_paths",
    "prior_kl",
    "rescale_betas_zero_snr",
    "simple_loss",
    "spaced_timesteps",
    "spread_knots",
    "step_costs",
    "vlb_loss",
    "vlb_term",
]
