"""MARS in the Transformers Trainer. The only part of the package that imports transformers."""
