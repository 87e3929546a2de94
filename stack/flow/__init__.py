"""Rectified flow: the path, timesteps, noise, solvers and guidance. Pure functions, no networks."""
