"""A file labelled, or answered, row for row by what was trained: `aflora predict`.

command     the command line, for one process and for several
trained     which model that is: a run's, an adapter's, one of the hub; loaded as the engine wants it
asking      rows become predictions, part by part
partial     what is done already, kept until all is
output      the file's rows, with what was predicted, in a file of any of the kinds that are read
"""
