"""MPMA pretraining: models, data, training and evaluation on top of `mpma_ext`."""
