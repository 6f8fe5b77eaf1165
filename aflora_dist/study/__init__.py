"""Studies: a grid of runs of `aflora train`, done by whoever is free, and tables that say what the runs can say.

A study is a list of command lines; the state of each is its run's directory, and what is left of it a small JSON file.
Imports no torch.
"""
