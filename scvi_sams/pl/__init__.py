from scvi_sams.pl._effects import model_vs_observed_effects
from scvi_sams.pl._latent_umap import latent_umap
from scvi_sams.pl._mask_heatmap import mask_heatmap
from scvi_sams.pl._scorecard import scorecard
from scvi_sams.pl._training_history import training_history

__all__ = [
    "latent_umap",
    "mask_heatmap",
    "model_vs_observed_effects",
    "scorecard",
    "training_history",
]
