"""Robots: simulators, demonstrations, the diffusion policy, closed-loop rollouts.

``sim/`` and ``demos/`` import neither torch nor Triton: they also run in processes that render with software OpenGL, whose
LLVM does not get along with Triton's.
"""
