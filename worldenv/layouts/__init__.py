"""Folders with random weights, any size, exactly as models are published: to try without downloads
what will be done with downloaded ones (preset `published-tiny`, `bench.full_size`, the tests).
"""
