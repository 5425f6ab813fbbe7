"""Environments: the real benchmark and the learned one, behind gymnasium's VectorEnv interface.

Importing this package registers the real suites and loads none of the simulators.
"""

from worldenv.envs import libero as libero
