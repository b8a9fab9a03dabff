"""The model: configuration, network and normalisation. These files travel with every checkpoint.

They import each other relatively, and otherwise only torch, transformers, huggingface_hub and numpy.
"""
