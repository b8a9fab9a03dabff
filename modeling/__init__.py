"""The model: configuration, network and normalisation. These files travel with every checkpoint.

They import one another relatively and otherwise nothing but torch, transformers and numpy.
"""
