"""dhns_fast: diffusion-based hierarchical negative sampling (DHNS) for multimodal knowledge-graph completion."""

__version__ = "0.1.0"
