"""The operators behind the modules: registration with torch, autograd, and the choice of a backend for each call."""
