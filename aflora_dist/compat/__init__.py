"""Other libraries' private interfaces and what differs between their supported releases: a file for each library.

Each file lists what is used (`PRIVATE`, see compat/contract.py) and offers it as small functions.
"""
