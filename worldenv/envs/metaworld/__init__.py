"""Meta-World (package metaworld 3.1.1), a second real benchmark: another arm, other cameras, fifty
tasks with an expert each. Importing this loads no simulator.
"""
