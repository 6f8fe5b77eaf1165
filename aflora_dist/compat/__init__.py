"""What differs between the releases of other libraries that are supported: a file for each library.

Of private interfaces the differences stand beside their lists (see aflora_dist/compat/contract.py).
"""
