"""The processor: camera frames, instructions and states to model inputs. These files travel with every checkpoint.

They import each other relatively, and otherwise only transformers, numpy, pillow and, if it is installed, simplejpeg.
"""
