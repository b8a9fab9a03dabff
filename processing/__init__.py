"""The processor: camera frames, instructions and states to model inputs. These files travel with every checkpoint.

They import one another relatively and otherwise nothing but transformers, numpy and pillow.
"""
