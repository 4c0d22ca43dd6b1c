"""The diffusion model of DHNS: noise predictor, schedule, conditions, and the folding of weights that makes its chain
cheap.
"""
