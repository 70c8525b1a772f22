"""How good samples are: features, distances between sets of them, their report."""

from ddpm_vlb.runtime import require

require(scipy="scipy", transformers="transformers")
