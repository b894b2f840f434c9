"""`python -m hf_mars.sweep`: a fair comparison of optimizers for any Trainer script (docs/sweep.md).

Imports neither torch nor transformers: they belong to the runs, which are processes of their own.
"""
