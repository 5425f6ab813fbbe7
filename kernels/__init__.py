"""Triton kernels and their launchers, installed as `worldenv.kernels`; no modules, no config."""
