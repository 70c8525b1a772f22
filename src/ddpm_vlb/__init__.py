"""Likelihood training and evaluation of denoising diffusion models, for Hugging Face diffusers."""

from .checkpoint_scores import check_scorable, score
from .checks import check_data
from .classification import ClassPosterior, class_posterior, fit_class_pilot
from .compressed_files import CompressedFile
from .compression import BitsBackCodec, Decompressed, compress, decompress
from .counter_noise import counter_keys, counter_normal
from .distributions import DiagonalGaussian
from .estimation import ESTIMATORS, SECOND_DRAWS, VLBEstimator, estimate_vlb
from .evaluation import VLBTerms, enough_replicates, evaluate_vlb, image_generator, values_in_a_call
from .few_step_store import STORED_FILES
from .forward_process import Diffused, ForwardProcess
from .gaussian_model import GaussianModel, covariance_eigenvalues, gaussian_model_terms
from .gaussian_paths import GaussianPath, spaced_ratios
from .losses import hybrid_loss, nats_to_bits_per_dim, prior_kl, simple_loss, vlb_loss, vlb_term
from .model_card import model_card
from .ode import ODEEstimate, estimate_ode, ode_log_prob
from .optimal_paths import optimal_paths
from .path_checkpoints import describe_path, path_chain, stock_sigmas
from .path_configurations import DISTILLED_SCHEDULERS
from .path_losses import SIGMA_SAMPLINGS, sigma_probabilities, simple_weights
from .path_networks import PathNetwork
from .pilot import ControlVariate, Pilot, fit_pilot, pilot_positions
from .pipeline_ddpm_vlb import DDPMVLBPipeline
from .recorded_trajectories import DDPMVLBPipelineOutput
from .repositories import CODE_FILES, forget_origin, write_code
from .respacing import ALL_SPACINGS, TIMESTEP_SPACINGS, VARIANCES, SquaredErrors, StoredPath, spaced_timesteps
from .reverse_process import PREDICTION_TYPES, VARIANCE_TYPES, Prediction, ReverseProcess
from .schedules import BETA_SCHEDULES, beta_start_for_levels, make_betas, rescale_betas_zero_snr
from .scheduling_ddpm_vlb import DDPMVLBScheduler
from .scores import VLBDifference, VLBEstimate, VLBScores, compacted, estimate_from_scores, merge_scores
from .step_log_probs import Trajectory, step_kl, step_log_prob, step_log_ratio
from .step_statistics import FEW_IMAGES, MIN_IMAGES, StepStatistics, collect_statistics, spread_knots
from .timestep_samplers import (
    ImportanceTimesteps,
    LossSecondMomentTimesteps,
    LowDiscrepancyTimesteps,
    UniformTimesteps,
)
from .transition_costs import crossfitted_cost, step_costs
from .validation import Validation
from .walk import DDPMVLBSchedulerOutput
from .widening import with_learned_range

__version__ = "0.1.0"

__all__ = [
    "ALL_SPACINGS",
    "BETA_SCHEDULES",
    "CODE_FILES",
    "DISTILLED_SCHEDULERS",
    "ESTIMATORS",
    "FEW_IMAGES",
    "MIN_IMAGES",
    "PREDICTION_TYPES",
    "SECOND_DRAWS",
    "SIGMA_SAMPLINGS",
    "STORED_FILES",
    "TIMESTEP_SPACINGS",
    "VARIANCES",
    "VARIANCE_TYPES",
    "BitsBackCodec",
    "ClassPosterior",
    "CompressedFile",
    "ControlVariate",
    "DDPMVLBPipeline",
    "DDPMVLBPipelineOutput",
    "DDPMVLBScheduler",
    "DDPMVLBSchedulerOutput",
    "Decompressed",
    "DiagonalGaussian",
    "Diffused",
    "ForwardProcess",
    "GaussianModel",
    "GaussianPath",
    "ImportanceTimesteps",
    "LossSecondMomentTimesteps",
    "LowDiscrepancyTimesteps",
    "ODEEstimate",
    "PathNetwork",
    "Pilot",
    "Prediction",
    "ReverseProcess",
    "SquaredErrors",
    "StepStatistics",
    "StoredPath",
    "Trajectory",
    "UniformTimesteps",
    "VLBDifference",
    "VLBEstimate",
    "VLBEstimator",
    "VLBScores",
    "VLBTerms",
    "Validation",
    "beta_start_for_levels",
    "check_data",
    "check_scorable",
    "class_posterior",
    "collect_statistics",
    "compacted",
    "compress",
    "counter_keys",
    "counter_normal",
    "covariance_eigenvalues",
    "crossfitted_cost",
    "decompress",
    "describe_path",
    "enough_replicates",
    "estimate_from_scores",
    "estimate_ode",
    "estimate_vlb",
    "evaluate_vlb",
    "fit_class_pilot",
    "fit_pilot",
    "forget_origin",
    "gaussian_model_terms",
    "hybrid_loss",
    "image_generator",
    "make_betas",
    "merge_scores",
    "model_card",
    "nats_to_bits_per_dim",
    "ode_log_prob",
    "optimal_paths",
    "path_chain",
    "pilot_positions",
    "prior_kl",
    "rescale_betas_zero_snr",
    "score",
    "sigma_probabilities",
    "simple_loss",
    "simple_weights",
    "spaced_ratios",
    "spaced_timesteps",
    "spread_knots",
    "step_costs",
    "step_kl",
    "step_log_prob",
    "step_log_ratio",
    "stock_sigmas",
    "values_in_a_call",
    "vlb_loss",
    "vlb_term",
    "with_learned_range",
    "write_code",
]
